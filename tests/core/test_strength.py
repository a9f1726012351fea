"""Radius and weight: lambda for alpha, SAM with a weight, schedules that know their kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gnp_optax as gnp
from gnp_optax.schedules import delayed, every, lambda_warmup, r_warmup, zero_warmup

X = jnp.array([3.0, 4.0])  # its norm is 5


def loss(x):
    """Half the squared norm: g is x and the Hessian 1, so that GR gives `x + lam x / norm(x)`."""
    return jnp.sum(x**2) / 2


def penalized(lam):
    return X * (1 + lam / 5)


def gradients(tx, steps):
    """The regularized gradient at X of each step."""
    update, state, found = jax.jit(tx.update, static_argnames="value_fn"), tx.init(X), []
    for _ in range(steps):
        g, state = update(X, state, X, value_fn=loss)
        found.append(g)
    return found


@pytest.mark.parametrize(
    ("r", "lam", "expected"),
    [
        (0.5, 0.1, [0.1]),
        # The radius of the first step is 0.
        (r_warmup(0.5, 2), 0.1, [0, 0.1, 0.1]),
        (0.5, lambda_warmup(0.1, 2), [0, 0.05, 0.1]),
        (r_warmup(0.5, 4), every(2, 0.1), [0, 0, 0.1]),
    ],
    ids=repr,
)
def test_lambda_at_every_step(r, lam, expected):
    found = gradients(gnp.gradient_regularization(r, lam=lam), len(expected))
    for g, weight in zip(found, expected, strict=True):
        np.testing.assert_allclose(g, penalized(weight), rtol=1e-5)


def program(fun, *args):
    """What is computed, as text."""
    return str(jax.make_jaxpr(fun)(*args))


def program_of(tx):
    return program(lambda g, state: tx.update(g, state, X, value_fn=loss), X, tx.init(X))


@pytest.mark.parametrize(
    "form",
    [
        lambda **weight: program_of(gnp.gradient_regularization(0.1, **weight)),
        lambda **weight: program_of(
            gnp.layerwise_gradient_regularization(0.1, mask=gnp.masks.by_path(""), **weight)
        ),
        lambda **weight: program(gnp.value_and_grad(loss, 0.1, **weight), X),
        lambda **weight: program(of_module(**weight), X),
    ],
    ids=["transformation", "layer-wise", "value_and_grad", "nnx"],
)
def test_lambda_is_alpha_times_r_in_every_form(form):
    # A weight of 1 is known to be that, by which SAM needs no memory for the first gradient.
    assert form(lam=0.1) == form(alpha=1.0)


def of_module(**weight):
    nnx = pytest.importorskip("flax.nnx")
    graphdef, params = nnx.split(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    gradient = gnp.nnx.value_and_grad(lambda model, x: loss(model(x)), 0.1, **weight)
    return lambda x: gradient(nnx.merge(graphdef, params), x)[1]


def test_a_traced_radius_of_0_leaves_the_gradient_and_its_derivatives_finite():
    @jax.jit
    def norm(r, lam):
        return jnp.linalg.norm(gnp.value_and_grad(loss, r, lam=lam)(X)[1])

    assert float(norm(0.0, 0.1)) == 5
    np.testing.assert_allclose(float(norm(0.5, 0.1)), 5.1, rtol=1e-5)
    assert all(map(np.isfinite, jax.grad(norm, argnums=(0, 1))(0.0, 0.1)))


@pytest.mark.parametrize(
    ("preset", "same"),
    [
        (gnp.sam, gnp.gradient_regularization),
        (
            gnp.asam,
            lambda rho, alpha: gnp.gradient_regularization(
                rho, alpha, direction=gnp.directions.adaptive()
            ),
        ),
        (
            lambda rho, alpha: gnp.gsam(rho, 0.4, alpha=alpha),
            lambda rho, alpha: gnp.gradient_regularization(rho, alpha, surrogate_gap=0.4),
        ),
    ],
    ids=["sam", "asam", "gsam"],
)
def test_a_preset_takes_a_weight(preset, same):
    for alpha in (0.5, zero_warmup(1.0, 1)):
        assert program_of(preset(0.5, alpha=alpha)) == program_of(same(0.5, alpha=alpha))


@pytest.mark.parametrize(
    ("schedule", "kind", "written"),
    [
        (r_warmup(0.1, 5), "radius", "r_warmup(0.1, 5)"),
        (lambda_warmup(0.8, warmup_steps=5), "weight", "lambda_warmup(0.8, 5)"),
        (zero_warmup(0.8, 1e3), "weight", "zero_warmup(0.8, 1000)"),
        (every(2, zero_warmup(0.8, 5)), "weight", "every(2, zero_warmup(0.8, 5))"),
        (delayed(r_warmup(0.1, 5), 5), "radius", "delayed(r_warmup(0.1, 5), 5)"),
        (delayed(lambda_warmup(0.8, 5), 5), "weight", "delayed(lambda_warmup(0.8, 5), 5)"),
    ],
    ids=repr,
)
def test_a_schedule_knows_what_it_is_for(schedule, kind, written):
    assert (schedule.kind, repr(schedule)) == (kind, written)


def test_an_integral_float_is_a_number_of_steps():
    for warmup in (r_warmup, lambda_warmup, zero_warmup):
        assert program(warmup(0.8, 2.0), 1) == program(warmup(0.8, 2), 1)
    assert float(r_warmup(0.8, 0.0)(0)) == pytest.approx(0.8)


def test_a_positional_value_fn_is_right():
    tx = gnp.sam(0.5)
    state = tx.init(X)
    assert program(lambda g: tx.update(g, state, X, loss), X) == program(
        lambda g: tx.update(g, state, X, value_fn=loss), X
    )
