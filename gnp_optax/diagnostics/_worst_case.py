"""The largest loss within some distance."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnp_optax._core import checks, numerics, selection
from gnp_optax._core.perturbation import perturb
from gnp_optax.diagnostics import _dataset, _operands
from gnp_optax.diagnostics._embedding import Embedding, normal

PyTree = Any
Arrays = list[Any]


class WorstCase(NamedTuple):
    """Both losses, `perturbed_loss - loss`, and the perturbation, a tree like the parameters."""

    loss: jax.Array
    perturbed_loss: jax.Array
    surrogate_gap: jax.Array
    perturbation: PyTree


def worst_case_sharpness(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    rho: jax.typing.ArrayLike,
    steps: int = 100,
    step_size: jax.typing.ArrayLike | None = None,
    eta: jax.typing.ArrayLike | None = None,
    key: jax.Array | None = None,
    mask: selection.Mask = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> WorstCase:
    """Search the ball of radius rho for the largest loss.

        max  L(params + delta) - L(params)   over   ||T^-1 delta|| <= rho

    with `T = 1`, or `T = abs(params) + eta` elementwise for adaptive sharpness. Normalized gradient
    ascent, projected onto the ball, from the perturbation of `sharpness` (or, where the gradient is
    zero, from a random one) in steps that get shorter; the best point seen counts. So it finds at
    least what one step of ascent does, and its result is a lower bound of the maximum.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded as they are trained.
        *args: Further arguments of `fun`, such as inputs and labels.
        rho: Radius of the ball, in the units of the parameters; with `eta`, relative to them.
        steps: Number of steps, each one gradient; one is `sharpness`. Take more of them until the
            result stops growing: 20 may miss a quarter of it.
        step_size: Length of the second step, in the units of rho, which is the default; it falls
            linearly to 0.
        eta: Added to the magnitudes in T; `None` for a ball that is round.
        key: Random key, for where the gradient is zero; default `jax.random.key(0)`.
        mask: Which leaves are perturbed.
        batch_size: Number of examples that are computed at a time; `None` for all.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        `WorstCase(loss, perturbed_loss, surrogate_gap, perturbation)`, with zeros in the
        perturbation where the mask selects nothing. Parameters of low precision are rounded after
        they are perturbed.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If a number is negative; if the mask selects nothing; if the arguments cannot be
            split.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda w: (3 * w[0] ** 2 + w[1] ** 2) / 2
        >>> found = worst_case_sharpness(loss, jnp.array([0.0, 0.1]), rho=1.0, steps=50)
        >>> one_step = 0.605 - 0.005  # from 0.1 to 1.1 along the second axis
        >>> bool(found.surrogate_gap >= one_step)
        True

    References:
        Foret et al., "Sharpness-Aware Minimization", ICLR 2021; Kwon et al., "ASAM", ICML 2021;
        Andriushchenko et al., "A Modern Look at the Relationship between Sharpness and
        Generalization", ICML 2023.
    """
    checks.check_scalar("rho", rho)
    checks.check_integer("steps", steps, at_least=1)
    for name, number in (("step_size", step_size), ("eta", eta)):
        if number is not None:
            checks.check_scalar(name, number)
    radius = _operands.scalar(rho)
    key = jax.random.key(0) if key is None else key
    found = _dataset.measure(
        "worst_case_sharpness",
        functools.partial(_ascend_in_ball, steps=int(steps)),
        fun,
        params,
        args,
        (
            radius,
            radius if step_size is None else _operands.scalar(step_size),
            None if eta is None else _operands.scalar(eta),
            _operands.checked_key("worst_case_sharpness", key),
        ),
        mask=mask,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=steps + 1,
    )
    return WorstCase(*found)


@functools.partial(jax.jit, static_argnums=0, static_argnames="steps")
def _ascend_in_ball(
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
) -> tuple[jax.Array, jax.Array, jax.Array, PyTree]:
    """Return the loss, the largest seen in the ball, how much it grew, and the perturbation.

    In embedded coordinates u, `perturbation = T u`, in which the ball is round.
    """
    losses = _dataset.Losses(objective, bar, params, args)
    embedding = Embedding(losses.perturbed, losses.shardings)
    scale = 1.0 if eta is None else embedding.embed([_scale(w, eta) for w in losses.perturbed])
    random = _normalized(embedding.random(key, normal))

    def ascent(grads: Arrays) -> jax.Array:
        up = scale * embedding.embed([jnp.conj(g) for g in grads])
        # At a critical point there is no way up, but the loss may well grow in all directions.
        return jnp.where(numerics.norm([up]) == 0, random, _normalized(up))

    def step(state: Any, length: jax.Array) -> tuple[Any, jax.Array]:
        u, up, best, largest = state
        u = _within(rho, u + length.astype(u.dtype) * up)
        pairs = zip(losses.perturbed, embedding.restore(scale * u), strict=True)
        value, grads = losses.value_and_grad([perturb(w, d, 1.0) for w, d in pairs])
        is_better = (value > largest) | jnp.isnan(value)
        best = jnp.where(is_better, u, best)
        return (u, ascent(grads), best, jnp.where(is_better, value, largest)), value

    loss = jax.eval_shape(losses.value, losses.perturbed)
    zeros, lowest = jnp.zeros_like(random), jnp.full([], -jnp.inf, loss.dtype)
    # The first step stays where it is, the next goes to the boundary, those after it get shorter.
    shorter = step_size * (1 - jnp.arange(1, steps, dtype=step_size.dtype) / steps)
    lengths = jnp.concatenate([jnp.stack([jnp.zeros_like(rho), rho]), shorter])
    (_, _, best, largest), values = jax.lax.scan(step, (zeros, zeros, zeros, lowest), lengths)
    perturbation = losses.filled(embedding.restore(scale * best))
    return values[0], largest, largest - values[0], perturbation


def _scale(w: jax.Array, eta: jax.Array) -> jax.Array:
    wide = jnp.abs(numerics.widen(w))
    scale = wide + eta.astype(wide.dtype)
    return jax.lax.complex(scale, scale) if jnp.iscomplexobj(w) else scale


def _normalized(u: jax.Array) -> jax.Array:
    normalized: jax.Array = numerics.divide(u, numerics.norm([u]))
    return normalized


@numerics.promoting
def _within(rho: jax.Array, u: jax.Array) -> jax.Array:
    """Project onto the ball of radius rho."""
    length = numerics.norm([u])
    factor = jnp.where(length > rho, rho / jnp.where(length == 0, 1, length), 1)
    return u * factor.astype(u.dtype)
