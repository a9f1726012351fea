"""Forty calls that a new user gets wrong: each error has the code to write, and that code runs."""

import flax.training.train_state
import jax
import jax.numpy as jnp
import optax
import pytest

import gnp_optax as gnp
import gnp_optax.linen
from gnp_optax.schedules import every, lambda_warmup, r_warmup, zero_warmup

X, Y = jnp.ones((4, 3)), jnp.ones((4, 1))


def loss_of(params, x, y):
    return jnp.mean((x @ params["body"] @ params["head"] - y) ** 2)


def loss_fn(params, x=X, y=Y):
    """Of a batch, or of the parameters alone."""
    return loss_of(params, x, y)


def names():
    """What the calls below can name: what a user would have at hand."""
    params = {"body": jnp.ones((3, 2)), "head": jnp.ones((2, 1))}
    tx = gnp.sam(0.1)
    return {
        "gnp": gnp,
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "flax": flax,
        "gnp_optax": gnp,
        "every": every,
        "lambda_warmup": lambda_warmup,
        "r_warmup": r_warmup,
        "zero_warmup": zero_warmup,
        "loss_of": loss_of,
        "loss_fn": loss_fn,
        "with_aux": lambda params: (loss_fn(params), {}),
        "params": params,
        "grads": params,
        "x": X,
        "y": Y,
        "optimizer": optax.sgd(0.1),
        "r": 0.1,
        "alpha": 0.8,
        "k": 2,
        "m": 2,
        "total_steps": 100,
        "mask": gnp.masks.by_path("head"),
        "tx": tx,
        "opt_state": tx.init(params),
    }


# The call that is wrong; what its error says to write; and, if that is a part of the right call,
# the right call around it.
CALLS = [
    # As optax.contrib.sam is called, and others that put the optimizer first.
    (
        "gnp.sam(optax.adamw(1e-3), optax.sgd(0.1))",
        "optax.chain(gnp.sam(rho=0.1), optimizer)",
    ),
    (
        "gnp.sam(optimizer, optax.sgd(0.1), sync_period=2, opaque_mode=True)",
        "gnp.sam(rho=0.1, direction=gnp.directions.unnormalized())",
    ),
    (
        "gnp.sam(adv_optimizer=optax.sgd(0.1), optimizer=optimizer)",
        "optax.chain(gnp.sam(rho=0.1), optimizer)",
    ),
    (
        "gnp.gradient_regularization(optimizer, 0.8)",
        "optax.chain(gnp.sam(rho=0.1), optimizer)",
    ),
    # Radius, weight and lambda.
    ("gnp.gradient_regularization(0.1)", "alpha=1.0", "gnp.gradient_regularization(0.1, {})"),
    (
        "gnp.gradient_regularization(0.1, 0.8, lam=0.08)",
        "lam=0.08",
        "gnp.gradient_regularization(0.1, {})",
    ),
    (
        "gnp.gradient_regularization(r=0.0, lam=0.05)",
        "r=0.1, lam=0.05",
        "gnp.gradient_regularization({})",
    ),
    (
        "gnp.gradient_regularization(r=0.1, alpha=r_warmup(0.1, 5))",
        "r=r_warmup(0.1, 5), alpha=0.8",
        "gnp.gradient_regularization({})",
    ),
    (
        "gnp.gradient_regularization(r=zero_warmup(0.8, 5), alpha=0.8)",
        "r=0.1, alpha=zero_warmup(0.8, 5)",
        "gnp.gradient_regularization({})",
    ),
    (
        "gnp.gradient_regularization(r=0.1, lam=r_warmup(0.1, 5))",
        "r=r_warmup(0.1, 5), lam=0.8",
        "gnp.gradient_regularization({})",
    ),
    (
        "gnp.sam(rho=every(2, 0.1))",
        "rho=0.1, alpha=every(2, 0.1)",
        "gnp.sam({})",
    ),
    (
        "gnp.sam(rho=0.1, alpha=r_warmup(0.1, 5))",
        "rho=r_warmup(0.1, 5), alpha=0.8",
        "gnp.sam({})",
    ),
    (
        "every(2, r_warmup(0.1, 5))",
        "r=r_warmup(0.1, 5), alpha=0.8",
        "gnp.gradient_regularization({})",
    ),
    ("every(0.5, 2)", "every(2, 0.5)"),
    ("zero_warmup(0.8, 0.1)", "warmup_steps=round(0.1 * total_steps)", "zero_warmup(0.8, {})"),
    ("lambda_warmup(0.8, 781.2)", "warmup_steps=round(781.2)", "lambda_warmup(0.8, {})"),
    (
        "gnp.value_and_grad(loss_fn, r=r_warmup(0.1, 5), alpha=0.8)",
        "r=r_warmup(0.1, 5)(step)",
        "(lambda step: gnp.value_and_grad(loss_fn, {}, alpha=0.8))(3)",
    ),
    # The loss.
    (
        "gnp.value_and_grad(loss_fn(params, x, y), 0.1, 0.8)",
        "gnp.value_and_grad(loss_fn, r=0.1, alpha=1.0)(params, x, y)",
    ),
    (
        "tx.update(grads, opt_state, params)",
        "tx.update(grads, opt_state, params, value_fn=loss_fn)",
    ),
    (
        "tx.update(grads, opt_state, params, value_fn=loss_of)",
        "tx.update(grads, opt_state, params, value_fn=loss_fn, x=x, y=y)",
    ),
    (
        "tx.update(grads, opt_state, params, value_fn=loss_of, batch=(x, y))",
        "value_fn=lambda params: loss_fn(params, x, y)",
        "tx.update(grads, opt_state, params, {})",
    ),
    (
        "tx.update(grads, opt_state, params, value_fn=loss_fn(params, x, y))",
        "value_fn=lambda params: loss_fn(params, x, y)",
        "tx.update(grads, opt_state, params, {})",
    ),
    (
        "tx.update(grads, opt_state, params, value_fn=lambda: loss_fn(params, x, y))",
        "value_fn=lambda params: loss_fn(params, x, y)",
        "tx.update(grads, opt_state, params, {})",
    ),
    (
        "tx.update(grads, opt_state, params, value_fn=with_aux)",
        "has_aux=True",
        "gnp.sam(0.1, {}).update(grads, opt_state, params, value_fn=with_aux)",
    ),
    (
        "tx.update(grads, opt_state, value_fn=loss_fn)",
        "tx.update(grads, opt_state, params, value_fn=loss_fn)",
    ),
    (
        "tx.update(grads, params, opt_state, value_fn=loss_fn)",
        "tx.update(grads, opt_state, params, value_fn=loss_fn)",
    ),
    # Gradients.
    (
        "tx.update(jax.value_and_grad(loss_fn)(params), opt_state, params, value_fn=loss_fn)",
        "value, grads = jax.value_and_grad(loss_fn)(params)",
    ),
    (
        "tx.update(jax.tree.map(lambda g: jnp.stack([g, g]), grads), opt_state, params, loss_fn)",
        "jax.tree.map(lambda g: g.mean(0), grads)",
    ),
    (
        "tx.update({**grads, 'head': jnp.ones(2)}, opt_state, params, value_fn=loss_fn)",
        "grads = jax.grad(loss_fn)(params)",
    ),
    # Masks.
    (
        "gnp.sam(0.1, mask='head')",
        "mask=gnp.masks.by_path('head')",
        "gnp.sam(0.1, {}).init(params)",
    ),
    (
        "gnp.sam(0.1, mask=gnp.masks.by_path('tail')).init(params)",
        "mask=gnp.masks.by_path('head')",
        "gnp.sam(0.1, {}).init(params)",
    ),
    ("gnp.sam(0.1, mask=True)", "mask=None", "gnp.sam(0.1, {})"),
    (
        "gnp.layerwise_gradient_regularization(0.1, 0.8)",
        "mask=gnp.masks.by_path('^head')",
        "gnp.layerwise_gradient_regularization(0.1, 0.8, {}).init(params)",
    ),
    # Other options.
    (
        "gnp.sam(0.1, direction=gnp.directions.sign)",
        "direction=gnp.directions.normalized()",
        "gnp.sam(0.1, {})",
    ),
    # Wrappers, and what belongs to a framework.
    (
        "optax.MultiSteps(optax.chain(gnp.sam(0.1), optimizer), 2).init(params)",
        "optax.chain(gnp.gradient_regularization(r, alpha), "
        "optax.MultiSteps(optimizer, k).gradient_transformation())",
    ),
    (
        "optax.masked(gnp.sam(0.1), {'body': False, 'head': True}).init(params)",
        "gnp.gradient_regularization(r, alpha, mask=...)",
        "gnp.gradient_regularization(r, alpha, mask=mask)",
    ),
    (
        "optax.inject_hyperparams(gnp.sam)(0.1, mask=mask).init(params)",
        "optax.inject_hyperparams(gnp.sam, static_args=('mask',))(...)",
        "optax.inject_hyperparams(gnp.sam, static_args=('mask',))(0.1, mask=mask).init(params)",
    ),
    (
        "flax.training.train_state.TrainState.create(apply_fn=None, params=params, tx=tx)"
        ".apply_gradients(grads=grads)",
        "gnp_optax.linen.TrainState",
        "{}.create(apply_fn=None, params=params, tx=tx)"
        ".apply_gradients(grads=grads, value_fn=loss_fn)",
    ),
    # Beside the step.
    (
        "gnp.perturbed(params, opt_state)",
        "optax.chain(gnp.momentum_sam(rho=0.1), optax.adamw(1e-3))",
        "gnp.perturbed(params, {}.init(params))",
    ),
    (
        "gnp.batching.m_sharpness(loss_of, m)(params, x, y)",
        "gnp.batching.m_sharpness(gnp.value_and_grad(loss_fn, r, alpha), m)",
        "{}(params, x, y)",
    ),
]


def test_there_are_forty():
    assert len({wrong for wrong, *_ in CALLS}) == 40


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_an_error_says_what_to_write(call):
    wrong, written, *around = call
    with pytest.raises((TypeError, ValueError)) as caught:
        exec(wrong, names())
    assert written in str(caught.value)
    exec(around[0].replace("{}", written) if around else written, names())
