"""Arithmetic that is safe in every floating-point type."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
T = TypeVar("T")
PyTree = Any


def promoting(fun: Callable[P, T]) -> Callable[P, T]:
    """Let `fun` mix types, also for users who forbid it to their own code.

    They set `jax.numpy_dtype_promotion("strict")`; here, what to compute in is decided by leaf.
    """

    @functools.wraps(fun)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.numpy_dtype_promotion("standard"):
            return fun(*args, **kwargs)

    return wrapped


@promoting
def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the type to compute in for leaves of `dtype`: float32, or wider where the leaf is."""
    return wider(jnp.dtype(dtype), jnp.dtype(jnp.float32))


@promoting
def wider(first: jnp.dtype, second: jnp.dtype) -> jnp.dtype:
    """Return a type that holds what either does; types of 8 bits JAX promotes to none."""
    for one, other in ((first, second), (second, first)):
        if _is_tiny(one) and one != other:
            return wider(jnp.dtype(jnp.bfloat16), other)
    return jnp.promote_types(first, second)


def _is_tiny(dtype: jnp.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 16


def widen(leaf: jax.typing.ArrayLike) -> jax.Array:
    """Return the leaf in the type to compute in."""
    return jnp.asarray(leaf, wide(jnp.result_type(leaf)))


def real(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the real type of the same width: float32 for complex64, float64 for complex128."""
    return jnp.finfo(dtype).dtype


def is_inexact(leaf: object) -> bool:
    """Tell whether a leaf can be differentiated and perturbed: floating point or complex."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))


@promoting
def norm(leaves: Sequence[jax.Array]) -> jax.Array:
    """Euclidean norm over all elements of all leaves, in float32 or wider.

    The elements are divided by the largest before they are squared, so that neither a float16
    gradient of 1e-4 nor a float32 gradient of 1e-25 underflows to 0, and 1e25 does not overflow.
    In float32 that holds for norms from 1e-37 to 1e37. NaN and infinity stay what they are.
    """
    return _norm([(jnp.abs(x), x) for (x,) in _together(map(widen, leaves))])


@promoting
def distance(to: Sequence[jax.Array], start: Sequence[jax.Array]) -> jax.Array:
    """Euclidean norm of the difference, as safe as `norm`."""
    pairs = _together(map(widen, to), map(widen, start))
    # Once b - a and once a - b: XLA would keep one difference that is used twice in memory.
    return _norm([(jnp.abs(b - a), a - b) for a, b in pairs])


def _together(*leaves: Iterable[jax.Array]) -> list[tuple[jax.Array, ...]]:
    """Return the corresponding leaves in tuples, and small ones of one type stacked.

    Biases and scales are most leaves of a network, and few of its elements. Each alone would be two
    more reductions for XLA to compile. Large ones would be copied, and gathered from the devices.
    """
    groups: dict[Any, list[tuple[jax.Array, ...]]] = {}
    for i, each in enumerate(zip(*leaves, strict=True)):
        group = tuple(map(jax.typeof, each)) if each[0].size < 4096 else i
        groups.setdefault(group, []).append(each)
    return [
        group[0] if len(group) == 1 else tuple(_gather(list(x)) for x in zip(*group, strict=True))
        for group in groups.values()
    ]


def _norm(leaves: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Norm of the second of each pair; the first is its absolute values."""
    if not leaves:
        return jnp.zeros([], jnp.float32)
    largest = jnp.max(_gather([jnp.max(magnitude, initial=0) for magnitude, _ in leaves]))
    # A larger scale would have a reciprocal below the normal numbers, which is flushed to 0.
    scale = jnp.minimum(jnp.where(largest == 0, 1, largest), 0.5 / jnp.finfo(largest.dtype).tiny)
    return scale * jnp.sqrt(jnp.sum(_gather([_sum_of_squares(x / scale) for _, x in leaves])))


def _gather(scalars: list[jax.Array]) -> jax.Array:
    # The barrier stops XLA from fusing a hundred reductions into whatever uses the result, which
    # took it longer to compile than the network.
    return jax.lax.optimization_barrier(jnp.stack(scalars))


def _sum_of_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.real(x * jnp.conj(x)))


@promoting
def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Real scalar product of two leaves, in float32 or wider."""
    # A sum of products, not `vdot`: XLA fuses it, and it does not flatten a sharded leaf.
    return jnp.sum(jnp.real(jnp.conj(widen(a)) * widen(b)))


@promoting
def divide(tree: PyTree, total: jax.Array) -> PyTree:
    """Divide all leaves by a norm, in their wide types; 0 where the norm is 0."""
    divisor = jnp.where(total == 0, 1, total)

    def quotient(x: jax.Array) -> jax.Array:
        x = widen(x)
        # A float64 norm of 1e-50 would be 0 in the float32 of another leaf.
        return (x / divisor).astype(x.dtype)

    return jax.tree.map(quotient, tree)


def round_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Cast to `dtype`, surely rounding.

    XLA may drop a cast to bfloat16 that is followed by a cast back to float32
    (`xla_allow_excess_precision`); it may not drop `reduce_precision`.
    """
    if _is_tiny(jnp.dtype(dtype)):
        # Those without infinities `reduce_precision` does not know.
        return jax.lax.optimization_barrier(x.astype(dtype))
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < jnp.finfo(x.dtype).bits:
        info = jnp.finfo(dtype)
        x = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    return x.astype(dtype)
