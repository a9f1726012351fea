"""Convolutions in canonical form: the same values, and that form alone, wherever they stand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import gnp_optax as gnp

SPACE = {1: "W", 2: "HW", 3: "DHW"}


def arrays(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(shape), jnp.float32) / 3 for shape in shapes]


def same(x, kernel, form=("NHWC", "HWIO", "NHWC"), **options):
    dims = x.ndim - 2
    return jax.lax.conv_general_dilated(
        x, kernel, (1,) * dims, "SAME", dimension_numbers=form, **options
    )


def of_both(layer):
    """The value and both gradients of a function of a layer's results."""
    return jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(layer(*args))), (0, 1))


def assert_same(found, expected, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = np.max(np.abs(b), initial=1e-9)
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


def jaxprs_in(eqn):
    for param in eqn.params.values():
        for inner in param if isinstance(param, (tuple, list)) else (param,):
            inner = getattr(inner, "jaxpr", inner)
            if isinstance(inner, core.Jaxpr):
                yield inner


def numbers_on(platform, jaxpr):
    """The dimension numbers and the groups of the batch of all convolutions for a platform."""
    decided = set()  # what only says which platform it is
    for eqn in jaxpr.eqns:
        read = {v for v in eqn.invars if not isinstance(v, core.Literal)}
        if eqn.primitive.name == "conv_general_dilated":
            yield eqn.params["dimension_numbers"], eqn.params["batch_group_count"]
        elif eqn.primitive.name == "platform_index" or (read and read <= decided):
            decided.update(eqn.outvars)
        elif eqn.primitive.name == "cond" and eqn.invars[0] in decided:
            yield from numbers_on(platform, list(jaxprs_in(eqn))[platform != "cpu"])
        else:
            for inner in jaxprs_in(eqn):
                yield from numbers_on(platform, inner)


def convolutions(platform, fun, *args):
    return list(numbers_on(platform, jax.make_jaxpr(fun)(*args).jaxpr))


def is_canonical(numbers, groups):
    last = len(numbers.lhs_spec) - 1
    image, kernel = (0, last, *range(1, last)), (last, last - 1, *range(last - 1))
    return tuple(numbers) == (image, kernel, image) and groups == 1


def assert_canonical_for_a_cpu_alone(fun, plain, *args):
    on_cpu = convolutions("cpu", fun, *args)
    assert on_cpu
    assert all(is_canonical(*each) for each in on_cpu)
    as_before = convolutions("cpu", plain, *args)
    assert sorted(convolutions("cuda", fun, *args)) == sorted(as_before)
    assert not all(is_canonical(*each) for each in as_before)


OPTIONS = {
    "plain": {},
    "strided": {"window_strides": 2},
    "dilated": {"rhs_dilation": 2},
    "transposed": {"lhs_dilation": 2},
    "grouped": {"feature_group_count": 4},
    "depthwise": {"feature_group_count": 8},
    "strided and grouped": {"window_strides": 2, "feature_group_count": 2},
    "groups of the batch": {"batch_group_count": 2},
    "features first": {"form": "features first"},
    "in a strange order": {"form": "strange"},
}


@pytest.mark.exhaustive(but=["1-strided and grouped", "2-in a strange order"])
@pytest.mark.parametrize("options", [pytest.param(o, id=name) for name, o in OPTIONS.items()])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_each_convolution_and_its_gradients(dims, options):
    space = SPACE[dims]
    form = {
        None: (f"N{space}C", f"{space}IO", f"N{space}C"),
        "features first": (f"NC{space}", f"OI{space}", f"NC{space}"),
        "strange": (f"C{space}N", f"I{space}O", f"{space}CN"),
    }[options.get("form")]
    sizes = dict(zip(space, (7, 6, 5), strict=False)) | {"N": 4, "C": 8, "O": 16}
    sizes["I"] = 8 // options.get("feature_group_count", 1)
    kernel_sizes = sizes | dict(zip(space, (3, 2, 3), strict=False))
    x, kernel = arrays([sizes[c] for c in form[0]], [kernel_sizes[c] for c in form[1]])

    def layer(x, kernel):
        given = {n: v if "count" in n else (v,) * dims for n, v in options.items() if n != "form"}
        given = {"window_strides": (1,) * dims, **given}
        padding = ((1, 2),) * dims
        return jax.lax.conv_general_dilated(
            x, kernel, padding=padding, dimension_numbers=form, **given
        )

    plain = of_both(layer)
    canonical = gnp.canonical_convolutions(plain)
    assert_canonical_for_a_cpu_alone(canonical, plain, x, kernel)
    # By hand, without a group of which XLA would make another program: its sums are in other order.
    assert_same(jax.jit(canonical)(x, kernel), jax.jit(plain)(x, kernel))


@jax.custom_vjp
def with_vjp(x, kernel):
    return same(x, kernel)


with_vjp.defvjp(lambda *args: (same(*args), args), lambda args, g: jax.vjp(same, *args)[1](2 * g))


@jax.custom_jvp
def with_jvp(x, kernel):
    return same(x, kernel)


@with_jvp.defjvp
def with_jvp_rule(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    return same(x, kernel), 2 * same(dx, kernel) + 2 * same(x, dkernel)


def in_scan(x, kernel):
    return jax.lax.scan(lambda x, k: (jnp.tanh(same(x, k)), None), x, jnp.stack(2 * [kernel]))[0]


def in_fori_loop(x, kernel):
    return jax.lax.fori_loop(0, 2, lambda _, x: jnp.tanh(same(x, kernel)), x)


def in_while_loop(x, kernel):
    """Not differentiated: the other way round."""
    x = jax.lax.stop_gradient(x).transpose(1, 2, 0, 3)
    small = lambda x: jnp.sum(x**2) < 50  # noqa: E731
    step = lambda x: 1 + same(x, jax.lax.stop_gradient(kernel), ("HWNC", "HWIO", "HWNC"))  # noqa: E731
    return same(jax.lax.while_loop(small, step, x).transpose(2, 0, 1, 3), kernel)


def in_cond(x, kernel):
    return jax.lax.cond(jnp.sum(x) > -1e9, same, lambda x, _: x, x, kernel)


def in_checkpoint(x, kernel):
    return jax.checkpoint(lambda x, kernel: jnp.tanh(same(jnp.tanh(x), kernel)))(x, kernel)


def in_all(x, kernel):
    return in_cond(jax.checkpoint(in_scan)(jax.jit(with_vjp)(x, kernel), kernel), kernel)


PLACES = [jax.jit(same), with_vjp, with_jvp, in_scan, in_fori_loop, in_while_loop, in_cond]
PLACES = {getattr(f, "__name__", ""): f for f in [*PLACES, in_checkpoint, in_all]}


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_convolution_stands(place):
    plain = of_both(PLACES[place])
    canonical = gnp.canonical_convolutions(plain)
    assert_canonical_for_a_cpu_alone(canonical, plain, *arrays((2, 5, 4, 3), (3, 3, 3, 3)))


@pytest.mark.exhaustive(but=["in_all"])
@pytest.mark.parametrize("place", PLACES)
def test_the_values_wherever_a_convolution_stands(place):
    x, kernel = arrays((2, 5, 4, 3), (3, 3, 3, 3))
    plain = of_both(PLACES[place])
    canonical = gnp.canonical_convolutions(plain)
    assert_same(jax.jit(canonical)(x, kernel), jax.jit(plain)(x, kernel))


@pytest.mark.parametrize("place", ["with_vjp", "with_jvp"])
def test_a_custom_derivative_is_kept_and_its_function_rewritten(place):
    strange = ("HWNC", "HWIO", "HWNC")
    x, kernel = arrays((5, 4, 2, 3), (3, 3, 3, 3))

    @(jax.custom_vjp if place == "with_vjp" else jax.custom_jvp)
    def layer(x, kernel):
        return same(x, kernel, strange)

    if place == "with_vjp":
        layer.defvjp(lambda *args: (layer(*args), args), lambda args, g: (7 * args[0], 8 * args[1]))
    else:
        layer.defjvp(lambda args, t: (layer(*args), 7 * same(t[0], args[1], strange)))
    canonical = gnp.canonical_convolutions(layer)
    assert_canonical_for_a_cpu_alone(canonical, layer, x, kernel)
    pulled = [jax.jit(of_both(f))(x, kernel) for f in (canonical, layer)]
    assert_same(*pulled)


AXES = [pytest.param((0, None), id="images"), pytest.param((0, 0), id="both")]


@pytest.mark.parametrize("axes", AXES)
def test_it_is_canonical_when_it_is_mapped(axes):
    x, kernel = arrays((3, 2, 5, 4, 3), (3, 3, 3, 3))
    kernels = jnp.stack(3 * [kernel]) if axes[1] == 0 else kernel
    mapped = jax.vmap(gnp.canonical_convolutions(of_both(same)), axes)
    assert all(is_canonical(*each) for each in convolutions("cpu", mapped, x, kernels))


@pytest.mark.exhaustive
@pytest.mark.parametrize("axes", AXES)
def test_it_is_mapped_and_differentiated_like_any_other(axes):
    x, kernel = arrays((3, 2, 5, 4, 3), (3, 3, 3, 3))
    kernels = jnp.stack(3 * [kernel]) if axes[1] == 0 else kernel

    def second(f):
        along = lambda x, k: jax.jvp(lambda k: f(x, k)[1], (k,), (k,))[1]  # noqa: E731
        return jax.jit(jax.vmap(along, axes))(x, kernels)

    plain = of_both(same)
    assert_same(second(gnp.canonical_convolutions(plain)), second(plain))


def test_arguments_and_results_may_be_anything():
    x, kernel = arrays((2, 5, 4, 3), (3, 3, 3, 3))

    @gnp.canonical_convolutions
    def layer(x, kernel, *, form, active):
        assert (form, active) == ("NHWC", True)
        return {"result": same(x, kernel, (form, "HWIO", form)), "form": form, "none": None}

    found = layer(x, kernel, form="NHWC", active=True)
    assert (found["form"], found["none"]) == ("NHWC", None)
    assert_same(found["result"], same(x, kernel))


def test_what_has_no_convolution_stays_the_same():
    plain = jax.grad(lambda x: jax.lax.scan(lambda c, x: (c * x, jnp.sin(x)), 1.0, x)[0])
    canonical = gnp.canonical_convolutions(plain)
    x = jnp.arange(3.0)
    assert str(jax.make_jaxpr(canonical)(x)) == str(jax.make_jaxpr(plain)(x))


def test_a_jitted_function_is_compiled_once(caplog):
    x, kernel = arrays((2, 5, 4, 3), (3, 3, 3, 3))
    step = gnp.canonical_convolutions(jax.jit(of_both(same)))
    step(x, kernel)
    with jax.log_compiles():
        step(x, kernel)
    assert "Compiling" not in caplog.text


def test_what_is_written_so_already_is_not_written_so_again():
    x, kernel = arrays((2, 5, 4, 3), (3, 3, 3, 3))
    once = gnp.canonical_convolutions(of_both(same))
    twice = gnp.canonical_convolutions(once)
    assert str(jax.make_jaxpr(twice)(x, kernel)) == str(jax.make_jaxpr(once)(x, kernel))


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="an older JAX compiles for either")
def test_it_is_decided_when_the_program_is_compiled():
    x, kernel = arrays((2, 5, 4, 3), (3, 3, 3, 3))
    plain = jax.jit(of_both(same))
    canonical = jax.jit(gnp.canonical_convolutions(of_both(same)))

    def forms(fun, platform):
        lowered = fun.trace(x, kernel).lower(lowering_platforms=(platform,))
        return sorted(re.findall(r"dim_numbers = (.*?), window", lowered.as_text()))

    assert set(forms(canonical, "cpu")) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}
    assert forms(canonical, "cuda") == forms(plain, "cuda") != forms(canonical, "cpu")


# The second gradient.


def network():
    """Parameters, the loss of a network of convolutions, and its input."""
    x, *kernels = arrays((4, 6, 6, 4), (3, 3, 2, 4), (3, 3, 4, 4))

    def loss(params, x):
        x = jnp.tanh(same(x, params[0], feature_group_count=2))
        return jnp.mean(in_checkpoint(x, params[1]) ** 2)

    return kernels, loss, x


def functional(params, x, alpha, loss, mask):
    return gnp.value_and_grad(loss, 0.1, alpha, mask=mask)(params, x)


def transformation(params, x, alpha, loss, mask):
    tx = gnp.gradient_regularization(0.1, lambda _: alpha, mask=mask)
    value, grads = jax.value_and_grad(loss)(params, x)
    return value, tx.update(grads, tx.init(params), params, value_fn=lambda p: loss(p, x))[0]


@pytest.mark.exhaustive(but=["transformation-all"])
@pytest.mark.parametrize("mask", [None, [False, True]], ids=["all", "masked"])
@pytest.mark.parametrize("step", [functional, transformation])
def test_the_step_of_a_traced_alpha_is_that_of_a_number(step, mask):
    params, loss, x = network()

    def run(alpha):
        return step(params, x, alpha, loss, mask)

    assert_same(jax.jit(run)(0.5), jax.jit(lambda: run(0.5))())


@pytest.mark.parametrize("mask", [None, [False, True]], ids=["all", "masked"])
@pytest.mark.parametrize("step", [functional, transformation])
def test_the_branch_of_a_traced_alpha_has_canonical_convolutions(step, mask):
    params, loss, x = network()
    jaxpr = jax.make_jaxpr(lambda alpha: step(params, x, alpha, loss, mask))(0.5).jaxpr
    (branch,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    found = [each for inner in jaxprs_in(branch) for each in numbers_on("cpu", inner)]
    assert len(found) >= 4
    assert all(is_canonical(*each) for each in found)
