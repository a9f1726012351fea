"""Masks: what they select, and that they are values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import mlp

from gnp_optax import masks

PARAMS = {
    "embed": jnp.ones((4, 2)),
    "blocks": [{"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for _ in range(2)],
    "scale": jnp.ones(()),
}


def selected(mask, params=PARAMS):
    from gnp_optax._paths import leaf_paths

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
    ],
)
def test_masks_are_hashable_values_and_print_as_code(make):
    one, two = make(), make()
    assert one == two
    assert hash(one) == hash(two)
    assert eval(f"masks.{one!r}") == one


def test_the_order_of_layers_makes_no_difference():
    assert masks.layers("b", "a", "b") == masks.layers("a", "b")


def test_different_masks_differ():
    assert len({masks.by_path("a"), masks.by_path("b"), masks.matrices(), masks.layers("a")}) == 4


def test_paths_are_the_same_for_every_kind_of_key():
    import equinox as eqx
    from flax import nnx
    from flax.core import FrozenDict

    from gnp_optax._paths import leaf_paths

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

    from gnp_optax._paths import leaf_paths

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
