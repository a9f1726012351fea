"""What a step tells of its second gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnp_optax._core import numerics
from gnp_optax._core.perturbation import Gradient, SecondGradient

Arrays = list[Any]


class Report(NamedTuple):
    """What a step tells: float32 scalars, finite where the gradients are, and a bool.

    The norm and the cosine are over the leaves under the mask: what a loss computes before the
    first of them is differentiated once, so that elsewhere the two gradients are never apart.

    Attributes:
        grad_norm: `||g||`.
        perturbation_norm: Norm of the change that happened to the parameters, after rounding.
        perturbed_loss: `L(theta + eps)`.
        cosine: Cosine between g and g~; 0 where one of them is 0.
        perturbed: Whether a second pass ran. Where none did, the three before it are 0, `L(theta)`
            and 1.
    """

    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_loss: jax.Array
    cosine: jax.Array
    perturbed: jax.Array


# The public home, which is also where a pickled report looks for it.
Report.__module__ = "gnp_optax"


def empty() -> Report:
    """Report that there was no step."""
    zero, one = (jnp.full([], x, jnp.float32) for x in (0, 1))
    return Report(zero, zero, zero, one, jnp.zeros([], bool))


@numerics.promoting
def grad_norm(g: Gradient) -> jax.Array:
    """Return the norm of a gradient."""
    return numerics.norm([x for x in [*g[0], *g[1]] if _is_gradient(x)])


@numerics.promoting
def of(g: Gradient, norm: jax.Array, perturbed: Arrays, second: SecondGradient) -> Report:
    """Report a second gradient, given the first, its norm, and what was perturbed, as it was."""
    every = [*g[0], *g[1]]
    both = zip(every, [*second.tilde[0], *second.tilde[1]], strict=True)
    pairs = [(g, t) for g, t in both if t is not None]
    first, tilde = zip(*pairs, strict=True)
    of_first = norm if len(first) == sum(map(_is_gradient, every)) else numerics.norm(first)
    distance = numerics.distance(second.moved, perturbed)
    cosine = _cosine(first, tilde, of_first, numerics.norm(tilde))
    measured = [jnp.asarray(x, jnp.float32) for x in (norm, distance, second.loss, cosine)]
    return Report._make([*measured, jnp.ones([], bool)])


def of_perturbed(g: Gradient, perturbed: Arrays, second: SecondGradient) -> Report:
    """Report a second gradient over what is perturbed alone."""
    own: Gradient = g[0], []
    return of(own, grad_norm(own), perturbed, second._replace(tilde=(second.tilde[0], [])))


def not_run(norm: jax.Array, loss: jax.Array | None = None) -> Report:
    """Report a step without a second pass, given the norm of its gradient, and its loss if known.

    Inside `shard_map` the branches of a `cond` must vary over the same mesh axes. So what is
    constant is made from the norm.
    """
    norm = jnp.asarray(norm, jnp.float32)
    zero, one = jnp.zeros_like(norm), jnp.ones_like(norm)
    loss = zero if loss is None else jnp.asarray(loss, jnp.float32)
    return Report(norm, zero, loss, one, jnp.zeros([], bool))


def _is_gradient(g: Any) -> bool:
    # For an integer leaf it is missing, integer or of type float0.
    return g is not None and numerics.is_inexact(g)


def _cosine(
    first: Sequence[jax.Array],
    second: Sequence[jax.Array],
    first_norm: jax.Array,
    second_norm: jax.Array,
) -> jax.Array:
    """Cosine of the angle between two gradients of known norms; 0 where one of them is 0.

    In float32 for norms from 1e-18 to 1e18: the leaves are not normalized before they are
    multiplied, since the copies would be kept in memory through the second pass.
    """
    products = (numerics.product(a, b) for a, b in zip(first, second, strict=True))
    total = jnp.asarray(sum(products))
    return numerics.divide(numerics.divide(total, first_norm), second_norm)
