"""The arithmetic of a leaf: perturbing and mixing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax import _numerics

Arrays = list[Any]


@_numerics.promoting
def perturbed_type(w: jax.Array, dtype: jax.typing.DTypeLike | None) -> jnp.dtype:
    """Return the type in which a leaf is perturbed: its own, or `dtype` if that is wider."""
    own = jnp.result_type(w)
    return own if dtype is None else jnp.promote_types(own, dtype)


def is_retyped(perturbed: Arrays, dtype: jax.typing.DTypeLike | None) -> bool:
    """Whether a leaf is perturbed in another type than its own."""
    return any(perturbed_type(w, dtype) != jnp.result_type(w) for w in perturbed)


@_numerics.promoting
def perturb(
    w: jax.Array,
    d: jax.Array,
    r: jax.typing.ArrayLike,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Return `w + r d`, computed in float32 or wider and rounded to `dtype`, by default w's."""
    wide = jnp.asarray(w, perturbed_type(_numerics.widen(w), dtype))
    step = jnp.asarray(r, _numerics.real(wide.dtype)) * jnp.asarray(d, wide.dtype)
    return _numerics.round_to(wide + step, jnp.result_type(w) if dtype is None else dtype)


@_numerics.promoting
def mix(g: jax.Array, tilde: jax.Array, alpha: jax.typing.ArrayLike) -> jax.Array:
    """Return `(1 - alpha) g + alpha g~`, computed in float32 or wider, in the type of `g`."""
    if is_known_to_be(1, alpha):
        return tilde.astype(jnp.result_type(g))  # SAM: g need not be kept in memory
    wide = _numerics.widen(g)
    a = jnp.asarray(alpha, _numerics.real(wide.dtype))
    return ((1 - a) * wide + a * tilde.astype(wide.dtype)).astype(jnp.result_type(g))


def is_known_to_be(number: int, alpha: jax.typing.ArrayLike) -> bool:
    """Whether a weight is this number, and not one that is traced."""
    # In NumPy, since under `jit` a comparison of concrete JAX arrays is staged like any other.
    return not isinstance(alpha, jax.core.Tracer) and bool(np.asarray(alpha) == number)
