"""Mixing: from g and g~ to the regularized gradient, `(1 - alpha) g + alpha g~`."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax._core import numerics, perturbation
from gnp_optax._core.convolutions import canonical_convolutions
from gnp_optax._core.perturbation import Gradient, SecondGradient

Found = TypeVar("Found")


def unless_zero(
    alpha: jax.typing.ArrayLike, run: Callable[[], Found], skip: Callable[[], Found]
) -> Found:
    """Return `run()`; where alpha is 0 `skip()`, without the second gradient.

    Decided in Python for a number, by `lax.cond` for a traced alpha.
    """
    if isinstance(alpha, jax.core.Tracer):
        # In a branch, a CPU computes convolutions of any other form slowly.
        found: Found = jax.lax.cond(_is_zero(alpha) == 1, skip, canonical_convolutions(run))
        return found
    return skip() if is_known_to_be(0, alpha) else run()


@jax.custom_jvp
def _is_zero(alpha: jax.Array) -> jax.Array:
    """1 where alpha is 0; but where a derivative with respect to alpha is asked for, 0.

    There it is `g~ - g`, for which both are needed, whatever alpha is.
    """
    return jnp.asarray(alpha == 0, jnp.float32)


@_is_zero.defjvp
def _is_zero_jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[jax.Array, jax.Array]:
    del tangents
    return 2 * (jnp.zeros_like(primals[0], jnp.float32),)


@numerics.promoting
def mixture(
    g: Gradient,
    second: SecondGradient,
    r: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    gap: jax.typing.ArrayLike = 0.0,
) -> Gradient:
    """Return the regularized gradient; g where g~ is not received.

    With a weight of the surrogate gap, `g~ - gap (g - <u, g> u)` takes the place of g~, for
    `u = g~ / ||g~||` over all that receives it.
    """
    if not is_known_to_be(0, gap):
        along = _along(g, second.tilde)  # <u, g> / ||g~||

        def guided(g: jax.Array, tilde: jax.Array) -> jax.Array:
            mixed: Any = (1 + gap * along) * numerics.widen(tilde) - gap * numerics.widen(g)
            return mix(g, mixed, alpha)

        mixed = perturbation.combined(guided, g, second.tilde)
    elif second.curvature is None:
        mixed = perturbation.combined(lambda g, t: mix(g, t, alpha), g, second.tilde)
    else:
        # `g + alpha r H d`: to mix g and g~ would lose the difference in rounding for a small r.
        mixed = perturbation.combined(
            lambda g, h: perturbation.perturb(g, h, alpha * r), g, second.curvature
        )
    first, others = (
        [g if x is None else x for x, g in zip(*pair, strict=True)]
        for pair in zip(mixed, g, strict=True)
    )
    return first, others


@numerics.promoting
def _along(g: Gradient, tilde: Gradient) -> jax.Array:
    """Return `<g~, g> / ||g~||^2` over what receives g~; 0 where that is 0."""
    pairs = zip([*g[0], *g[1]], [*tilde[0], *tilde[1]], strict=True)
    received = [(g, t) for g, t in pairs if t is not None]
    norm = numerics.norm([t for _, t in received])
    # Of the one of norm 1, whose products do not underflow.
    units = numerics.divide([t for _, t in received], norm)
    products = [numerics.product(u, g) for u, (g, _) in zip(units, received, strict=True)]
    return numerics.divide(jnp.asarray(sum(products)), norm)


@numerics.promoting
def mix(g: jax.Array, tilde: jax.Array, alpha: jax.typing.ArrayLike) -> jax.Array:
    """Return `(1 - alpha) g + alpha g~`, computed in float32 or wider, in the type of `g`."""
    if is_known_to_be(1, alpha):
        return tilde.astype(jnp.result_type(g))  # SAM: g need not be kept in memory
    wide = numerics.widen(g)
    a = jnp.asarray(alpha, numerics.real(wide.dtype))
    return ((1 - a) * wide + a * tilde.astype(wide.dtype)).astype(jnp.result_type(g))


def is_known_to_be(number: int, alpha: jax.typing.ArrayLike) -> bool:
    """Whether a weight is this number, and not one that is traced."""
    # In NumPy, since under `jit` a comparison of concrete JAX arrays is staged like any other.
    return not isinstance(alpha, jax.core.Tracer) and bool(np.asarray(alpha) == number)
