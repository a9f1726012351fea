"""Perturbing and mixing: the one implementation beneath every public function.

With g the gradient at theta, `eps = r * direction(g)` on the selected leaves and g~ the gradient at
theta + eps, `g_reg = (1 - alpha) g + alpha g~` on the leaves that `scope` names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax

from gnp_optax import _checks, _loss, _mixing, _numerics, _selection, directions

PyTree = Any
Arrays = list[Any]
Point = tuple[Arrays, Arrays]  # what is perturbed, and the rest
Gradient = tuple[Arrays, Arrays]  # of the same
Seen = TypeVar("Seen")


class Loss(Protocol):
    """A loss of what is perturbed and of what is not."""

    def __call__(self, perturbed: Arrays, others: Arrays, /) -> tuple[jax.Array, Any]:
        """Return the scalar loss and anything else."""


class SecondPass(NamedTuple):
    """The loss, what is perturbed as it was there, g~ (None where it is not received) and g_reg."""

    value: jax.Array
    moved: Arrays
    tilde: Gradient
    regularized: Gradient


def resolve_direction(
    direction: optax.GradientTransformation | None,
    mask: _selection.Mask,
    scope: str,
    curvature: str,
    perturb_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """Check the arguments that every public form shares, and fill in the default direction."""
    _checks.check_scope(scope)
    _checks.check_curvature(curvature)
    _checks.check_perturb_dtype(perturb_dtype, curvature)
    _selection.check_mask(mask)
    direction = directions.normalized() if direction is None else direction
    _checks.check_direction(direction)
    return optax.with_extra_args_support(direction)


def ascend_without_state(
    direction: optax.GradientTransformationExtraArgs, grads: PyTree, params: PyTree, advice: str
) -> tuple[PyTree, Any]:
    """Return the direction of ascent and its state, or raise with the advice if there is one."""
    state = direction.init(params)
    if jax.tree.leaves(state):
        raise ValueError(f"This direction has a state, and {advice}")
    return direction.update(grads, state, params)


def regularize(
    grads: Gradient,
    *,
    ascend: Callable[[Arrays], tuple[Arrays, Any]],
    second_pass: Callable[[Arrays], SecondPass],
    observe: Callable[[SecondPass | None], Seen],
    alpha: jax.typing.ArrayLike,
) -> tuple[Gradient, Any, Seen]:
    """Return `g_reg` for the gradient `grads`, of what is perturbed and of the rest.

    Where alpha is 0, `grads` come back as they are and there is no second pass: decided in Python
    for a number, by `lax.cond` for a traced alpha.

    Args:
        grads: The gradient, in two lists.
        ascend: From the gradient of what is perturbed to its direction of ascent and a state.
        second_pass: From the direction to g~ and g_reg.
        observe: What to keep of the second pass; it is given None where there was none.
        alpha: Weight of the perturbed gradient.

    Returns:
        `g_reg` in the structure and dtypes of `grads`, the state of `ascend`, and what `observe`
        kept.
    """

    def skip() -> tuple[Gradient, Any, Seen]:
        # The state of a direction sees every gradient; of one without state, nothing remains.
        _, state = ascend(grads[0])
        return grads, state, observe(None)

    def run() -> tuple[Gradient, Any, Seen]:
        direction, state = ascend(grads[0])
        second = second_pass(direction)
        return second.regularized, state, observe(second)

    if isinstance(alpha, jax.core.Tracer):
        return jax.lax.cond(alpha == 0, skip, run)
    return skip() if _mixing.is_known_to_be(0, alpha) else run()


def typed(loss: Loss, point: Point, dtype: jax.typing.DTypeLike | None) -> Loss:
    """Return the loss as it is to be computed where leaves are perturbed in at least `dtype`."""
    return loss if _mixing.is_retyped(point[0], dtype) else _loss.at_types(loss, *point)


def finite_difference(
    gradient_at: Callable[[Arrays, Arrays], tuple[jax.Array, Gradient]],
    point: Point,
    grads: Gradient,
    r: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    dtype: jax.typing.DTypeLike | None,
) -> Callable[[Arrays], SecondPass]:
    """Return the second pass that takes g~ at the perturbed parameters, of at least `dtype`.

    `gradient_at(perturbed, others)` is the loss and g~, with None for what does not receive it.
    """
    perturbed, others = point

    def second_pass(direction: Arrays) -> SecondPass:
        moved = [
            _mixing.perturb(w, d, r, _mixing.perturbed_type(w, dtype))
            for w, d in zip(perturbed, direction, strict=True)
        ]
        value, tilde = gradient_at(moved, others)
        mixed = _combined(lambda g, t: _mixing.mix(g, t, alpha), grads, tilde)
        return SecondPass(value, moved, tilde, _filled(mixed, grads))

    return second_pass


def extrapolation(
    product: Callable[[Arrays], tuple[jax.Array, Gradient]],
    perturbed: Arrays,
    grads: Gradient,
    r: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
) -> Callable[[Arrays], SecondPass]:
    """Return the second pass that takes `g~ = g + r H d`; `product(d)` is the loss and `H d`.

    Then `g_reg = g + alpha r H d`, and is computed so: mixing g and g~ would lose the difference
    in rounding when r is small.
    """

    def second_pass(direction: Arrays) -> SecondPass:
        tangents = [
            jnp.asarray(d, jnp.result_type(w)) for d, w in zip(direction, perturbed, strict=True)
        ]
        value, change = product(tangents)
        # In float32 or wider: in the type of the gradient it would be g, for a small r.
        tilde = _combined(lambda g, h: _mixing.perturb(_numerics.widen(g), h, r), grads, change)
        ahead = _combined(lambda g, h: _mixing.perturb(g, h, alpha * r), grads, change)
        return SecondPass(value, perturbed, tilde, _filled(ahead, grads))

    return second_pass


def _combined(
    combine: Callable[[Any, jax.Array], jax.Array], grads: Gradient, received: Gradient
) -> Gradient:
    """Combine two gradients, where the second is received and not None."""
    first, second = (
        [None if x is None else combine(g, x) for g, x in zip(*pair, strict=True)]
        for pair in zip(grads, received, strict=True)
    )
    return first, second


def _filled(regularized: Gradient, grads: Gradient) -> Gradient:
    """Put the gradient where no regularized one is received."""
    first, second = (
        [g if x is None else x for x, g in zip(*pair, strict=True)]
        for pair in zip(regularized, grads, strict=True)
    )
    return first, second


def hessian_product(
    loss: Loss, point: Point, scope: str
) -> Callable[[Arrays], tuple[jax.Array, Gradient]]:
    """Return a function for the loss, and for the Hessian times a direction."""
    perturbed, others = point

    def product(direction: Arrays) -> tuple[jax.Array, Gradient]:
        def at(perturbed: Arrays) -> tuple[jax.Array, Gradient]:
            return gradient(loss, (perturbed, others), scope)

        (value, _), (_, changes) = jax.jvp(at, (perturbed,), (direction,))
        return value, changes

    return product


def gradient(loss: Loss, point: Point, scope: str) -> tuple[jax.Array, Gradient]:
    """Return the loss, and its gradient; None in the place of what does not receive g~."""
    perturbed, others = point
    receives = [scope == "all" and _numerics.is_inexact(x) for x in others]

    def at(perturbed: Arrays, received: Arrays) -> jax.Array:
        given = iter(received)
        filled = [next(given) if x else o for o, x in zip(others, receives, strict=True)]
        return loss(perturbed, filled)[0]

    received = [o for o, x in zip(others, receives, strict=True) if x]
    value, (first, second) = jax.value_and_grad(at, argnums=(0, 1))(perturbed, received)
    found = iter(second)
    return value, (first, [next(found) if x else None for x in receives])
