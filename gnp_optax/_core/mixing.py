"""Mixing: from g and g~ to the regularized gradient, `(1 - alpha) g + alpha g~`."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax._core import numerics, perturbation
from gnp_optax._core.perturbation import Gradient, SecondGradient

Found = TypeVar("Found")


def unless_zero(
    alpha: jax.typing.ArrayLike, run: Callable[[], Found], skip: Callable[[], Found]
) -> Found:
    """Return `run()`; where alpha is 0 `skip()`, without the second gradient.

    Decided in Python for a number, by `lax.cond` for a traced alpha.
    """
    if isinstance(alpha, jax.core.Tracer):
        found: Found = jax.lax.cond(alpha == 0, skip, run)
        return found
    return skip() if is_known_to_be(0, alpha) else run()


def mixture(
    g: Gradient, second: SecondGradient, r: jax.typing.ArrayLike, alpha: jax.typing.ArrayLike
) -> Gradient:
    """Return the regularized gradient; g where g~ is not received."""
    if second.curvature is None:
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
