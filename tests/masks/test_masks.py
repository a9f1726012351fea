"""Masks: what they select, and that they are values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.problems import mlp, through_transformation

import gnp_optax as gnp
from gnp_optax import masks

PARAMS = {
    "embed": jnp.ones((4, 2)),
    "blocks": [{"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for _ in range(2)],
    "scale": jnp.ones(()),
}


def selected(mask, params=PARAMS):
    from gnp_optax._core.paths import leaf_paths

    flags = jax.tree.leaves(mask(params))
    return {path for path, flag in zip(leaf_paths(params), flags, strict=True) if flag}


@pytest.mark.parametrize(
    ("regex", "expected"),
    [
        ("bias", {"blocks_0/bias", "blocks_1/bias"}),
        ("^blocks_1/", {"blocks_1/bias", "blocks_1/kernel"}),
        ("embed|scale$", {"embed", "scale"}),
        (".", {"embed", "scale", *(f"blocks_{i}/{n}" for i in (0, 1) for n in ("bias", "kernel"))}),
    ],
)
def test_by_path(regex, expected):
    assert selected(masks.by_path(regex)) == expected


def test_matrices():
    assert selected(masks.matrices()) == {"embed", "blocks_0/kernel", "blocks_1/kernel"}


def test_layers_takes_whole_modules_and_nothing_below_them():
    params = {"a": {"w": 1.0, "b": {"w": 2.0}}, "w": 3.0}
    assert selected(masks.layers("a"), params) == {"a/w"}
    assert selected(masks.layers("a/b", ""), params) == {"a/b/w", "w"}


def test_top_k_layers_ranks_modules_by_the_norm_of_their_own_gradient():
    grads = {
        "a": {"kernel": jnp.full(4, 1.0), "bias": jnp.full(1, 0.0)},  # norm 2
        "b": {"kernel": jnp.full(1, 1.9), "bias": jnp.full(1, 1.9)},  # norm 2.7
        "c": {"inner": {"kernel": jnp.full(1, 2.5)}},  # norm 2.5
        "w": jnp.full(1, 0.1),
    }
    assert masks.top_k_layers(grads, 1) == masks.layers("b")
    assert masks.top_k_layers(grads, 2) == masks.layers("b", "c/inner")
    assert masks.top_k_layers(grads, 3) == masks.layers("a", "b", "c/inner")
    assert masks.top_k_layers(grads, 4) == masks.layers("a", "b", "c/inner", "")


def test_top_k_layers_in_float16_does_not_overflow():
    grads = {"a": {"w": jnp.full(1000, 30.0, jnp.float16)}, "b": {"w": jnp.full(1, 900.0)}}
    assert masks.top_k_layers(grads, 1) == masks.layers("a")  # norm 949


@pytest.mark.parametrize(
    "make",
    [
        lambda: masks.by_path("head"),
        masks.matrices,
        lambda: masks.layers("head"),
        lambda: masks.top_k_layers(jax.grad(mlp()[1])(*[mlp()[i] for i in (0, 2, 3)]), 1),
        lambda: masks.stacked("^blocks", last=2) | masks.by_path("^head"),
        lambda: (
            masks.stacked("^blocks", last=2, axis=1) & ~masks.stacked("^blocks", last=1, axis=1)
        ),
        lambda: ~masks.by_path("^head"),
        lambda: ~(masks.matrices() | masks.layers("head")) & masks.by_path("a"),
        lambda: (masks.by_path("a") | masks.by_path("b")) & ~(masks.matrices() & masks.layers("c")),
    ],
)
def test_masks_are_hashable_values_and_print_as_code(make):
    one, two = make(), make()
    assert one == two
    assert hash(one) == hash(two)
    assert eval(repr(one), vars(masks)) == one


def test_complement_and_intersection():
    params = {"blocks": jnp.zeros((3, 2, 2)), "head": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    stacked, head = masks.stacked("^blocks", last=1), masks.by_path("^head")
    late = stacked | head
    assert ~~late == late
    expected = {"blocks": [True, True, False], "head": False, "bias": True}
    jax.tree.map(np.testing.assert_array_equal, (~late)(params), expected)
    expected = {"blocks": [True, True, False], "head": False, "bias": False}
    both = ~late & masks.matrices()
    jax.tree.map(np.testing.assert_array_equal, both(params), expected)
    assert both == masks.matrices() & ~late
    assert head & (stacked & late) == (late & head) & stacked
    assert masks.matrices() & ~head == masks.matrices() & ~masks.by_path("^head")
    for combine in (lambda: late & True, lambda: late | {"head": True}):
        with pytest.raises(TypeError, match="unsupported operand"):
            combine()


def test_the_order_of_layers_makes_no_difference():
    assert masks.layers("b", "a", "b") == masks.layers("a", "b")


def test_different_masks_differ():
    assert len({masks.by_path("a"), masks.by_path("b"), masks.matrices(), masks.layers("a")}) == 4


def test_paths_are_the_same_for_every_kind_of_key():
    import equinox as eqx
    from flax import nnx
    from flax.core import FrozenDict

    from gnp_optax._core.paths import leaf_paths

    class Pair(eqx.Module):
        layers: tuple
        value: jax.Array

    class Module(nnx.Module):
        def __init__(self):
            nnx_list = getattr(nnx, "List", list)
            self.layers = nnx_list([nnx.Param(jnp.ones(1)), nnx.Param(jnp.ones(1))])
            self.value = nnx.Param(jnp.ones(1))

    expected = {"layers_0", "layers_1", "value"}
    plain = {"layers": (1.0, 2.0), "value": 3.0}
    state = nnx.state(Module(), nnx.Param)
    for tree in (plain, FrozenDict(plain), Pair((1.0, 2.0), 3.0), state):
        assert set(leaf_paths(tree)) == expected
    assert leaf_paths([1.0, {"a": 2.0}]) == ["0", "1/a"]
    assert leaf_paths(1.0) == [""]


def test_partitioned_linen_parameters_have_the_same_paths():
    import flax.linen as nn

    from gnp_optax._core.paths import leaf_paths

    init = nn.with_partitioning(nn.initializers.ones, (None, "model"))
    boxed, plain = (
        nn.Dense(2, kernel_init=kernel_init).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
        for kernel_init in (init, nn.initializers.ones)
    )
    assert leaf_paths(boxed) == leaf_paths(plain) == ["bias", "kernel"]


def test_by_path_fits_an_nnx_state():
    from flax import nnx

    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    mask = masks.by_path("kernel")(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    assert jax.tree.leaves(mask) == [np.shape(leaf) == (2, 3) for leaf in jax.tree.leaves(state)]


STACK = {"blocks": {"kernel": jnp.zeros((3, 2, 2)), "bias": jnp.zeros((3, 2))}, "head": jnp.ones(2)}


def test_stacked_selects_the_last_layers():
    found = masks.stacked("^blocks/", last=2)(STACK)
    for leaf in found["blocks"].values():
        np.testing.assert_array_equal(leaf, [False, True, True])
    assert found["head"] is False


def test_stacked_along_another_axis():
    params = {"blocks": {"kernel": jnp.zeros((2, 3, 2)), "scale": jnp.zeros((4, 3))}}
    two, one = (masks.stacked("^blocks/", last=n, axis=1) for n in (2, 1))
    assert masks.stacked("^blocks/", last=1, axis=0) == masks.stacked("^blocks/", last=1) != one
    for mask, expected in (
        (two, [[False, True, True]]),
        (~one, [[True, True, False]]),
        (two & ~one, [[False, True, False]]),
        (one | masks.by_path("^blocks/"), [[True, True, True]]),
    ):
        for leaf in mask(params)["blocks"].values():
            np.testing.assert_array_equal(leaf, expected)


LONG = {
    "encoder": {"w": jnp.zeros((4, 3, 3)), "keys": jax.random.split(jax.random.key(0), 2)},
    "decoder": {"w": jnp.zeros((2, 3, 3))},
}


@pytest.mark.parametrize(
    ("mask", "params", "message"),
    [
        (  # the last row of a feature axis, in some leaves of 2, in others of 4
            masks.stacked("^b", last=1),
            {"b": {"kernel": jnp.zeros((2, 3, 2)), "scale": jnp.zeros((4, 3))}},
            r"'b/kernel' has the shape \(2, 3, 2\), 'b/scale' has the shape \(4, 3\)\. .* "
            r"along axis 0, .* along axis 1: stacked\('\^b', last=1, axis=1\)\.",
        ),
        (
            masks.stacked("coder/", last=2),
            LONG,
            r"'decoder/w' has .*, 'encoder/w' has .* match each alone, .* "
            r"stacked\('\^encoder/', last=2\) \| stacked\('\^decoder/', last=2\)\.",
        ),
        (masks.stacked("decoder", last=3), LONG, r"along axis 1: .*last=3, axis=1"),
        (masks.stacked("decoder", last=1, axis=3), LONG, r"axis 3.* along axis 0: "),
        (
            masks.stacked("^encoder/", last=1) | masks.stacked("coder/", last=1, axis=1),
            LONG,
            "layers of the same leaf along different axes, 0 and 1",
        ),
    ],
)
def test_stacks_that_do_not_fit(mask, params, message):
    with pytest.raises(ValueError, match=message):
        mask(params)
    masks.stacked("^encoder/", last=4)(LONG)


def test_union_selects_what_either_selects():
    found = (masks.stacked("kernel", last=1) | masks.by_path("bias|head"))(STACK)
    np.testing.assert_array_equal(found["blocks"]["kernel"], [False, False, True])
    assert found["blocks"]["bias"] is True
    assert found["head"] is True


def test_union_is_a_value_in_whatever_order():
    a, b, c = masks.by_path("a"), masks.layers("b"), masks.stacked("c", last=2)
    assert (a | b) | c == c | (b | a)
    assert hash((a | b) | c) == hash(c | (b | a))
    assert repr(c | a) == "by_path('a') | stacked('c', last=2)"
    with pytest.raises(TypeError):
        a | {"a": True}


@pytest.mark.parametrize(
    ("rows", "scope"), [([0, 0, 1], "all"), ([0, 1, 1], "masked"), ([1, 0, 1], "all")]
)
@pytest.mark.usefixtures("x64")
def test_layers_of_a_stack_as_leaves_of_their_own(rows, scope):
    """The same as masking the leaves of a list of layers."""
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(3, 4, 4)) / 2
    x = rng.normal(size=(5, 4))

    def of_list(params):
        h = x
        for kernel in params:
            h = jnp.tanh(h @ kernel)
        return jnp.mean(h**2)

    def of_stack(params):
        return jnp.mean(jax.lax.scan(lambda h, k: (jnp.tanh(h @ k), None), x, params)[0] ** 2)

    def both(form, loss, params, mask):
        if form == "core":
            return gnp.value_and_grad(loss, 0.1, 0.8, mask=mask, scope=scope)(params)[1]
        tx = gnp.gradient_regularization(0.1, 0.8, mask=mask, scope=scope)
        return through_transformation(tx, loss, params)[0]

    chosen = [bool(row) for row in rows]
    for form in ("core", "transformation"):
        expected = jnp.stack(both(form, of_list, list(map(jnp.asarray, kernels)), chosen))
        found = both(form, of_stack, jnp.asarray(kernels), np.array(chosen))
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    along_the_second = jnp.moveaxis(jnp.asarray(kernels), 0, 1)
    moved = both(
        "core",
        lambda params: of_stack(jnp.moveaxis(params, 1, 0)),
        along_the_second,
        np.array([chosen]),
    )
    np.testing.assert_allclose(jnp.moveaxis(moved, 1, 0), expected, rtol=1e-12, atol=1e-14)


def deep(width=64):
    """Eight layers of the same cost: (params, loss of (params, x), x)."""
    params = {f"layer_{i}": {"kernel": jnp.eye(width)} for i in range(8)}

    def loss(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"])
        return jnp.sum(x)

    return params, loss, jnp.ones((512, width))


@pytest.mark.parametrize("earliest", [0, 3, 6])
@pytest.mark.parametrize("scope", ["all", "masked"])
def test_cost_is_that_of_what_follows_the_earliest_layer(earliest, scope):
    params, loss, x = deep()
    mask = masks.layers(f"layer_{earliest}", "layer_7")
    after = 8 - earliest  # each a third forward, a third backward, a third for its kernel
    thirds = 3 * after if scope == "all" else after + (after - 1) + 2
    exact = 1 + thirds / 24
    assert abs(masks.cost(loss, params, mask, x, scope=scope) - exact) < 0.05
    compiled = [
        jax.jit(f).lower(params, x).compile().cost_analysis()["flops"]
        for f in (
            gnp.value_and_grad(loss, 0.1, 0.5, mask=mask, scope=scope),
            jax.value_and_grad(loss),
        )
    ]
    assert abs(masks.cost(loss, params, mask, x, scope=scope) - compiled[0] / compiled[1]) < 0.03


def test_cost_needs_shapes_alone():
    params, loss, x = deep()
    mask = masks.layers("layer_7")
    shapes = jax.eval_shape(lambda: (params, x))
    assert masks.cost(loss, shapes[0], mask, shapes[1]) == masks.cost(loss, params, mask, x)


def test_cost_counts_a_loop_as_often_as_it_runs():
    def loss(params, x):
        def body(h, kernel):
            return jnp.tanh(h @ kernel), None

        h, _ = jax.lax.scan(body, x, params["stack"])
        return jnp.sum((h @ params["head"]) ** 2)

    params = {"stack": jnp.zeros((15, 64, 64)), "head": jnp.zeros((64, 64))}
    x = jnp.zeros((512, 64))
    assert abs(masks.cost(loss, params, masks.by_path("head"), x) - (1 + 1 / 16)) < 0.02


def test_the_last_layers_cost_the_same_along_another_axis():
    def loss(params, x):
        stack = jnp.moveaxis(params["stack"], 1, 0)
        h, _ = jax.lax.scan(lambda h, kernel: (jnp.tanh(h @ kernel), None), x, stack)
        return jnp.sum(h**2)

    params, x = {"stack": jnp.zeros((64, 8, 64))}, jnp.zeros((512, 64))
    cost = masks.cost(loss, params, masks.stacked("^stack", last=2, axis=1), x)
    assert abs(cost - (1 + 2 / 8)) < 0.03


def test_cost_counts_a_mixture_of_experts_as_all_on_all_rows():
    """So JAX has it computed but on a TPU, the rows of the others as zeros."""
    groups = np.full(4, 16)
    params = {f"layer_{i}": jnp.ones((4, 32, 32)) for i in range(3)} | {"head": jnp.ones((32, 8))}
    mask = masks.by_path("head|layer_2")
    own = jnp.repeat(jnp.eye(4), 16, axis=1)[..., None]

    def loss(multiply, params, x):
        for i in range(3):
            x = jnp.tanh(multiply(x, params[f"layer_{i}"]))
        return jnp.sum(x @ params["head"])

    experts, dense = (
        masks.cost(functools.partial(loss, multiply), params, mask, jnp.ones((64, 32)))
        for multiply in (
            lambda x, kernels: jax.lax.ragged_dot(x, kernels, groups),
            lambda x, kernels: jnp.einsum("gni,gio->no", own * x, kernels),
        )
    )
    assert abs(experts - dense) < 0.02


def test_cost_takes_aux_of_any_kind():
    params, loss, x = deep()
    mask = masks.layers("layer_7")

    def with_aux(params, x):
        return loss(params, x), ("a word", None, x @ x.T)

    assert 1 < masks.cost(with_aux, params, mask, x, has_aux=True) < 1.2


def test_budget_takes_the_largest_gradients_that_fit():
    norms = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0}
    grads = {name: {"w": jnp.array([norm])} for name, norm in norms.items()}
    prices = {"a": 0.5, "b": 0.1, "c": 0.3, "d": 0.05}
    asked = []

    def price(mask):
        asked.append(mask)
        return 1 + sum(prices[name] for name in mask.paths)

    def select(k, budget):
        return masks.top_k_layers(grads, k, budget=budget, cost=price)

    assert select(None, 1.2) == masks.layers("b", "d")
    assert select(1, 1.2) == masks.layers("b")
    assert select(None, 2.0) == masks.layers("a", "b", "c", "d")
    assert select(None, 1.05) == masks.layers("d")
    assert all(isinstance(hash(mask), int) for mask in asked)


def test_budget_of_a_real_model():
    params, loss, x = deep()
    grads = jax.grad(loss)(params, x)

    def price(mask):
        return masks.cost(loss, params, mask, x)

    mask = masks.top_k_layers(grads, None, budget=1.3, cost=price)
    assert mask == masks.layers("layer_6", "layer_7")
    assert price(mask) <= 1.3
