"""Perturbing: from the gradient g and a direction d to g~, the gradient at theta + r d."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from gnp_optax._core import losses, numerics
from gnp_optax._core.options import Options, Scope

PyTree = Any
Arrays = list[Any]
Point = tuple[Arrays, Arrays]  # what is perturbed, and the rest
Gradient = tuple[Arrays, Arrays]  # of the same


class Loss(Protocol):
    """A loss of what is perturbed and of what is not."""

    def __call__(self, perturbed: Arrays, others: Arrays, /) -> tuple[jax.Array, Any]:
        """Return the scalar loss and anything else."""


class SecondGradient(NamedTuple):
    """What was found at the perturbed parameters, or would have been.

    Attributes:
        loss: `L(theta + eps)`; with exact curvature, `L(theta)`.
        moved: The perturbed arrays as they were there.
        tilde: g~; None for what does not receive it.
        curvature: The same for `H d`, if g~ was found by it.
    """

    loss: jax.Array
    moved: Arrays
    tilde: Gradient
    curvature: Gradient | None


# From the gradient g, the direction d and the radius r.
Second = Callable[[Gradient, Arrays, jax.typing.ArrayLike], SecondGradient]


def empty_state(
    direction: optax.GradientTransformation, params: PyTree, advice: str
) -> optax.OptState:
    """Return the state of a direction that has none, or raise with the advice."""
    state = direction.init(params)
    if jax.tree.leaves(state):
        raise ValueError(f"This direction has a state, and {advice}")
    return state


def second_gradient(loss: Loss, point: Point, options: Options) -> Second:
    """Return how g~ is found of a loss of which only g is known."""
    if options.curvature == "exact":
        return by_curvature(_hessian_product(loss, point, options.scope), point)
    loss = at_types(loss, point, options.perturb_dtype)

    def gradient_at(moved: Arrays, others: Arrays) -> tuple[jax.Array, Gradient]:
        return gradient(loss, (moved, others), options.scope)

    return by_difference(gradient_at, point, options.perturb_dtype)


def by_difference(
    gradient_at: Callable[[Arrays, Arrays], tuple[jax.Array, Gradient]],
    point: Point,
    dtype: jax.typing.DTypeLike | None,
) -> Second:
    """Find g~ at the perturbed parameters, of at least `dtype`.

    `gradient_at(perturbed, others)` is the loss and g~, with None for what does not receive it.
    """
    perturbed, others = point

    def second(g: Gradient, direction: Arrays, r: jax.typing.ArrayLike) -> SecondGradient:
        del g
        moved = [
            perturb(w, d, r, perturbed_type(w, dtype))
            for w, d in zip(perturbed, direction, strict=True)
        ]
        loss, tilde = gradient_at(moved, others)
        return SecondGradient(loss, moved, tilde, None)

    return second


def by_curvature(product: Callable[[Arrays], tuple[jax.Array, Gradient]], point: Point) -> Second:
    """Find `g~ = g + r H d`; `product(d)` is the loss and `H d`."""
    perturbed, _ = point

    def second(g: Gradient, direction: Arrays, r: jax.typing.ArrayLike) -> SecondGradient:
        tangents = [
            jnp.asarray(d, jnp.result_type(w)) for d, w in zip(direction, perturbed, strict=True)
        ]
        loss, curvature = product(tangents)
        # In float32 or wider: in the type of the gradient it would be g, for a small r.
        tilde = combined(lambda g, h: perturb(numerics.widen(g), h, r), g, curvature)
        return SecondGradient(loss, perturbed, tilde, curvature)

    return second


def combined(
    combine: Callable[[Any, jax.Array], jax.Array], grads: Gradient, received: Gradient
) -> Gradient:
    """Combine two gradients, where the second is received and not None."""
    first, second = (
        [None if x is None else combine(g, x) for g, x in zip(*pair, strict=True)]
        for pair in zip(grads, received, strict=True)
    )
    return first, second


def _hessian_product(
    loss: Loss, point: Point, scope: Scope
) -> Callable[[Arrays], tuple[jax.Array, Gradient]]:
    """Return a function for the loss, and for the Hessian times a direction."""
    perturbed, others = point

    def product(direction: Arrays) -> tuple[jax.Array, Gradient]:
        def at(perturbed: Arrays) -> tuple[jax.Array, Gradient]:
            return gradient(loss, (perturbed, others), scope)

        (value, _), (_, changes) = jax.jvp(at, (perturbed,), (direction,))
        return value, changes

    return product


def gradient(loss: Loss, point: Point, scope: Scope) -> tuple[jax.Array, Gradient]:
    """Return the loss, and its gradient; None in the place of what does not receive g~."""
    perturbed, others = point
    receives = [scope == "all" and numerics.is_inexact(x) for x in others]

    def at(perturbed: Arrays, received: Arrays) -> jax.Array:
        given = iter(received)
        filled = [next(given) if x else o for o, x in zip(others, receives, strict=True)]
        return loss(perturbed, filled)[0]

    received = [o for o, x in zip(others, receives, strict=True) if x]
    value, (first, second) = jax.value_and_grad(at, argnums=(0, 1))(perturbed, received)
    found = iter(second)
    return value, (first, [next(found) if x else None for x in receives])


def at_types(loss: Loss, point: Point, dtype: jax.typing.DTypeLike | None) -> Loss:
    """Return the loss as it is to be computed where leaves are perturbed in at least `dtype`."""
    return loss if is_retyped(point[0], dtype) else losses.at_types(loss, *point)


def is_retyped(perturbed: Arrays, dtype: jax.typing.DTypeLike | None) -> bool:
    """Whether a leaf is perturbed in another type than its own."""
    return any(perturbed_type(w, dtype) != jnp.result_type(w) for w in perturbed)


@numerics.promoting
def perturbed_type(w: jax.Array, dtype: jax.typing.DTypeLike | None) -> jnp.dtype:
    """Return the type in which a leaf is perturbed: its own, or `dtype` if that is wider."""
    own = jnp.result_type(w)
    return own if dtype is None else numerics.wider(own, jnp.dtype(dtype))


@numerics.promoting
def perturb(
    w: jax.Array,
    d: jax.Array,
    r: jax.typing.ArrayLike,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Return `w + r d`, computed in float32 or wider and rounded to `dtype`, by default w's."""
    wide = jnp.asarray(w, perturbed_type(numerics.widen(w), dtype))
    step = jnp.asarray(r, numerics.real(wide.dtype)) * jnp.asarray(d, wide.dtype)
    return numerics.round_to(wide + step, jnp.result_type(w) if dtype is None else dtype)
