"""Losses at points away from the parameters, compiled."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gnp_optax import _dataset, _layout, _mixing, _numerics

PyTree = Any
Arrays = list[Any]


@functools.partial(jax.jit, static_argnums=0)
def losses_at(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    directions: tuple[PyTree, ...],
    points: jax.Array,
) -> jax.Array:
    """Return the losses (n,) at points (n, len(directions)) in the basis of the directions."""
    losses = _dataset.Losses(objective, bar, params, args)
    basis = [losses.parts.divide(direction)[0] for direction in directions]

    def at(point: jax.Array) -> jax.Array:
        steps = [_combination(point, list(axes)) for axes in zip(*basis, strict=True)]
        pairs = zip(losses.perturbed, steps, strict=True)
        return losses.value([_mixing.perturb(w, d, 1.0) for w, d in pairs])

    # One after the other: `vmap` would keep as many networks in memory.
    return jax.lax.map(at, points)


@functools.partial(jax.jit, static_argnums=0)
def losses_between(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    start: PyTree,
    args: PyTree,
    end: PyTree,
    positions: jax.Array,
) -> jax.Array:
    """Return the losses (n,) at positions (n,) on the line from `start` to `end`."""
    losses = _dataset.Losses(objective, bar, start, args)
    pairs = list(zip(losses.perturbed, losses.parts.divide(end)[0], strict=True))

    def at(position: jax.Array) -> jax.Array:
        return losses.value([_between(a, b, position) for a, b in pairs])

    return jax.lax.map(at, positions)


@functools.partial(jax.jit, static_argnums=0)
def filter_normalized(layout: _layout.Layout, key: jax.Array, params: PyTree) -> PyTree:
    """Return a random direction whose filters have the norms of the parameters' filters."""
    parts = _layout.divided(layout, params)
    perturbed, others = parts.divide(params)
    keys = jax.random.split(key, len(perturbed))
    triples = zip(keys, perturbed, _layout.shardings_of(layout, parts), strict=True)
    drawn = [_layout.place(_filters(k, w), sharding) for k, w, sharding in triples]
    return parts.unite(drawn, [jnp.zeros_like(w) for w in others])


def _between(start: jax.Array, end: jax.Array, position: jax.Array) -> jax.Array:
    # A mixture, not a step from the start, so that both ends are exact.
    wide = _mixing.mix(_numerics.widen(start), _numerics.widen(end), position)
    return _numerics.round_to(wide, start.dtype)


@_numerics.promoting
def _combination(point: jax.Array, axes: Arrays) -> jax.Array:
    wide = [_numerics.widen(axis) for axis in axes]
    total = sum(
        x.astype(_numerics.real(axis.dtype)) * axis for x, axis in zip(point, wide, strict=True)
    )
    return jnp.asarray(total)


@_numerics.promoting
def _filters(key: jax.Array, w: jax.Array) -> jax.Array:
    drawn = _dataset.draw(jax.random.normal, key, w)
    if jnp.ndim(w) < 2:
        return jnp.zeros_like(drawn)
    target, length = (_length(_numerics.widen(x)) for x in (w, drawn))
    return drawn * (target / jnp.where(length == 0, 1, length))


def _length(x: jax.Array) -> jax.Array:
    """Return the norm of every filter, an array that broadcasts over the filters."""
    within = tuple(range(x.ndim - 1))
    return jnp.sqrt(jnp.sum(jnp.real(x * jnp.conj(x)), axis=within, keepdims=True))
