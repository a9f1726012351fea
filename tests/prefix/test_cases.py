"""Prefix sharing in special circumstances: as two whole gradients, with less work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import checkify, io_callback
from models.problems import MASK, two_matrices
from models.problems import two_matrices_loss as loss
from models.unshared import assert_same_tree, unshared

import gnp_optax as gnp

pytestmark = pytest.mark.usefixtures("x64")


def shared(fun, r=0.1, alpha=0.7, mask=MASK, scope="all", **kwargs):
    return gnp.value_and_grad(fun, r, alpha, mask=mask, scope=scope, **kwargs)


def plain(fun, r=0.1, alpha=0.7, mask=MASK, scope="all", **kwargs):
    return unshared(fun, r, alpha, mask, scope, **kwargs)


def check(fun, params, *args, jit=False, rtol=1e-12, **kwargs):
    """Compare with the formula."""
    results = []
    for transform in (shared, plain):
        compute = transform(fun, **kwargs)
        results.append((jax.jit(compute) if jit else compute)(params, *args))
    assert_same_tree(*results, rtol)


# Effects

CALLS = {
    "debug.callback": jax.debug.callback,
    "ordered debug.callback": functools.partial(jax.debug.callback, ordered=True),
    "io_callback": lambda f, x: io_callback(f, None, lax.stop_gradient(x)),
    "ordered io_callback": lambda f, x: io_callback(f, None, lax.stop_gradient(x), ordered=True),
}
SHARED, AGAIN = ["data", "shared", "still shared"], ["perturbed", "behind it"]


def log_of_one_step(call, jit=False, **kwargs):
    params, x = two_matrices()
    log = []

    def note(name, x):
        CALLS[call](lambda _: log.append(name), x)

    def talkative(p):
        note("data", x)
        h = jnp.tanh(x @ p["a"])
        note("shared", h)
        out = jnp.tanh(h @ p["b"])
        note("still shared", h)
        note("perturbed", out)
        note("behind it", h)
        return out.sum()

    compute = shared(talkative, **kwargs)
    jax.block_until_ready((jax.jit(compute) if jit else compute)(params))
    jax.effects_barrier()
    return in_order(call, log)


def in_order(call, log):
    """Ordered effects happen in program order, others in any."""
    return log if call.startswith("ordered") else sorted(log)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_effects_happen_once_a_step_until_one_depends_on_a_perturbed_leaf_then_once_a_pass(
    call, jit
):
    assert log_of_one_step(call, jit) == in_order(call, [*SHARED, *AGAIN, *AGAIN])


@pytest.mark.parametrize("call", CALLS)
def test_without_a_mask_every_effect_happens_once_a_pass(call):
    assert log_of_one_step(call, mask=None) == in_order(call, [*SHARED, *AGAIN] * 2)


@pytest.mark.parametrize("call", CALLS)
def test_without_a_second_pass_every_effect_happens_once(call):
    assert log_of_one_step(call, alpha=0.0) == in_order(call, [*SHARED, *AGAIN])


@pytest.mark.exhaustive
def test_effects_in_a_scan_over_layers_happen_once_for_each_shared_layer(capfd):
    params = {"w": jnp.stack([two_matrices()[0]["a"]] * 3)}

    def fun(params):
        def step(h, layer):
            i, w = layer
            jax.debug.print("{}", i)
            return jnp.tanh(h @ w), None

        return lax.scan(step, two_matrices()[1], (jnp.arange(3), params["w"]))[0].sum()

    def printed(compute):
        compute(params)
        jax.effects_barrier()
        return sorted(capfd.readouterr().out.split())

    if not printed(jax.grad(fun)):
        pytest.skip("this version of JAX drops effects of a loop that is differentiated")
    assert printed(shared(fun, mask={"w": np.array([False, False, True])})) == ["0", "1", "2", "2"]


def test_stopped_values_cross_the_cut_into_a_loop_and_a_callback():
    params, x = two_matrices()
    seen = []

    def fun(p):
        h = lax.stop_gradient(x @ p["a"])
        grown = lax.while_loop(lambda c: c.sum() < 3, lambda c: c + 1, h * h)
        io_callback(lambda v: seen.append(v), None, h * lax.stop_gradient(p["b"][0]))
        return jnp.sum(grown @ p["b"]) + loss(p, x)

    check(fun, params)
    jax.effects_barrier()
    assert len(seen) == 2 + 2


# What a gradient does not pass through


@pytest.mark.parametrize(
    "suffix",
    [
        lambda root, b: lax.stop_gradient(root * b),
        lambda root, b: jnp.where(root > b, b, 0.0),
        lambda root, b: jax.jit(lambda root, b: lax.stop_gradient(root) * b)(root, b),
        lambda root, b: jax.checkpoint(lambda root, b: lax.stop_gradient(root @ b) * b)(root, b),
    ],
    ids=["stopped", "compared", "jit", "checkpoint"],
)
def test_an_infinite_derivative_that_no_gradient_reaches_is_not_pulled_back(suffix):
    """0 times infinity would be NaN."""
    params, x = two_matrices()
    params = {**params, "zero": jnp.zeros(3)}

    def fun(p):
        return loss(p, x) + jnp.sum(suffix(jnp.sqrt(p["zero"]), p["b"]))

    check(fun, params, mask={**MASK, "zero": False})


def test_an_infinite_derivative_of_aux_is_not_pulled_back():
    params, x = two_matrices()
    params = {**params, "zero": jnp.zeros(3)}

    def fun(p):
        return loss(p, x), jnp.sqrt(p["zero"]) * p["b"]

    check(fun, params, mask={**MASK, "zero": False}, has_aux=True)


@pytest.mark.parametrize("jit", [False, True])
def test_a_custom_derivative_may_hold_a_value_of_the_loss(jit):
    """It can't be differentiated once the loss has been traced, so nothing is shared."""
    params, x = two_matrices()

    def fun(p):
        scale = jnp.log(jnp.abs(x)).sum()
        scaled = jax.custom_vjp(lambda y: y * scale)
        scaled.defvjp(lambda y: (y * scale, None), lambda _, g: (g * scale,))
        return jnp.sum(scaled(jnp.tanh(scaled(x @ p["a"]) @ p["b"])))

    check(fun, params, jit=jit)


LOOPS = {
    "scan": lambda f, x: lax.scan(lambda c, _: (f(jnp.tanh(c)), None), x, None, length=2)[0],
    "cond": lambda f, x: lax.cond(x[0, 0] > 0, lambda x: f(jnp.tanh(x)), lambda x: x, x),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_custom_derivative_in_a_loop_may_hold_a_value_of_the_loss(loop):
    params, x = two_matrices()

    def fun(p):
        scale = jnp.log(jnp.abs(x) + 1).sum()
        scaled = jax.custom_vjp(lambda y: y)
        scaled.defvjp(lambda y: (y, None), lambda _, g: (g * scale,))
        return jnp.sum(jnp.tanh(LOOPS[loop](scaled, x @ p["a"]) @ p["b"]))

    check(fun, params)


@pytest.mark.parametrize("where", ["both passes", "backward pass"])
def test_a_batch_in_a_custom_derivative_does_not_hinder_sharing(where):
    params, x = two_matrices()
    log = []

    def step(p, x):
        def forward(y):
            return y * x if where == "both passes" else y

        def fun(p):
            jax.debug.callback(lambda: log.append("run"))
            scaled = jax.custom_vjp(forward)
            scaled.defvjp(lambda y: (forward(y), None), lambda _, g: (g * x,))
            return jnp.sum(jnp.tanh(scaled(x @ p["a"]) @ p["b"]))

        return shared(fun)(p)

    jax.jit(step)(params, x)
    jax.effects_barrier()
    assert log == ["run"]


def test_a_function_that_frees_its_argument_is_not_run_twice():
    params, x = two_matrices()
    twice = jax.jit(lambda m: m * 2, donate_argnums=0)
    check(lambda p: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"] * twice(jnp.sin(x))), params)


# Without `jit`, Python sees values


@pytest.mark.parametrize(
    "factor",
    [
        lambda p, x: 2.0 if p["a"].sum() > 0 else 3.0,
        lambda p, x: 2.0 if p["b"].sum() > 0 else 3.0,
        lambda p, x: float(lax.stop_gradient(p["a"]).sum()),
        lambda p, x: np.asarray(2 * x).sum(),
        lambda p, x: np.asarray(lax.stop_gradient(p["a"])).max(),
        lambda p, x: [1.0, 2.0, 3.0][jnp.argmax(x[0])],
        lambda p, x: p["b"][p["a"] > 0].sum(),
        lambda p, x: p["b"].reshape(jnp.argmax(x[0]) * 0 + 3, 3).sum(),
        lambda p, x: lax.fori_loop(0, jnp.argmax(x[0]) + 2, lambda _, c: jnp.sin(c), p["b"]).sum(),
        lambda p, x: p["a"].sum() * lax.fori_loop(0, x.size + 0 * jnp.argmax(x),
                                                  lambda _, c: jnp.sin(c), p["a"]).sum(),
    ],
)  # fmt: skip
def test_python_may_use_values(factor):
    params, x = two_matrices()
    check(lambda p: factor(p, x) * loss(p, x), params)


def test_the_log_tells_why_nothing_is_shared(caplog):
    params, x = two_matrices()
    with caplog.at_level("DEBUG", logger="gnp_optax"):
        shared(lambda p: loss(p, x))(params)
        assert not caplog.records
        shared(lambda p: loss(p, x) * (2.0 if p["a"].sum() > 0 else 3.0))(params)
    assert "TracerBoolConversionError" in caplog.text


@pytest.mark.exhaustive
def test_disable_jit():
    params, x = two_matrices()
    with jax.disable_jit():
        check(jax.jit(loss), params, x)


@pytest.mark.exhaustive(but=["jax_debug_nans"])
@pytest.mark.parametrize(
    "option",
    [
        "jax_enable_checks",
        "jax_debug_nans",
        "jax_debug_infs",
        "jax_check_tracer_leaks",
    ],
)
def test_debugging_options(option):
    params, x = two_matrices()
    jax.config.update(option, True)
    try:
        check(jax.checkpoint(loss), params, x)
    finally:
        jax.config.update(option, False)


def test_an_error_of_the_loss_is_raised_as_it_is():
    params, x = two_matrices()
    with pytest.raises(ZeroDivisionError):
        shared(lambda p: loss(p, x) * (1 / 0))(params)


# Around it


def in_all(params, x, alpha, r, compute):
    value, grads = compute(loss, r, alpha)(params, x)
    return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(grads)) + value


AROUND = {
    "vmap over data": lambda f: jax.vmap(f, (None, 0, None, None)),
    "vmap over params": lambda f: (
        lambda p, x, *a: jax.vmap(f, (0, None, None, None))(
            jax.tree.map(lambda w: jnp.stack([w, 2 * w]), p), x[0], *a
        )
    ),
    "vmap over alpha": lambda f: (
        lambda p, x, a, r: jax.vmap(f, (None, None, 0, None))(p, x[0], a * jnp.arange(3), r)
    ),
    "grad": lambda f: lambda p, x, *a: jax.grad(f, (0, 1, 2, 3))(p, x[0], *a),
    "grad of jit": lambda f: lambda p, x, *a: jax.grad(jax.jit(f), (1, 2, 3))(p, x[0], *a),
    "jvp": lambda f: lambda p, x, *a: jax.jvp(f, (p, x[0], *a), (p, x[1], *a)),
    "checkpoint": lambda f: lambda p, x, *a: jax.grad(jax.checkpoint(f))(p, x[0], *a),
    "cond": lambda f: (
        lambda p, x, *a: lax.cond(a[0] > 0.1, lambda: f(p, x[0], *a), lambda: f(p, x[1], *a))
    ),
    "map": lambda f: lambda p, x, *a: lax.map(lambda row: f(p, row, *a), x),
}


@pytest.mark.exhaustive(but=["grad of jit-True", "vmap over params-True"])
@pytest.mark.parametrize(
    ("name", "jit"),
    [*((name, True) for name in AROUND), ("vmap over data", False), ("grad", False)],
)
def test_inside_another_transformation(name, jit):
    params, x = two_matrices()
    results = []
    for compute in (gnp.value_and_grad, unshared):
        given = functools.partial(compute, mask=MASK)
        run = AROUND[name](functools.partial(in_all, compute=given))
        results.append((jax.jit(run) if jit else run)(params, jnp.stack([x, -x]), 0.7, 0.1))
    assert_same_tree(*results, rtol=1e-11)


def test_scan_over_steps_with_donated_arguments():
    results = []
    for compute in (shared, plain):
        tx = optax.adam(0.1)
        params, x = two_matrices()

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def train(params, state, x, compute=compute, tx=tx):
            def step(carry, _):
                params, state = carry
                value, grads = compute(loss)(params, x)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), value

            return lax.scan(step, (params, state), length=3)

        results.append(train(params, tx.init(params), x))
    assert_same_tree(*results, rtol=1e-10)


def test_a_loss_that_closes_over_traced_arrays_of_its_surroundings():
    params, x = two_matrices()

    def outer(x, s, compute):
        y = jnp.sin(x) * s
        half = jax.jit(lambda p: jnp.tanh(y @ p["a"]))
        return compute(lambda p: jnp.sum(half(p) @ p["b"] * s))(params)[1]["a"].sum()

    for around in (
        lambda f: jax.jit(jax.grad(f, (0, 1))),
        lambda f: jax.jit(jax.vmap(f, (None, 0))),
    ):
        got, expected = (
            around(functools.partial(outer, compute=compute))(x, jnp.arange(1.0, 5.0)[:, None])
            for compute in (shared, plain)
        )
        assert_same_tree(got, expected, rtol=1e-11)


# Inside it


def test_collectives_under_vmap():
    params, x = two_matrices()

    def mean_loss(p, x):
        h = jnp.tanh(x @ p["a"])
        h = h - lax.pmean(h, "batch")
        return lax.psum(loss({**p, "a": p["a"] * lax.axis_index("batch")}, h), "batch")

    got, expected = (
        jax.jit(jax.vmap(compute(mean_loss), (None, 0), axis_name="batch"))(params, x)
        for compute in (shared, plain)
    )
    assert_same_tree(got, expected)


def shard_map(fun, **kwargs):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    if hasattr(jax, "shard_map"):
        return jax.shard_map(fun, mesh=mesh, **kwargs)
    from jax.experimental.shard_map import shard_map

    return shard_map(fun, mesh=mesh, **kwargs)


@pytest.mark.parametrize("around", [False, True])
def test_shard_map_inside_and_around(around):
    params, x = two_matrices()
    spec = jax.sharding.PartitionSpec
    in_specs = (spec(), spec("batch"))

    def mean_loss(p, x):
        return lax.pmean(loss(p, x), "batch")

    def run(compute):
        if around:
            return shard_map(compute(mean_loss), in_specs=in_specs, out_specs=(spec(), spec()))
        return compute(shard_map(mean_loss, in_specs=in_specs, out_specs=spec()))

    got, expected = (jax.jit(run(compute))(params, x) for compute in (shared, plain))
    assert_same_tree(got, expected)


def test_checkify_finds_what_it_checks():
    params, x = two_matrices()

    def checked(p):
        checkify.check(p["a"].sum() < 100, "large")
        return loss(p, x)

    error, got = checkify.checkify(shared(checked))(params)
    assert error.get() is None
    assert_same_tree(got, plain(lambda p: loss(p, x))(params))
    error, _ = checkify.checkify(shared(checked))({**params, "a": params["a"] + 100})
    assert "large" in error.get()


@pytest.mark.exhaustive(but=["True"])
@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="this version has no mutable arrays")
@pytest.mark.parametrize("jit", [False, True])
def test_mutable_arrays(jit):
    params, x = two_matrices()
    count = jax.new_ref(jnp.zeros((), int))

    def fun(p):
        count[...] += 1
        inner = jax.new_ref(p["a"].sum(0))
        inner[...] *= p["b"][0]
        return loss(p, x) + inner[...].sum()

    check(fun, params, jit=jit)
    assert count[...] == 2 + 2
