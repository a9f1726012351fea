"""What a step tells of its second gradient."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnp_optax._core import numerics
from gnp_optax._core.perturbation import Gradient, SecondGradient

PyTree = Any
Arrays = list[Any]


class Report(NamedTuple):
    """Float32 scalars, NaN where no perturbed pass ran."""

    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_loss: jax.Array
    cosine: jax.Array


@numerics.promoting
def of(g: Gradient, perturbed: Arrays, second: SecondGradient) -> Report:
    """Report a second gradient, given the first and what was perturbed, as it was before."""
    every = [*g[0], *g[1]]
    both = zip(every, [*second.tilde[0], *second.tilde[1]], strict=True)
    pairs = [(g, t) for g, t in both if t is not None]
    first, tilde = zip(*pairs, strict=True)
    gradient = [g for g in every if _is_gradient(g)]
    grad_norm = numerics.norm(gradient)
    measured = Report(
        grad_norm=grad_norm,
        perturbation_norm=numerics.distance(second.moved, perturbed),
        perturbed_loss=second.loss,
        cosine=_cosine(
            first,
            tilde,
            grad_norm if len(first) == len(gradient) else numerics.norm(first),
            numerics.norm(tilde),
        ),
    )
    return Report(*(jnp.asarray(x, jnp.float32) for x in measured))


def not_run(grads: PyTree = ()) -> Report:
    """Report that no perturbed pass ran.

    Inside `shard_map` the branches of a `cond` must vary over the same mesh axes. So the NaNs are
    made from the gradient, by sums of zeros that XLA folds away.
    """
    inexact = [g for g in jax.tree.leaves(grads) if _is_gradient(g)]
    zero = sum(jnp.sum(jnp.zeros_like(g, jnp.float32)) for g in inexact)
    return Report(*(jnp.asarray(zero + jnp.nan, jnp.float32) for _ in Report._fields))


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
