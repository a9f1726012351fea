"""Sharpness: how much larger the loss is within some distance."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp_optax import directions
from gnp_optax._core import checks, perturbation, pieces, report, selection
from gnp_optax._core.perturbation import Gradient
from gnp_optax.diagnostics import _dataset, _operands

PyTree = Any
Arrays = list[Any]


class Sharpness(NamedTuple):
    """Scalars of one step of ascent; the surrogate gap is `perturbed_loss - loss`."""

    loss: jax.Array
    perturbed_loss: jax.Array
    surrogate_gap: jax.Array
    grad_norm: jax.Array
    perturbation_norm: jax.Array
    cosine: jax.Array


class MSharpness(NamedTuple):
    """The surrogate gap of every group of examples, (groups,), and their mean."""

    mean: jax.Array
    by_group: jax.Array


def sharpness(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    rho: jax.typing.ArrayLike,
    direction: optax.GradientTransformation | None = None,
    mask: selection.Mask = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> Sharpness:
    """Measure how much the loss grows over one step of ascent: what SAM minimizes.

        L(params + rho * d) - L(params),   d = g / ||g||  by default

    With `direction=gnp.directions.adaptive(eta)` it is adaptive sharpness, which does not change
    when a layer is scaled up and the next one down.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded as they are trained.
        *args: Further arguments of `fun`, such as inputs and labels.
        rho: Radius of the step, in the units of the parameters.
        direction: From the gradient to the ascent direction d; without state. Keep it in a
            variable: for a new one, everything is compiled anew.
        mask: Which leaves are perturbed; the gradient and its norm are of these.
        batch_size: Number of examples that are computed at a time; `None` for all. The gradient and
            both losses are those of all examples in any case.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        `Sharpness(loss, perturbed_loss, surrogate_gap, grad_norm, perturbation_norm, cosine)`. The
        norm of the perturbation is of the change that really happened to the parameters, after
        rounding. The cosine is that between the gradients before and after the step.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If `rho` is negative; if `direction` has state; if the mask selects nothing; if
            the arguments cannot be split.

    Example:
        >>> loss = lambda w: jnp.sum(w**2) / 2
        >>> found = sharpness(loss, jnp.array([3.0, 4.0]), rho=0.5)
        >>> round(float(found.surrogate_gap), 4)  # (5.5**2 - 5**2) / 2
        2.625

    References:
        Foret et al., "Sharpness-Aware Minimization", ICLR 2021, section 2; Zhuang et al.,
        "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022, equation 4; Kwon
        et al., "ASAM", ICML 2021, equation 3.
    """
    checks.check_scalar("rho", rho)
    found = _dataset.measure(
        "sharpness",
        functools.partial(_one_step, direction=checked_direction(direction)),
        fun,
        params,
        args,
        (_operands.scalar(rho),),
        mask=mask,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=2,
    )
    return Sharpness(*found)


def m_sharpness(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    rho: jax.typing.ArrayLike,
    m: int,
    direction: optax.GradientTransformation | None = None,
    mask: selection.Mask = None,
    has_aux: bool = False,
    progress: bool = False,
) -> MSharpness:
    """Measure the sharpness of the loss of every m examples, and take the mean.

    Each group of m examples has its own gradient and step, as on devices that see m examples each.
    Foret et al. find that it predicts generalization better for smaller m. Groups are computed one
    after the other, in the memory of one; group i consists of the examples from `i * m` on.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded as they are trained.
        *args: Further arguments of `fun`, split along the first axis of all their leaves.
        rho: Radius of the step, in the units of the parameters.
        m: Number of examples in a group; it must divide the number of examples.
        direction: From the gradient to the ascent direction, as for `sharpness`.
        mask: Which leaves are perturbed.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts passes over a group, two for each.

    Returns:
        `MSharpness(mean, by_group)`.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If m does not divide the number of examples; if `rho` is negative; if
            `direction` has state; if the mask selects nothing.

    Example:
        >>> loss = lambda w, x: jnp.mean(jnp.abs(x) * w)
        >>> x = jnp.array([1.0, 1.0, 3.0, 3.0])
        >>> found = m_sharpness(loss, jnp.ones([]), x, rho=0.5, m=2)
        >>> float(found.mean), found.by_group.tolist()
        (1.0, [0.5, 1.5])

    References:
        Foret et al., "Sharpness-Aware Minimization", ICLR 2021, section 4.1.
    """
    checks.check_scalar("rho", rho)
    checks.check_integer("m", m, at_least=1)
    size = pieces.batch_size("diagnostics.m_sharpness", args, None)
    if size % m:
        raise ValueError(
            f"{size} examples have no groups of {m}: m must divide their number. Leave "
            f"{size % m} of them out: x[:{size - size % m}]."
        )
    by_group = _dataset.measure(
        "m_sharpness",
        functools.partial(_each_group, direction=checked_direction(direction), m=int(m)),
        fun,
        params,
        args,
        (_operands.scalar(rho),),
        mask=mask,
        batch_size=None,
        has_aux=has_aux,
        progress=progress,
        passes=2 * (size // m),
    )
    return MSharpness(jnp.mean(by_group), by_group)


def checked_direction(
    direction: optax.GradientTransformation | None,
) -> optax.GradientTransformation | None:
    """Return a direction, raising unless it is one or None."""
    if direction is not None:
        checks.check_direction(direction)
    return direction


@functools.partial(jax.jit, static_argnums=0, static_argnames="direction")
def _one_step(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    rho: jax.Array,
    *,
    direction: optax.GradientTransformation | None,
) -> tuple[jax.Array, ...]:
    """Return both losses, their difference, and what a step tells of its second gradient."""
    losses = _dataset.Losses(objective, bar, params, args)
    loss, grads = losses.value_and_grad(losses.perturbed)
    pairs = zip(losses.perturbed, ascent(losses, params, grads, direction), strict=True)
    moved = [perturbation.perturb(w, d, rho) for w, d in pairs]
    perturbed_loss, tilde = losses.value_and_grad(moved)
    second = perturbation.SecondGradient(perturbed_loss, moved, (tilde, []), None)
    g: Gradient = (grads, [])
    seen = report.of(g, report.grad_norm(g), losses.perturbed, second)
    difference = perturbed_loss - loss
    return loss, perturbed_loss, difference, seen.grad_norm, seen.perturbation_norm, seen.cosine


@functools.partial(jax.jit, static_argnums=0, static_argnames=("direction", "m"))
def _each_group(
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
        return _one_step(objective, bar, params, group, rho, direction=direction)[2]

    return jax.lax.map(of_group, groups)


def ascent(
    losses: _dataset.Losses,
    params: PyTree,
    grads: Arrays,
    direction: optax.GradientTransformation | None,
) -> Arrays:
    """Return the direction of ascent of the selected arrays."""
    chosen = directions.normalized() if direction is None else direction
    state = perturbation.empty_state(
        chosen,
        params,
        "a measurement keeps none. Use one without, such as direction=gnp.directions.normalized().",
    )
    found, _ = chosen.update(losses.filled(grads), state, params)
    return losses.parts.divide(found)[0]
