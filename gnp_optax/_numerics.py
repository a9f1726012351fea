"""Arithmetic that is safe in every floating-point type."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the type to compute in for leaves of `dtype`: float32, or wider where the leaf is."""
    return jnp.promote_types(dtype, jnp.float32)


def widen(leaf: jax.typing.ArrayLike) -> jax.Array:
    """Return the leaf in the type to compute in."""
    return jnp.asarray(leaf, wide(jnp.result_type(leaf)))


def real(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the real type of the same width: float32 for complex64, float64 for complex128."""
    return jnp.finfo(dtype).dtype


def is_inexact(leaf: object) -> bool:
    """Tell whether a leaf can be differentiated and perturbed: floating point or complex."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


def norm(leaves: Sequence[jax.Array]) -> jax.Array:
    """Euclidean norm over all elements of all leaves, in float32 or wider.

    The elements are divided by the largest before they are squared, so that neither a float16
    gradient of 1e-4 nor a float32 gradient of 1e-25 underflows to 0, and 1e25 does not overflow.
    In float32 that holds for norms from 1e-37 to 1e37. NaN and infinity stay what they are.
    """
    leaves = [widen(x) for x in leaves]
    if not leaves:
        return jnp.zeros([], jnp.float32)
    # The barrier keeps XLA from fusing the maxima of a hundred leaves into every one of the sums,
    # which would take it longer to compile than the network.
    maxima = jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in leaves])
    largest = jax.lax.optimization_barrier(maxima).max()
    # A larger scale would have a reciprocal below the normal numbers, which is flushed to 0.
    scale = jnp.minimum(jnp.where(largest == 0, 1, largest), 0.5 / jnp.finfo(largest.dtype).tiny)
    total = sum(_sum_of_squares(x / scale.astype(real(x.dtype))) for x in leaves)
    return scale * jnp.sqrt(total)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.abs(x) if jnp.iscomplexobj(x) else x))


def divide(x: jax.Array, total: jax.Array) -> jax.Array:
    """Divide a leaf by a norm, in the leaf's wide type; 0 where the norm is 0."""
    x = widen(x)
    return x / jnp.where(total == 0, 1, total).astype(real(x.dtype))


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Cast to `dtype`, surely rounding.

    XLA may drop a cast to bfloat16 that is followed by a cast back to float32
    (`xla_allow_excess_precision`); it may not drop `reduce_precision`.
    """
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits:
        info = jnp.finfo(dtype)
        x = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype)
