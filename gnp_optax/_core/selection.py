"""What a mask selects, and how it divides the parameters."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnp_optax._core import checks, numerics, paths

PyTree = Any
Arrays = list[Any]
Mask = PyTree | Callable[[PyTree], PyTree] | None

MASK_AS_SCHEDULE = (
    "The mask was taken for a schedule and called with a step count: optax.inject_hyperparams does "
    "so with every callable. Name the mask static: optax.inject_hyperparams(gnp.sam, "
    "static_args=('mask',))(...), or whichever transformation it is."
)


def check_mask(mask: Mask) -> None:
    """Raise for a mask that is wrong whatever the parameters are."""
    if isinstance(mask, (bool, np.bool_)):
        raise ValueError(
            f"mask={mask} says the same of every leaf. To perturb all of them write mask=None. If "
            f"you passed a callable: {MASK_AS_SCHEDULE}"
        )
    if not _is_callable(mask):
        _check_bools(mask)


def selected_leaves(mask: Mask, params: PyTree) -> list[bool | np.ndarray]:
    """Return, for every leaf of `params`, whether it is perturbed, or which of its layers are.

    Chosen in Python, never traced: an unselected leaf then stays the very same array, and only
    leaves that can be differentiated are selected.
    """
    _check_params(params)
    leaves, treedef = jax.tree.flatten(params)
    differentiable = [numerics.is_inexact(leaf) for leaf in leaves]
    selected: list[bool | np.ndarray]
    if mask is None:
        selected = list(differentiable)
    else:
        prefix = mask(params) if _is_callable(mask) else mask
        _check_bools(prefix)
        try:
            full = jax.tree.map(lambda m, sub: jax.tree.map(lambda _: m, sub), prefix, params)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"The mask is no prefix of the parameters. Mask: {jax.tree.structure(prefix)}. "
                f"Parameters: {treedef}. A callable mask such as gnp.masks.by_path('^head') works "
                f"for every structure."
            ) from error
        flags = [_of_leaf(m, w) for m, w in zip(jax.tree.leaves(full), leaves, strict=True)]
        selected = [m if d else False for m, d in zip(flags, differentiable, strict=True)]
    if not any(differentiable):
        raise ValueError("None of the parameters is floating point or complex.")
    if not any(np.any(s) for s in selected):
        names = list(paths.leaf_paths(params))
        raise ValueError(
            f"The mask {mask!r} selects none of the parameters. Their paths are "
            f"{checks.listed(names)}: mask=gnp.masks.by_path({names[-1]!r}), say."
        )
    return selected


def _check_params(params: PyTree) -> None:
    """Raise for a module, and if a wrapper has taken leaves out of the parameters."""
    checks.check_parameters(params)
    nodes = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    if any(isinstance(node, optax.MaskedNode) for node in nodes):
        raise ValueError(
            "Some parameters are missing (optax.MaskedNode): optax.masked, optax.partition or "
            "optax.multi_transform is wrapped around the gradient regularization, which has to "
            "evaluate the loss on all parameters. To regularize some layers only, write "
            "gnp.gradient_regularization(r, alpha, mask=...); to treat layers differently after "
            "it, optax.chain(gnp.gradient_regularization(r, alpha), optax.partition(...))."
        )


def _is_callable(mask: Mask) -> bool:
    # Optax's rule: an `eqx.Module` of bools is a pytree, though it may be callable itself.
    leaves = jax.tree.leaves(mask)
    return len(leaves) > 0 and all(callable(leaf) for leaf in leaves)


def along(axis: int, flags: np.ndarray) -> np.ndarray:
    """Return the selection of some of the layers that a leaf stacks along an axis.

    The shape says the axis: `(layers,)` for the first, `(1, layers)` for the second.
    """
    return flags.reshape((1,) * axis + (-1,))


def axis_of(flags: np.ndarray) -> int:
    """Return the axis along which a selection selects layers."""
    return flags.ndim - 1


def _of_leaf(flag: Any, leaf: Any) -> bool | np.ndarray:
    """Return the selection of one leaf: a bool, or one for each of the layers that it stacks."""
    if np.ndim(flag):
        axis, shape = axis_of(flag), np.shape(leaf)
        if shape[axis : axis + 1] != (flag.size,):
            raise ValueError(
                f"The mask selects among {flag.size} stacked layers, but a leaf under it has the "
                f"shape {shape}, not as many along axis {axis}. An array of shape (layers,) is for "
                f"layers stacked along the first axis, one of shape (1, layers) for the second."
            )
    return bool(np.all(flag)) if np.all(flag) or not np.any(flag) else np.asarray(flag)


def _check_bools(prefix: PyTree) -> None:
    for leaf in jax.tree.leaves(prefix):
        is_bools = isinstance(leaf, np.ndarray) and leaf.dtype == bool
        is_bools = is_bools and all(length == 1 for length in leaf.shape[:-1])
        if not isinstance(leaf, (bool, np.bool_)) and not is_bools:
            if isinstance(leaf, str):
                raise TypeError(
                    f"A mask must be made of bools, but this one has the leaf {leaf!r}. To select "
                    f"by name write mask=gnp.masks.by_path({leaf!r})."
                )
            kind = "is traced" if isinstance(leaf, jax.core.Tracer) else f"has the leaf {leaf!r}"
            raise TypeError(
                f"A mask must be made of Python bools, but this one {kind}. Which leaves are "
                f"perturbed has to be known when the step is compiled: pass the mask as a static "
                f"argument (gnp.masks makes hashable ones) or close over it. Of a leaf that stacks "
                f"layers along its first axis, a NumPy array of bools selects some; along its "
                f"second, one of shape (1, layers)."
            )


def leaves_like(params: PyTree, gradient: PyTree) -> list[Any]:
    """Return what a gradient has in the places of the leaves of the parameters."""
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten(params)
    try:
        found: list[Any] = treedef.flatten_up_to(gradient)
    except ValueError as error:
        raise ValueError(
            f"The gradient has another structure than the parameters. Gradient: "
            f"{jax.tree.structure(gradient)}. Parameters: {treedef}. It comes second: "
            f"value, grads = jax.value_and_grad(loss_fn)(params)."
        ) from error
    shapes = [
        (getattr(g, "shape", jnp.shape(w)), jnp.shape(w))
        for g, w in zip(found, leaves, strict=True)
    ]
    for i, (shape, own) in enumerate(shapes):
        if shape != own:
            advice = (
                "Of one for each example take the mean: jax.tree.map(lambda g: g.mean(0), grads)."
                if shape[1:] == own
                else "Pass that of the loss at these parameters: grads = jax.grad(loss_fn)(params)."
            )
            raise ValueError(
                f"The gradient has the shape {shape} where the parameter "
                f"{paths.leaf_paths(params)[i]!r} has {own}. {advice}"
            )
    return found


class Parts:
    """How a mask divides the leaves of the parameters.

    A leaf that stacks layers along an axis, some of them selected, is divided into runs of layers.
    So every array of `divide` is perturbed as a whole or not at all.
    """

    def __init__(self, mask: Mask, params: PyTree) -> None:
        self._params = params
        selected = selected_leaves(mask, params)
        self._runs = [_runs(s) for s in selected]

    def divide(self, tree: PyTree) -> tuple[Arrays, Arrays]:
        """Return the perturbed and the unperturbed arrays of a tree like the parameters."""
        leaves = leaves_like(self._params, tree)
        parts: tuple[Arrays, Arrays] = ([], [])
        for leaf, runs in zip(leaves, self._runs, strict=True):
            for selected, layers in runs:
                # Chosen in Python: an unselected leaf must stay the same array, for what is
                # computed from it alone to be shared between the two passes.
                parts[not selected].append(leaf if layers is None else leaf[layers])
        return parts

    @numerics.promoting
    def unite(self, perturbed: Arrays, unperturbed: Arrays) -> PyTree:
        """Undo `divide`."""
        sources = iter(unperturbed), iter(perturbed)
        leaves = []
        for runs in self._runs:
            pieces = [next(sources[selected]) for selected, _ in runs]
            (_, layers), *_ = runs
            axis = 0 if layers is None else len(layers) - 1
            leaves.append(pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis))
        return jax.tree.unflatten(jax.tree.structure(self._params), leaves)

    def each_selected(self, of_leaves: Arrays) -> Arrays:
        """Return, for each perturbed array of `divide`, what is given for its leaf."""
        pairs = zip(of_leaves, self._runs, strict=True)
        return [x for x, runs in pairs for selected, _ in runs if selected]


def _runs(selected: bool | np.ndarray) -> list[tuple[bool, tuple[slice, ...] | None]]:
    """Return the runs of equal entries of a selection of layers, as (selected, which layers)."""
    if isinstance(selected, bool):
        return [(selected, None)]
    flags = selected.ravel()
    changes = np.flatnonzero(np.diff(flags)) + 1
    bounds = [0, *changes.tolist(), len(flags)]
    before = (slice(None),) * axis_of(selected)
    return [(bool(flags[a]), (*before, slice(a, b))) for a, b in itertools.pairwise(bounds)]
