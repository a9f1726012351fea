"""Perturbing and mixing: the one implementation beneath every public function.

With g the gradient at theta, `eps = r * direction(g)` on the selected leaves and g~ the gradient at
theta + eps, `g_reg = (1 - alpha) g + alpha g~` on the leaves that `scope` names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnp_optax import _checks, _numerics, _selection, directions

Arrays = list[Any]
Seen = TypeVar("Seen")


class Loss(Protocol):
    """A loss of what is perturbed and of what is not."""

    def __call__(self, perturbed: Arrays, others: Arrays, /) -> tuple[jax.Array, Any]:
        """Return the scalar loss and anything else."""


class PerturbedPass(NamedTuple):
    """The second pass. Lists hold the perturbed arrays, and gradients those of the others after."""

    value: jax.Array
    params: Arrays
    perturbed: Arrays
    grads: Arrays
    tilde: list[jax.Array | None]  # g~, None for the arrays that do not receive it


def resolve_direction(
    direction: optax.GradientTransformation | None,
    mask: _selection.Mask,
    scope: str,
    curvature: str,
) -> optax.GradientTransformationExtraArgs:
    """Check the arguments that every public form shares, and fill in the default direction."""
    _checks.check_scope(scope)
    _checks.check_curvature(curvature)
    _selection.check_mask(mask)
    direction = directions.normalized() if direction is None else direction
    _checks.check_direction(direction)
    return optax.with_extra_args_support(direction)


def regularize(
    loss: Loss,
    point: tuple[Arrays, Arrays],
    grads: tuple[Arrays, Arrays],
    *,
    ascend: Callable[[Arrays], tuple[Arrays, Any]],
    observe: Callable[[PerturbedPass | None], Seen],
    r: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    scope: str,
    curvature: str,
) -> tuple[tuple[Arrays, Arrays], Any, Seen]:
    """Return `g_reg` for the gradient `grads` of `loss` at `point`.

    Where alpha is 0, `grads` come back as they are and `loss` is not evaluated: decided in Python
    for a number, by `lax.cond` for a traced alpha.

    Args:
        loss: The scalar loss and anything else, of the two lists of arrays in `point`.
        point: The arrays to perturb, and the others.
        grads: The gradient of the loss at `point`, in two lists of the same lengths.
        ascend: From the gradient of the arrays to perturb to their direction of ascent and a state.
        observe: What to keep of the second pass; it is given None where there was none.
        r: Radius of the perturbation.
        alpha: Weight of the perturbed gradient.
        scope: `"masked"` if only the arrays to perturb receive the regularized gradient.
        curvature: `"exact"` if g~ is `g + r H d`, with d the direction and H the Hessian, instead
            of the gradient at the perturbed point.

    Returns:
        `g_reg` in the structure and dtypes of `grads`, the state of `ascend`, and what `observe`
        kept.
    """
    perturbed, others = point
    receives = [scope == "all" and _numerics.is_inexact(x) for x in others]

    def gradient(perturbed: Arrays) -> tuple[jax.Array, Arrays]:
        """Return the loss, and its gradient for the perturbed arrays and the receiving others."""

        def at(perturbed: Arrays, received: Arrays) -> jax.Array:
            given = iter(received)
            value, _ = loss(
                perturbed, [next(given) if x else o for o, x in zip(others, receives, strict=True)]
            )
            return value

        received = [o for o, x in zip(others, receives, strict=True) if x]
        value, (first, second) = jax.value_and_grad(at, argnums=(0, 1))(perturbed, received)
        return value, [*first, *second]

    def skip() -> tuple[tuple[Arrays, Arrays], Any, Seen]:
        # The state of a direction sees every gradient; of one without state, nothing remains.
        _, state = ascend(grads[0])
        return grads, state, observe(None)

    def run() -> tuple[tuple[Arrays, Arrays], Any, Seen]:
        direction, state = ascend(grads[0])
        every = [*grads[0], *grads[1]]
        at = [True] * len(perturbed) + receives
        known = [g for g, x in zip(every, at, strict=True) if x]
        if curvature == "exact":
            moved = perturbed
            value, found = _extrapolated(gradient, perturbed, direction, known, r)
        else:
            moved = [perturb(w, d, r) for w, d in zip(perturbed, direction, strict=True)]
            value, found = gradient(moved)
        left = iter(found)
        tilde = [next(left) if x else None for x in at]
        mixed = [g if t is None else mix(g, t, alpha) for g, t in zip(every, tilde, strict=True)]
        seen = observe(PerturbedPass(value, perturbed, moved, every, tilde))
        return (mixed[: len(perturbed)], mixed[len(perturbed) :]), state, seen

    if isinstance(alpha, jax.core.Tracer):
        return jax.lax.cond(alpha == 0, skip, run)
    # In NumPy, since under `jit` a comparison of concrete JAX arrays is staged like any other.
    return skip() if np.asarray(alpha) == 0 else run()


def perturb(w: jax.Array, d: jax.Array, r: jax.typing.ArrayLike) -> jax.Array:
    """Return `w + r d`, computed in float32 or wider and rounded to the type of `w`."""
    wide = _numerics.widen(w)
    step = jnp.asarray(r, _numerics.real(wide.dtype)) * jnp.asarray(d, wide.dtype)
    return _numerics.round_to(wide + step, jnp.result_type(w))


def mix(g: jax.Array, tilde: jax.Array, alpha: jax.typing.ArrayLike) -> jax.Array:
    """Return `(1 - alpha) g + alpha g~`, computed in float32 or wider, in the type of `g`."""
    wide = _numerics.widen(g)
    a = jnp.asarray(alpha, _numerics.real(wide.dtype))
    return ((1 - a) * wide + a * tilde.astype(wide.dtype)).astype(jnp.result_type(g))


def _extrapolated(
    gradient: Callable[[Arrays], tuple[jax.Array, Arrays]],
    params: Arrays,
    direction: Arrays,
    grads: Arrays,
    r: jax.typing.ArrayLike,
) -> tuple[jax.Array, Arrays]:
    """Return the loss, and `g + r H d` in float32 or wider."""
    tangents = [jnp.asarray(d, jnp.result_type(w)) for d, w in zip(direction, params, strict=True)]
    (value, _), (_, products) = jax.jvp(gradient, (params,), (tangents,))
    # Not in the type of the gradient: for a small r the sum would round to g.
    return value, [perturb(_numerics.widen(g), h, r) for g, h in zip(grads, products, strict=True)]
