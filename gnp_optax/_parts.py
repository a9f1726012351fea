"""The parameters, divided into what is perturbed and what is not."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax import _numerics, _selection

PyTree = Any
Arrays = list[Any]


class Parts:
    """How a mask divides the leaves of the parameters.

    A leaf that stacks layers along its first axis, some of them selected, is divided into runs of
    layers. So every array of `divide` is perturbed as a whole or not at all.
    """

    def __init__(self, mask: _selection.Mask, params: PyTree) -> None:
        self._treedef: Any = jax.tree.structure(params)
        selected = _selection.selected_leaves(mask, params)
        self._runs = [_runs(s) for s in selected]

    def divide(self, tree: PyTree) -> tuple[Arrays, Arrays]:
        """Return the perturbed and the unperturbed arrays of a tree like the parameters."""
        try:
            leaves = self._treedef.flatten_up_to(tree)
        except ValueError as error:
            raise ValueError(
                f"The gradient has another structure than the parameters. Gradient: "
                f"{jax.tree.structure(tree)}. Parameters: {self._treedef}."
            ) from error
        parts: tuple[Arrays, Arrays] = ([], [])
        for leaf, runs in zip(leaves, self._runs, strict=True):
            for selected, layers in runs:
                # Chosen in Python: an unselected leaf must stay the same array, for what is
                # computed from it alone to be shared between the two passes.
                parts[not selected].append(leaf if layers is None else leaf[layers])
        return parts

    @_numerics.promoting
    def unite(self, perturbed: Arrays, unperturbed: Arrays) -> PyTree:
        """Undo `divide`."""
        sources = iter(unperturbed), iter(perturbed)
        leaves = []
        for runs in self._runs:
            pieces = [next(sources[selected]) for selected, _ in runs]
            leaves.append(pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces))
        return jax.tree.unflatten(self._treedef, leaves)

    def each_selected(self, of_leaves: Arrays) -> Arrays:
        """Return, for each perturbed array of `divide`, what is given for its leaf."""
        pairs = zip(of_leaves, self._runs, strict=True)
        return [x for x, runs in pairs for selected, _ in runs if selected]


def _runs(selected: bool | np.ndarray) -> list[tuple[bool, slice | None]]:
    """Return the runs of equal entries of a selection of layers, as (selected, which layers)."""
    if isinstance(selected, bool):
        return [(selected, None)]
    changes = np.flatnonzero(np.diff(selected)) + 1
    bounds = [0, *changes.tolist(), len(selected)]
    return [(bool(selected[a]), slice(a, b)) for a, b in itertools.pairwise(bounds)]
