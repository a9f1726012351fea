"""Parameters of every kind: right numbers, in the types that came in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.problems import Quadratic, through_transformation

import gnp_optax as gnp


def sum_of_squares(tree):
    """`sum |w|^2 / 2`: the gradient is w, so that `g_reg = (1 + lambda / ||w||) w`."""
    return sum(jnp.sum(jnp.abs(x.astype(jnp.promote_types(x.dtype, jnp.float32))) ** 2) / 2
               for x in map(jnp.asarray, jax.tree.leaves(tree)))  # fmt: skip


def regularized(params, r=0.5, alpha=0.2, **kwargs):
    """g_reg by the transformation, under jit; the core must give the same."""
    tx = gnp.gradient_regularization(r, alpha, **kwargs)

    @jax.jit
    def update(params):
        return through_transformation(tx, sum_of_squares, params)

    updates, state = update(params)
    _, core = jax.jit(gnp.value_and_grad(sum_of_squares, r, alpha, **kwargs))(params)
    jax.tree.map(np.testing.assert_array_equal, updates, core)
    return updates, state


def expect(params, got, factor, rtol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(params)
    jax.tree.map(lambda w, g: np.testing.assert_allclose(g, factor * w, rtol=rtol), params, got)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    kernel: jax.Array
    bias: jax.Array


def trees():
    from flax import nnx
    from flax.core import FrozenDict

    class Module(nnx.Module):
        def __init__(self):
            self.a = nnx.Param(jnp.array([3.0]))
            self.b = nnx.Param(jnp.array([[4.0]]))

    a, b = jnp.array([3.0]), jnp.array([[4.0]])
    return {
        "dict": {"x": {"a": a}, "b": b},
        "tuple": (a, (b,)),
        "list": [a, [b]],
        "dataclass": Dense(kernel=b, bias=a),
        "FrozenDict": FrozenDict({"x": {"a": a}, "b": b}),
        "NNX State": nnx.state(Module(), nnx.Param),
        "None leaves": {"a": a, "none": None, "b": (b, None)},
        "empty subtrees": {"a": a, "empty": {}, "b": [b, ()]},
        "array": jnp.array([3.0, 4.0]),
    }


@pytest.mark.parametrize("kind", trees())
def test_every_kind_of_tree(kind):
    params = trees()[kind]  # of norm 5
    got, state = regularized(params)
    expect(params, got, 1 + 0.1 / 5)
    np.testing.assert_allclose(state.perturbation_norm, 0.5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in trees() if kind != "array"])
def test_every_kind_of_tree_with_a_mask_of_the_same_kind(kind):
    params = trees()[kind]
    mask = jax.tree.map(lambda x: x.ndim == 2, params)  # the leaf with 4
    got, _ = regularized(params, mask=mask, scope="masked")
    expected = jax.tree.map(lambda x: (1 + 0.1 / 4 if x.ndim == 2 else 1) * x, params)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-6), got, expected)


def test_a_mask_may_be_a_prefix():
    params = {"body": {"a": jnp.array([3.0]), "b": (jnp.array([4.0]),)}, "head": jnp.array([9.0])}
    for mask in ({"body": True, "head": False}, {"body": {"a": True, "b": True}, "head": False}):
        got, _ = regularized(params, mask=mask, scope="masked")
        expect(params["body"], got["body"], 1 + 0.1 / 5)
        expect(params["head"], got["head"], 1)


def test_a_mask_may_be_a_callable_module():
    """An `eqx.Module` of bools is a pytree of bools, though it can be called."""
    import equinox as eqx

    model = eqx.nn.Linear(1, 1, key=jax.random.key(0))
    params = eqx.tree_at(lambda m: (m.weight, m.bias), model, (jnp.ones((1, 1)), jnp.ones(1)))
    mask = eqx.tree_at(lambda m: (m.weight, m.bias), params, (True, False))
    got, _ = regularized(params, mask=mask, scope="masked")
    np.testing.assert_allclose([got.weight.item(), got.bias.item()], [1.1, 1], rtol=1e-6)


@pytest.mark.parametrize("params", [jnp.array(2.0), 2.0, np.float32(2.0)])
def test_a_single_scalar(params):
    got, _ = regularized(params)
    np.testing.assert_allclose(got, 2.1, rtol=1e-6)
    assert jnp.shape(got) == ()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 1.7])
def test_zero_gradient(alpha):
    params = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    got, state = regularized(params, alpha=alpha)
    expect(params, got, 0)
    assert [float(x) for x in state[2:]] == [0, 0, 0, 0, 1]


def test_zero_radius_is_the_plain_gradient_and_a_second_pass():
    params = {"a": jnp.array([3.0, 4.0])}
    got, state = regularized(params, r=0.0, alpha=0.8)
    expect(params, got, 1)
    assert float(state.perturbation_norm) == 0
    np.testing.assert_allclose(state.cosine, 1, rtol=1e-6)


def test_zero_weight_is_bit_for_bit_the_plain_gradient():
    params = {"a": jnp.array([0.1, -0.3]), "b": jnp.array(1e-30)}
    plain = jax.grad(sum_of_squares)(params)
    for alpha in (0, 0.0, jnp.zeros(()), lambda step: jnp.zeros(())):
        tx = gnp.gradient_regularization(0.1, alpha)
        got, state = through_transformation(tx, sum_of_squares, params)
        jax.tree.map(np.testing.assert_array_equal, got, plain)
        np.testing.assert_allclose(state.grad_norm, optax.tree.norm(plain), rtol=1e-6)
        assert [float(x) for x in state[3:]] == [0, 0, 1, 0]
        if not callable(alpha):
            _, core = gnp.value_and_grad(sum_of_squares, 0.1, alpha)(params)
            jax.tree.map(np.testing.assert_array_equal, core, plain)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_an_array_as_weight_is_a_number_under_jit_too(alpha):
    """Closed over by a jitted step, it is concrete, though arithmetic on it is traced."""
    params = jnp.array([3.0, 4.0])
    weight = jnp.asarray(alpha)
    expected, _ = regularized(params, alpha=alpha)
    for given in (weight, lambda step: weight):
        tx = gnp.gradient_regularization(0.5, given)
        got, _ = jax.jit(lambda p, tx=tx: through_transformation(tx, sum_of_squares, p))(params)
        np.testing.assert_array_equal(got, expected)
    _, core = jax.jit(lambda p: gnp.value_and_grad(sum_of_squares, 0.5, weight)(p))(params)
    np.testing.assert_array_equal(core, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("alpha", [0.2, lambda step: jnp.asarray(0.2)], ids=["number", "schedule"])
def test_half_precision_leaves_keep_their_type(dtype, alpha):
    params = {"half": jnp.array([3.0], dtype), "full": jnp.array([4.0])}
    tx = gnp.gradient_regularization(0.5, alpha)
    got, state = jax.jit(lambda p: through_transformation(tx, sum_of_squares, p))(params)
    assert {name: leaf.dtype for name, leaf in got.items()} == {"half": dtype, "full": jnp.float32}
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(got["half"]), [3 * 1.02], rtol=2 * eps)
    np.testing.assert_allclose(got["full"], [4 * 1.02], rtol=1e-5)
    assert all(x.dtype == jnp.float32 for x in state[2:-1])


def test_report_is_computed_in_float32_for_half_precision():
    """In bfloat16, the sum of 4096 products would stop at 256."""
    params = jnp.ones(4096, jnp.bfloat16)
    _, state = through_transformation(gnp.sam(64.0), sum_of_squares, params)
    np.testing.assert_allclose(state.grad_norm, 64, rtol=1e-6)
    np.testing.assert_allclose(state.perturbation_norm, 64, rtol=1e-6)
    np.testing.assert_allclose(state.cosine, 1, rtol=1e-6)


@pytest.mark.parametrize("jit", [True, False])
def test_perturbation_norm_is_that_of_the_rounded_parameters(jit):
    """In bfloat16, 1 + 1e-3 is 1: nothing moves, and the state says so."""
    params = jnp.ones(4, jnp.bfloat16)
    tx = gnp.sam(2e-3)  # 1e-3 on each of the four

    def update(p):
        return through_transformation(tx, sum_of_squares, p)

    _, state = (jax.jit(update) if jit else update)(params)
    assert float(state.perturbation_norm) == 0
    _, state = through_transformation(gnp.sam(2e-2), sum_of_squares, params)
    np.testing.assert_allclose(state.perturbation_norm, 2 * 2**-7, rtol=1e-6)


def test_complex_leaves_converge_to_the_exact_penalty():
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3), jnp.complex64)
    params = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3), jnp.complex64)
    lam = 0.5

    def loss(z):
        return jnp.sum(jnp.abs(z**2 - target) ** 2)

    def penalized(z):
        return loss(z) + lam * jnp.sqrt(jnp.sum(jnp.abs(jax.grad(loss)(z)) ** 2))

    exact = jax.grad(penalized)(params)
    r = 1e-3
    _, got = gnp.value_and_grad(loss, r, lam / r)(params)
    np.testing.assert_allclose(got, exact, rtol=1e-2)
    assert got.dtype == jnp.complex64


def test_integer_leaves_pass_through_the_transformation():
    params = {"w": jnp.array([3.0, 4.0]), "count": jnp.array(7)}
    tx = gnp.gradient_regularization(0.5, 0.2)
    grads = jax.grad(lambda p: sum_of_squares(p["w"]), allow_int=True)(params)
    got, _ = tx.update(grads, tx.init(params), params, value_fn=lambda p: sum_of_squares(p["w"]))
    np.testing.assert_allclose(got["w"], [3.06, 4.08], rtol=1e-6)
    assert got["count"].dtype == jax.dtypes.float0


def test_updates_of_another_type_than_the_parameters_keep_theirs():
    params = jnp.array([3.0, 4.0], jnp.bfloat16)
    tx = gnp.gradient_regularization(0.5, 0.2)
    got, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(params), params, value_fn=sum_of_squares)
    assert got.dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_mixed_float32_and_float64():
    params = {"a": jnp.array([3.0], jnp.float32), "b": jnp.array([4.0], jnp.float64)}
    got, state = regularized(params)
    assert (got["a"].dtype, got["b"].dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(got["b"], [4 * 1.02], rtol=1e-7)
    assert state.perturbed_loss.dtype == jnp.float32


def test_state_keeps_its_layout_and_types():
    """So that a step is compiled once, `lax.scan` carries it, and a checkpoint fits any mask."""
    problem = Quadratic()
    params = jax.tree.map(lambda x: x.astype(jnp.float32), problem.params)
    layouts = set()
    for mask in (None, gnp.masks.by_path("head")):
        for alpha in (0.5, 0.0, gnp.schedules.zero_warmup(0.5, 1)):
            tx = gnp.gradient_regularization(0.1, alpha, mask=mask)
            states = [tx.init(params)]
            for _ in range(2):
                _, state = tx.update(problem.params, states[-1], params, value_fn=problem.loss)
                states.append(state)
            for state in states:
                leaves = jax.tree.leaves(state)
                assert not any(leaf.weak_type for leaf in leaves)
                avals = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
                layouts.add((jax.tree.structure(state), avals))
    assert len(layouts) == 1


def test_params_that_need_no_gradient_reach_the_loss_as_they_are():
    """`optax.tree.map_params` works: `init` does no arithmetic on the placeholder it is given."""
    tx = optax.chain(gnp.sam(0.1, mask=gnp.masks.by_path("a")), optax.adam(1e-3))
    state = tx.init({"a": jnp.ones(2)})
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    np.testing.assert_array_equal(optax.tree_utils.tree_get(doubled, "mu")["a"], 1)


@pytest.mark.parametrize("form", ["core", "transformation"])
@pytest.mark.parametrize("curvature", ["finite_difference", "exact"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_strict_promotion(dtype, curvature, form, x64):
    """Users who forbid JAX to mix types get the same numbers."""
    params = {"body": jnp.arange(1, 4, dtype=dtype), "head": jnp.ones(1, jnp.float32)}
    kwargs = {"direction": gnp.directions.adaptive(), "curvature": curvature}

    def loss(params):
        return sum(jnp.sum(w.astype(jnp.float64) ** 2) for w in params.values())

    def compute():
        if form == "core":
            return gnp.value_and_grad(loss, 0.1, 0.8, **kwargs)(params)
        tx = gnp.gradient_regularization(0.1, optax.constant_schedule(0.8), **kwargs)
        return through_transformation(tx, loss, params)

    expected = compute()
    with jax.numpy_dtype_promotion("strict"):
        got = compute()
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("mask", [None, {"a": True, "b": False}])
def test_aux_may_hold_anything(mask):
    """Also in `jit`, where each pass calls what was traced once."""
    params, given = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}, np.arange(2)

    def fun(params):
        return sum_of_squares(params), {"doubled": 2 * params["a"], "of": given, "name": "squares"}

    @jax.jit
    def step(params):
        (value, aux), grads = gnp.value_and_grad(fun, 0.5, 0.2, mask=mask, has_aux=True)(params)
        assert aux["name"] == "squares"
        assert aux["of"] is given
        return value, aux["doubled"], grads

    value, doubled, grads = step(params)
    (same_value, aux), same = gnp.value_and_grad(fun, 0.5, 0.2, mask=mask, has_aux=True)(params)
    np.testing.assert_allclose(value, same_value)
    np.testing.assert_array_equal(doubled, aux["doubled"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), grads, same)


@pytest.mark.parametrize("curvature", ["finite_difference", "exact"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_aux_is_handed_over_as_it_is_with_weakly_typed_parameters(alpha, curvature):
    """As a `jnp.asarray(1.0)` is, and a Python number."""
    given = {"of": np.array([2**40 + 1, 3]), "mean": np.float64(0.1), "count": 2}

    def fun(params):
        return params["scale"] * params["rate"] * sum_of_squares(params["w"]), given

    params = {"scale": jnp.asarray(1.0), "rate": 2.0, "w": {"a": jnp.ones(3)}}
    gradient = gnp.value_and_grad(fun, 0.1, alpha, curvature=curvature, has_aux=True)

    def check(params):
        (_, aux), grads = gradient(params)
        assert {name: id(x) for name, x in aux.items()} == {k: id(x) for k, x in given.items()}
        return grads

    jax.tree.map(np.testing.assert_array_equal, check(params), jax.jit(check)(params))


def test_the_value_can_be_differentiated_where_the_gradient_cannot():
    """The derivative of this square is a loop, which has none in reverse."""

    @jax.custom_vjp
    def square(x):
        return x * x

    def backward(x, t):
        def add(carry):
            return carry[0] + 1, carry[1] + x * t

        return jax.lax.while_loop(lambda carry: carry[0] < 2, add, (0, 0 * x))[1:]

    square.defvjp(lambda x: (x * x, x), backward)
    gradient = gnp.value_and_grad(lambda p, x: jnp.sum(square(p * x)), 0.1, 0.5)
    p, x = jnp.ones(3), jnp.arange(1.0, 4.0)
    got = jax.grad(lambda x: gradient(p * x, x)[0])(x)
    np.testing.assert_allclose(got, 4 * x**3, rtol=1e-6)  # of (p x^2)^2 = x^4


@pytest.mark.parametrize("mask", [None, {"a": True, "b": False}])
def test_a_loss_that_sees_values_in_python(mask):
    """Without `jit` it may, also inside `jax.grad`."""

    def fun(params):
        return sum_of_squares(params) if params["a"] > 0 else 0.0

    def value(params):
        return gnp.value_and_grad(fun, 0.5, 0.2, mask=mask)(params)[0]

    params = {"a": jnp.array(3.0), "b": jnp.array(1.0)}
    expect(params, jax.grad(value)(params), 1.0)
