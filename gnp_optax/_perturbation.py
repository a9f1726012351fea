"""Perturbing and mixing: the one implementation beneath every public function.

With g the gradient at theta, `eps = r * direction(g)` on the selected leaves and g~ the gradient at
theta + eps, `g_reg = (1 - alpha) g + alpha g~` on the leaves that `scope` names.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnp_optax import _loss, _numerics, _selection

PyTree = Any
# From the gradient, zero on the leaves that are not perturbed, to the ascent direction and state.
Ascend = Callable[[PyTree], tuple[PyTree, Any]]


class SecondPass(NamedTuple):
    """What the perturbed pass showed: float32 scalars, NaN where it did not run."""

    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_loss: jax.Array
    cosine: jax.Array


def not_run() -> SecondPass:
    """Return the report of a second pass that did not run."""
    return SecondPass(*(jnp.full([], jnp.nan, jnp.float32) for _ in SecondPass._fields))


def regularize(
    loss: _loss.Loss,
    grads: PyTree,
    params: PyTree,
    ascend: Ascend,
    *,
    r: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    mask: _selection.Mask,
    scope: str,
) -> tuple[PyTree, Any, SecondPass]:
    """Return `g_reg` for the gradient `grads` of `loss` at `params`.

    Where alpha is 0, `grads` come back as they are and `loss` is not evaluated: decided in Python
    for a number, by `lax.cond` for a traced alpha.

    Returns:
        `g_reg` in the structure and dtypes of `grads`, the state of `ascend`, and what was seen.
    """
    selected = _selection.selected_leaves(mask, params)
    leaves, treedef = jax.tree.flatten(params)
    grad_leaves = _leaves_like(treedef, grads)
    receives = selected if scope == "masked" else [_numerics.is_inexact(leaf) for leaf in leaves]

    def direction() -> tuple[PyTree, Any]:
        kept = [
            g if s else jnp.zeros_like(w)
            for g, s, w in zip(grad_leaves, selected, leaves, strict=True)
        ]
        return ascend(jax.tree.unflatten(treedef, kept))

    def skip() -> tuple[PyTree, Any, SecondPass]:
        # The state of a direction sees every gradient; of one without state, nothing remains.
        _, state = direction()
        return grads, state, not_run()

    def run() -> tuple[PyTree, Any, SecondPass]:
        ascent, state = direction()
        # Chosen in Python: an unselected leaf must stay the same array, for what is computed from
        # it alone to be shared between the two passes.
        perturbed = [
            perturb(w, d, r) if s else w
            for w, d, s in zip(leaves, _leaves_like(treedef, ascent), selected, strict=True)
        ]
        value, tilde = _gradient(loss, perturbed, treedef, receives)
        mixed = [
            g if t is None else mix(g, t, alpha) for g, t in zip(grad_leaves, tilde, strict=True)
        ]
        report = _report(leaves, perturbed, grad_leaves, tilde, value)
        return jax.tree.unflatten(treedef, mixed), state, report

    if isinstance(alpha, jax.core.Tracer):
        return jax.lax.cond(alpha == 0, skip, run)
    return skip() if alpha == 0 else run()


def perturb(w: jax.Array, d: jax.Array, r: jax.typing.ArrayLike) -> jax.Array:
    """Return `w + r d`, computed in float32 or wider and rounded to the type of `w`."""
    w = jnp.asarray(w)
    wide = _numerics.wide(w.dtype)
    step = jnp.asarray(r, _numerics.real(wide)) * jnp.asarray(d, wide)
    return _numerics.round_to(w.astype(wide) + step, w.dtype)


def mix(g: jax.Array, tilde: jax.Array, alpha: jax.typing.ArrayLike) -> jax.Array:
    """Return `(1 - alpha) g + alpha g~`, computed in float32 or wider, in the type of `g`."""
    g = jnp.asarray(g)
    wide = _numerics.wide(g.dtype)
    a = jnp.asarray(alpha, _numerics.real(wide))
    return ((1 - a) * g.astype(wide) + a * tilde.astype(wide)).astype(g.dtype)


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


def _report(
    leaves: list[Any],
    perturbed: list[Any],
    grads: list[Any],
    tilde: list[jax.Array | None],
    value: jax.Array,
) -> SecondPass:
    moved = [_difference(p, w) for p, w in zip(perturbed, leaves, strict=True) if p is not w]
    pairs = [(g, t) for g, t in zip(grads, tilde, strict=True) if t is not None]
    inexact = [g for g, w in zip(grads, leaves, strict=True) if _numerics.is_inexact(w)]
    report = SecondPass(
        grad_norm=_numerics.norm(inexact),
        perturbation_norm=_numerics.norm(moved),
        perturbed_loss=value,
        cosine=_cosine(*zip(*pairs, strict=True)),
    )
    return SecondPass(*(jnp.asarray(x, jnp.float32) for x in report))


def _difference(perturbed: jax.Array, w: jax.Array) -> jax.Array:
    wide = _numerics.wide(perturbed.dtype)
    return perturbed.astype(wide) - jnp.asarray(w, wide)


def _cosine(first: Sequence[jax.Array], second: Sequence[jax.Array]) -> jax.Array:
    """Cosine of the angle between two gradients; 0 where one of them is 0."""
    norms = _numerics.norm(first), _numerics.norm(second)
    products = [
        jnp.vdot(_numerics.divide(a, norms[0]), _numerics.divide(b, norms[1])).real
        for a, b in zip(first, second, strict=True)
    ]
    return jnp.asarray(sum(products))


def _leaves_like(treedef: Any, tree: PyTree) -> list[Any]:
    try:
        return list(treedef.flatten_up_to(tree))
    except ValueError as error:
        raise ValueError(
            f"The gradient has another structure than the parameters. Gradient: "
            f"{jax.tree.structure(tree)}. Parameters: {treedef}."
        ) from error
