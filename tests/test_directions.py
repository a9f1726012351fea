"""Directions on their own: norms in every type, and zero gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.problems import Quadratic

import gnp_optax as gnp
from gnp_optax import directions


def ascend(direction, grads, params=None):
    return direction.update(grads, direction.init(params), params)[0]


def total_norm(tree):
    return np.sqrt(
        sum(np.sum(np.abs(np.asarray(x, np.complex128)) ** 2) for x in jax.tree.leaves(tree))
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
def test_norm_neither_underflows_nor_overflows(dtype, size):
    """Squares of 1e-4 vanish in float16, and a sum of squares of 30 is infinite there."""
    grads = {"a": jnp.full(1000, size, dtype), "b": jnp.full((3, 5), -size, dtype)}
    got = ascend(directions.normalized(), grads)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    np.testing.assert_allclose(total_norm(got), 1, rtol=1e-5)
    np.testing.assert_allclose(got["a"], 1015**-0.5, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e30, 1e36])
def test_norm_in_float32_at_the_ends_of_its_range(size):
    got = ascend(directions.normalized(), jnp.array([3.0, 4.0], jnp.float32) * jnp.float32(size))
    np.testing.assert_allclose(got, [0.6, 0.8], rtol=1e-5)


def test_norm_of_leaves_of_all_shapes_and_types():
    """Those of one type and shape, which are reduced together, and others."""
    key = jax.random.key(0)
    shapes = [(), (), (3,), (3,), (3,), (4,), (0,), (0,), (2, 3), (2, 3), (2, 2, 2)]
    types = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
    grads = [jax.random.normal(key, shape).astype(dtype) for shape in shapes for dtype in types]
    size = total_norm(grads)
    got = ascend(directions.normalized(), grads)
    for g, d in zip(grads, got, strict=True):
        np.testing.assert_allclose(d, np.conj(np.asarray(g, np.complex64)) / size, rtol=1e-5)


def test_a_norm_in_float64_that_is_zero_in_float32(x64):
    grads = {"narrow": jnp.zeros(2, jnp.float32), "wide": jnp.array([3e-50, 4e-50])}
    got = ascend(directions.normalized(), grads)
    assert got["narrow"].dtype == jnp.float32
    np.testing.assert_array_equal(got["narrow"], 0)
    np.testing.assert_allclose(got["wide"], [0.6, 0.8])


@pytest.mark.parametrize("direction", [directions.normalized(), directions.adaptive(0.0)])
def test_zero_gradient_gives_zero_direction(direction):
    params = {"a": jnp.ones(3), "b": jnp.zeros(())}
    got = ascend(direction, jax.tree.map(jnp.zeros_like, params), params)
    assert total_norm(got) == 0


@pytest.mark.parametrize("direction", [directions.normalized(), directions.adaptive()])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_gives_no_finite_step(direction, value):
    """Else the leaves that are finite would be perturbed by their whole gradient."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    got = ascend(direction, {"a": jnp.array([1.0, value]), "b": jnp.ones(2)}, params)
    assert np.isnan(got["a"][1])
    assert total_norm(got["b"]) == 0 or np.isnan(got["b"]).all()


@pytest.mark.parametrize("direction", [directions.normalized(), directions.adaptive(0.0)])
def test_complex_ascent_is_the_steepest(direction):
    """`jax.grad` returns the conjugate of the direction of steepest ascent."""
    params = jnp.array([1.0 + 0.0j, 0.0 + 1.0j], jnp.complex64)
    target = jnp.array([2.0 + 3.0j, -1.0 + 1.0j], jnp.complex64)

    def loss(z):
        return jnp.sum(jnp.abs(z - target) ** 2)

    d = ascend(direction, jax.grad(loss)(params), params)
    # Here |z| = 1, so that both directions are (z - target) / ||z - target||.
    expected = (params - target) / jnp.linalg.norm(params - target)
    np.testing.assert_allclose(d, expected, rtol=1e-6)


def test_adaptive_direction_is_invariant_under_rescaling():
    """Scaling a weight up scales its gradient down and its perturbation up by the same factor."""
    rng = np.random.default_rng(0)
    w, g, scale = rng.normal(size=(3, 5)).astype(np.float32)
    one = ascend(directions.adaptive(0.0), jnp.asarray(g), jnp.asarray(w))
    two = ascend(directions.adaptive(0.0), jnp.asarray(g / scale), jnp.asarray(w * scale))
    np.testing.assert_allclose(two, one * scale, rtol=1e-5)


LAYERS = {"body": {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}, "head": jnp.array([-2.0])}


def test_unnormalized_is_the_gradient():
    got = ascend(directions.unnormalized(), LAYERS)
    jax.tree.map(np.testing.assert_array_equal, got, LAYERS)


def test_per_layer_moves_every_layer_by_the_same_distance():
    got = ascend(directions.per_layer(), LAYERS)
    np.testing.assert_allclose(got["body"]["w"], [3 / 13, 4 / 13], rtol=1e-6)
    np.testing.assert_allclose(got["body"]["b"], [12 / 13], rtol=1e-6)
    np.testing.assert_allclose(got["head"], [-1], rtol=1e-6)
    np.testing.assert_allclose(total_norm(got), 2**0.5, rtol=1e-6)


def test_sign_is_the_worst_in_the_maximum_norm():
    got = ascend(directions.sign(), {**LAYERS, "still": jnp.zeros(2)})
    assert [x.tolist() for x in jax.tree.leaves(got)] == [[1], [1, 1], [-1], [0, 0]]
    complex_one = ascend(directions.sign(), jnp.array([3.0 - 4.0j], jnp.complex64))
    np.testing.assert_allclose(complex_one, [0.6 + 0.8j], rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.0, 0.6, 1.0])
def test_friendly_in_closed_form_over_four_steps(x64, sigma):
    rng, decay = np.random.default_rng(0), 0.7
    direction = directions.friendly(sigma, decay)
    state = direction.init(jnp.zeros(5))
    mean = None
    for _ in range(4):
        g = rng.normal(size=5)
        own = g if mean is None else g - sigma * mean
        got, state = direction.update(jnp.asarray(g), state)
        np.testing.assert_allclose(got, own / np.linalg.norm(own), atol=1e-14)
        mean = g if mean is None else decay * mean + (1 - decay) * g
        np.testing.assert_allclose(state.mean, mean, atol=1e-14)


def test_friendly_in_a_transformation_sees_the_steps_that_are_skipped():
    loss = lambda w: jnp.sum(w**3)  # noqa: E731
    tx = gnp.gradient_regularization(
        0.1, gnp.schedules.zero_warmup(1.0, 1), direction=directions.friendly(0.5, 0.9)
    )
    params = jnp.array([1.0, 2.0])
    _, state = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
    np.testing.assert_allclose(state.direction_state.mean, [3, 12])
    moved = params - 0.1
    g = jax.grad(loss)(moved)
    updates, _ = tx.update(g, state, moved, value_fn=loss)
    own = np.asarray(g) - 0.5 * np.array([3, 12])
    np.testing.assert_allclose(
        updates, 3 * (moved + 0.1 * own / np.linalg.norm(own)) ** 2, rtol=1e-5
    )


@pytest.mark.parametrize(
    "direction",
    [directions.unnormalized, directions.per_layer, directions.sign, directions.friendly],
)
def test_the_family_of_a_zero_gradient_and_of_narrow_leaves(direction):
    params = {"a": jnp.ones(3, jnp.float16), "b": jnp.zeros(())}
    got = ascend(direction(), jax.tree.map(jnp.zeros_like, params), params)
    assert total_norm(got) == 0
    small = ascend(direction(), jax.tree.map(lambda w: jnp.full_like(w, 1e-4), params), params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(small))
    assert 0 < total_norm(small) < 3


def test_squares_of_the_norm_are_penalized_without_normalization(x64):
    """alpha above 1, as in reinforcement learning: `g + lambda H g` of a quadratic."""
    problem = Quadratic()
    g = problem.gradient(problem.vector)
    _, got = gnp.value_and_grad(problem.loss, 1e-3, 30.0, direction=directions.unnormalized())(
        problem.params
    )
    np.testing.assert_allclose(problem.flat(got), g + 0.03 * problem.hessian @ g, rtol=1e-9)
