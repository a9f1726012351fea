"""Steps of ascent from the parameters, compiled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnp_optax import (
    _dataset,
    _mixing,
    _numerics,
    _perturbation,
    _report,
    directions,
)

PyTree = Any
Arrays = list[Any]
Scalars = tuple[jax.Array, ...]


@functools.partial(jax.jit, static_argnums=0, static_argnames="direction")
def one_step(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    rho: jax.Array,
    *,
    direction: optax.GradientTransformation | None,
) -> Scalars:
    """Return both losses, their difference, and what the package reports of a second pass."""
    losses = _dataset.Losses(objective, bar, params, args)
    loss, grads = losses.value_and_grad(losses.perturbed)
    ascent = _ascent(losses, params, grads, direction)
    moved = [_mixing.perturb(w, d, rho) for w, d in zip(losses.perturbed, ascent, strict=True)]
    perturbed_loss, tilde = losses.value_and_grad(moved)
    gradient: _perturbation.Gradient = (tilde, [])
    second = _perturbation.SecondPass(perturbed_loss, moved, gradient, gradient)
    seen = _report.report((grads, []), losses.perturbed, second)
    difference = perturbed_loss - loss
    return loss, perturbed_loss, difference, seen.grad_norm, seen.perturbation_norm, seen.cosine


@functools.partial(jax.jit, static_argnums=0, static_argnames=("direction", "m"))
def each_group(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    rho: jax.Array,
    *,
    direction: optax.GradientTransformation | None,
    m: int,
) -> jax.Array:
    """Return the difference of the losses for every group of m examples."""
    groups = jax.tree.map(lambda x: x.reshape(-1, m, *x.shape[1:]), args)

    def of_group(group: PyTree) -> jax.Array:
        return one_step(objective, bar, params, group, rho, direction=direction)[2]

    return jax.lax.map(of_group, groups)


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps")
def ascend_in_ball(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    rho: jax.Array,
    step_size: jax.Array,
    eta: jax.Array | None,
    key: jax.Array,
    *,
    steps: int,
) -> tuple[jax.Array, jax.Array, PyTree]:
    """Return the loss, the largest loss seen in the ball, and the perturbation that gave it.

    In coordinates u, `perturbation = T u`, in which the ball is round; T is 1 without `eta`.
    """
    losses = _dataset.Losses(objective, bar, params, args)
    scales = [_scale(w, eta) for w in losses.perturbed]

    def ascent(grads: Arrays) -> Arrays:
        return _normalized([t * jnp.conj(g) for t, g in zip(scales, grads, strict=True)])

    def perturbation(u: Arrays) -> Arrays:
        return [t * x for t, x in zip(scales, u, strict=True)]

    def step(state: Any, length: jax.Array) -> tuple[Any, None]:
        u, up, best, largest = state
        u = _within(rho, [_ahead(a, b, length) for a, b in zip(u, up, strict=True)])
        pairs = zip(losses.perturbed, perturbation(u), strict=True)
        value, grads = losses.value_and_grad([_mixing.perturb(w, d, 1.0) for w, d in pairs])
        is_better = (value > largest) | jnp.isnan(value)
        best = [jnp.where(is_better, a, b) for a, b in zip(u, best, strict=True)]
        return (u, ascent(grads), best, jnp.where(is_better, value, largest)), None

    loss, grads = losses.value_and_grad(losses.perturbed)
    up = ascent(grads)
    # At a critical point there is no way up, but the loss may well grow in all directions.
    is_critical = _numerics.norm(up) == 0
    random = _normalized(losses.random(key, jax.random.normal))
    up = [jnp.where(is_critical, r, u) for r, u in zip(random, up, strict=True)]
    zeros = [jnp.zeros_like(x) for x in up]
    # The first step goes to the boundary; the ones after it get shorter.
    shorter = step_size * (1 - jnp.arange(1, steps, dtype=step_size.dtype) / steps)
    lengths = jnp.append(rho, shorter)
    (_, _, best, largest), _ = jax.lax.scan(step, (zeros, up, zeros, loss), lengths)
    return loss, largest, losses.filled(perturbation(best))


def _ascent(
    losses: _dataset.Losses,
    params: PyTree,
    grads: Arrays,
    direction: optax.GradientTransformation | None,
) -> Arrays:
    ascent = directions.normalized() if direction is None else direction
    found, _ = _perturbation.ascend_without_state(
        optax.with_extra_args_support(ascent),
        losses.filled(grads),
        params,
        "a measurement keeps none. Use one without, such as direction=gnp.directions.normalized().",
    )
    return losses.parts.divide(found)[0]


def _scale(w: jax.Array, eta: jax.Array | None) -> jax.Array:
    real = _numerics.real(_numerics.wide(w.dtype))
    return jnp.ones([], real) if eta is None else jnp.abs(w).astype(real) + eta.astype(real)


def _normalized(arrays: Arrays) -> Arrays:
    normalized: Arrays = _numerics.divide(arrays, _numerics.norm(arrays))
    return normalized


def _ahead(u: jax.Array, up: jax.Array, length: jax.Array) -> jax.Array:
    return u + length.astype(_numerics.real(up.dtype)) * up


@_numerics.promoting
def _within(rho: jax.Array, arrays: Arrays) -> Arrays:
    """Project onto the ball of radius rho."""
    total = _numerics.norm(arrays)
    factor = jnp.where(total > rho, rho / jnp.where(total == 0, 1, total), 1)
    return [x * factor.astype(_numerics.real(x.dtype)) for x in arrays]
