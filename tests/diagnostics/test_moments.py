"""Statistics of adaptive optimizers against NumPy, whatever the optimizer is wrapped in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gnp_optax.diagnostics import adaptive_statistics

SHAPES = {"a": (3,), "b": (2, 2)}


def gradients(steps=4, seed=0):
    rng = np.random.default_rng(seed)
    return [{n: jnp.asarray(rng.normal(size=s)) for n, s in SHAPES.items()} for _ in range(steps)]


def state_after(optimizer, steps=4):
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    state = optimizer.init(params)
    for grads in gradients(steps):
        _, state = optimizer.update(grads, state, params)
    return state


def flat(grads):
    return np.concatenate([np.ravel(grads[name]) for name in SHAPES]).astype(float)


def moving_average(values, decay):
    total = np.zeros_like(values[0])
    for value in values:
        total = decay * total + (1 - decay) * value
    return total


def check(state, v, psi, **kwargs):
    found = adaptive_statistics(state, **kwargs)
    expected = (np.linalg.norm(v), psi.mean(), psi.var(), np.log(psi).var())
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_adam():
    v = moving_average([flat(g) ** 2 for g in gradients()], 0.99)
    state = state_after(optax.adamw(1e-3, b2=0.99, eps=1e-3))
    check(state, v, 1 / (np.sqrt(v / (1 - 0.99**4)) + 1e-3), b2=0.99, eps=1e-3)


@pytest.mark.parametrize("centered", [False, True])
def test_rmsprop(centered):
    v = moving_average([flat(g) ** 2 for g in gradients()], 0.9)
    mean = moving_average([flat(g) for g in gradients()], 0.9)
    state = state_after(optax.rmsprop(1e-3, centered=centered))
    check(state, v, 1 / np.sqrt(v - centered * mean**2 + 1e-8))


def test_amsgrad():
    """Large gradients first, so that the largest second moment is not the last one."""
    optimizer = optax.amsgrad(1.0, b1=0.0, b2=0.5, eps=1e-3)
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    for g in ([3.0, 1.0], [0.1, 2.0], [0.1, 0.5]):
        updates, state = optimizer.update({"w": jnp.array(g)}, state, params)
    psi = -np.asarray(updates["w"]) / np.array([0.1, 0.5])
    found = adaptive_statistics(state, b2=0.5, eps=1e-3)
    np.testing.assert_allclose(found[1:3], (psi.mean(), psi.var()), rtol=1e-4)


@pytest.mark.parametrize(
    "optimizer", [optax.adabelief(1e-3), optax.novograd(1e-3)], ids=["belief", "novograd"]
)
def test_another_kind_of_second_moment_is_an_error(optimizer):
    with pytest.raises(TypeError, match=r"is not known\. Those of adam"):
        adaptive_statistics(state_after(optimizer))


ADAM = optax.adam(1e-3)


@pytest.mark.parametrize(
    "wrapped",
    [
        optax.chain(optax.clip_by_global_norm(1e9), ADAM, optax.scale(2.0)),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        optax.MultiSteps(ADAM, 1),
        optax.masked(ADAM, {"a": True, "b": True}),
        optax.partition({"a": ADAM, "b": ADAM}, {"a": "a", "b": "b"}),
        optax.apply_if_finite(ADAM, 3),
    ],
    ids=["chain", "inject_hyperparams", "MultiSteps", "masked", "partition", "apply_if_finite"],
)
def test_a_wrapped_optimizer_has_the_same_statistics(wrapped):
    np.testing.assert_allclose(
        adaptive_statistics(state_after(wrapped)),
        adaptive_statistics(state_after(ADAM)),
        rtol=1e-4,
    )


def test_only_the_leaves_of_a_mask_count():
    state = state_after(optax.masked(ADAM, {"a": True, "b": False}))
    v = moving_average([flat(g)[:3] ** 2 for g in gradients()], 0.999)
    check(state, v, 1 / (np.sqrt(v / (1 - 0.999**4)) + 1e-8))


def test_before_the_first_step_nothing_is_infinite():
    statistics = jax.jit(adaptive_statistics)(state_after(ADAM, steps=0))
    assert statistics.second_moment_norm == 0
    np.testing.assert_allclose(statistics.learning_rate_mean, 1e8)


def test_moments_of_low_precision_are_read_in_float32():
    moments = {"w": jnp.full(100, 3e-3, jnp.float16)}
    statistics = adaptive_statistics(optax.ScaleByRmsState(nu=moments))
    np.testing.assert_allclose(statistics.learning_rate_mean, 1 / np.sqrt(3e-3), rtol=1e-3)
    assert statistics.learning_rate_mean.dtype == jnp.float32


def test_an_optimizer_without_a_second_moment_is_an_error():
    with pytest.raises(ValueError, match=r"no second moment in this state.*optax\.adamw"):
        adaptive_statistics(state_after(optax.sgd(0.1, momentum=0.9)))
