"""Perturbing and mixing: the one implementation beneath every public function.

With g the gradient at theta, `eps = r * direction(g)` on the selected leaves and g~ the gradient at
theta + eps, `g_reg = (1 - alpha) g + alpha g~` on the leaves that `scope` names.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnp_optax import _checks, _loss, _numerics, _selection, directions

PyTree = Any
Seen = TypeVar("Seen")


class PerturbedPass(NamedTuple):
    """The perturbed pass: the loss, and lists with one entry per leaf of the parameters."""

    value: jax.Array
    params: list[Any]
    perturbed: list[Any]
    grads: list[Any]
    tilde: list[jax.Array | None]  # g~, None on the leaves that do not receive it


def resolve_direction(
    direction: optax.GradientTransformation | None, mask: _selection.Mask, scope: str
) -> optax.GradientTransformationExtraArgs:
    """Check the arguments that every public form shares, and fill in the default direction."""
    _checks.check_scope(scope)
    _selection.check_mask(mask)
    direction = directions.normalized() if direction is None else direction
    _checks.check_direction(direction)
    return optax.with_extra_args_support(direction)


def regularize(
    loss: _loss.Loss,
    grads: PyTree,
    params: PyTree,
    *,
    ascend: Callable[[PyTree], tuple[PyTree, Any]],
    observe: Callable[[PerturbedPass | None], Seen],
    r: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    mask: _selection.Mask,
    scope: str,
) -> tuple[PyTree, Any, Seen]:
    """Return `g_reg` for the gradient `grads` of `loss` at `params`.

    Where alpha is 0, `grads` come back as they are and `loss` is not evaluated: decided in Python
    for a number, by `lax.cond` for a traced alpha.

    Args:
        loss: From the parameters to the scalar loss and anything else.
        grads: Its gradient at `params`.
        params: The parameters.
        ascend: From the gradient, 0 on the unselected leaves, to the ascent direction and a state.
        observe: What to keep of the perturbed pass; it is given None where there was none.
        r: Radius of the perturbation.
        alpha: Weight of the perturbed gradient.
        mask: Which leaves are perturbed.
        scope: Which leaves receive the regularized gradient, `"all"` or `"masked"`.

    Returns:
        `g_reg` in the structure and dtypes of `grads`, the state of `ascend`, and what `observe`
        kept.
    """
    selected = _selection.selected_leaves(mask, params)
    leaves, treedef = jax.tree.flatten(params)
    grad_leaves = _leaves_like(treedef, grads)
    receives = selected if scope == "masked" else [_numerics.is_inexact(leaf) for leaf in leaves]

    def ascent() -> tuple[PyTree, Any]:
        kept = [
            g if s else jnp.zeros(jnp.shape(w), _gradient_dtype(g, w))
            for g, s, w in zip(grad_leaves, selected, leaves, strict=True)
        ]
        return ascend(jax.tree.unflatten(treedef, kept))

    def skip() -> tuple[PyTree, Any, Seen]:
        # The state of a direction sees every gradient; of one without state, nothing remains.
        _, state = ascent()
        return grads, state, observe(None)

    def run() -> tuple[PyTree, Any, Seen]:
        direction, state = ascent()
        # Chosen in Python: an unselected leaf must stay the same array, for what is computed from
        # it alone to be shared between the two passes.
        perturbed = [
            perturb(w, d, r) if s else w
            for w, d, s in zip(leaves, _leaves_like(treedef, direction), selected, strict=True)
        ]
        value, tilde = _gradient(loss, perturbed, treedef, receives)
        mixed = [
            g if t is None else mix(g, t, alpha) for g, t in zip(grad_leaves, tilde, strict=True)
        ]
        seen = observe(PerturbedPass(value, leaves, perturbed, grad_leaves, tilde))
        return jax.tree.unflatten(treedef, mixed), state, seen

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


def _gradient(
    loss: _loss.Loss, leaves: list[Any], treedef: Any, receives: list[bool]
) -> tuple[jax.Array, list[jax.Array | None]]:
    """Return the loss, and its gradient where a leaf receives it, None elsewhere."""

    def at(received: list[jax.Array]) -> jax.Array:
        given = iter(received)
        filled = [next(given) if x else w for w, x in zip(leaves, receives, strict=True)]
        value, _ = loss(jax.tree.unflatten(treedef, filled))
        return value

    received = [w for w, x in zip(leaves, receives, strict=True) if x]
    value, grads = jax.value_and_grad(at)(received)
    found = iter(grads)
    return value, [next(found) if x else None for x in receives]


def _gradient_dtype(g: Any, w: Any) -> jnp.dtype:
    # The gradient of an integer leaf is of type float0, or missing.
    has_gradient = _numerics.is_inexact(w) and g is not None
    return jnp.result_type(g) if has_gradient else jnp.result_type(w)


def _leaves_like(treedef: Any, tree: PyTree) -> list[Any]:
    try:
        return list(treedef.flatten_up_to(tree))
    except ValueError as error:
        raise ValueError(
            f"The gradient has another structure than the parameters. Gradient: "
            f"{jax.tree.structure(tree)}. Parameters: {treedef}."
        ) from error
