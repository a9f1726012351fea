"""Which parts of the parameters are measured, and how they lie on the devices."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnp_optax._core import selection

PyTree = Any
Arrays = list[Any]


class Layers(NamedTuple):
    """Which of the layers that a leaf stacks along an axis are selected; hashable."""

    axis: int
    flags: tuple[bool, ...]


class Layout(NamedTuple):
    """For every leaf, whether it is selected, or which of its layers; and its sharding.

    Hashable. Without a mesh, the shardings are not known, or there is one device.
    """

    selected: tuple[bool | Layers, ...]
    mesh: Mesh | None
    specs: tuple[PartitionSpec, ...]


def layout_of(mask: selection.Mask, params: PyTree) -> Layout:
    """Return the layout of parameters, read from the arrays before they are traced."""
    selection.check_mask(mask)
    flags = selection.selected_leaves(mask, params)
    selected = tuple(s if isinstance(s, bool) else _layers(s) for s in flags)
    shardings = [_sharding(leaf) for leaf in jax.tree.leaves(params)]
    meshes = {s.mesh for s in shardings if s is not None}
    mesh = meshes.pop() if len(meshes) == 1 else None
    if not isinstance(mesh, Mesh) or mesh.size == 1:
        return Layout(selected, None, ())
    return Layout(selected, mesh, tuple(s.spec if s else PartitionSpec() for s in shardings))


def _layers(flags: np.ndarray) -> Layers:
    return Layers(selection.axis_of(flags), tuple(flags.ravel().tolist()))


def divided(layout: Layout, params: PyTree) -> selection.Parts:
    """Return how the layout's selection divides the parameters."""
    flags = [
        s if isinstance(s, bool) else selection.along(s.axis, np.asarray(s.flags))
        for s in layout.selected
    ]
    return selection.Parts(jax.tree.unflatten(jax.tree.structure(params), flags), params)


def shardings_of(layout: Layout, parts: selection.Parts) -> list[NamedSharding | None]:
    """Return the sharding of each selected array of `parts`; None where it is not known."""
    if layout.mesh is None:
        return parts.each_selected([None] * len(layout.selected))
    specs = (
        spec if isinstance(selected, bool) else _without(selected.axis, spec)
        for selected, spec in zip(layout.selected, layout.specs, strict=True)
    )
    return parts.each_selected([NamedSharding(layout.mesh, spec) for spec in specs])


def _without(axis: int, spec: PartitionSpec) -> PartitionSpec:
    # Some of the layers that are stacked along an axis cannot be sharded as all of them are.
    return PartitionSpec(*(None if i == axis else name for i, name in enumerate(spec)))


def place(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Constrain an array to a sharding, if that is known."""
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def is_traced(tree: PyTree) -> bool:
    """Whether a leaf is traced."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def automatic_axes(tree: PyTree) -> Iterator[tuple[PyTree, dict[Mesh, Mesh]]]:
    """Yield the same arrays on meshes of which XLA decides the shardings of what is computed.

    An `Explicit` axis of a mesh, what `jax.make_mesh` makes, makes sharding a part of the type, and
    the reshapes and dot products of Krylov vectors ambiguous. Nothing is copied.
    """
    meshes = {s.mesh for s in map(_sharding, jax.tree.leaves(tree)) if s is not None}
    automatic = {m: Mesh(m.devices, m.axis_names) for m in meshes if isinstance(m, Mesh)}
    automatic = {m: a for m, a in automatic.items() if m != a}
    context: Any = contextlib.nullcontext()
    if len(automatic) == 1 and hasattr(jax, "set_mesh") and not is_traced(tree):
        context = jax.set_mesh(*automatic.values())
    with context:
        yield moved(tree, automatic), {a: m for m, a in automatic.items()}


def moved(tree: PyTree, meshes: dict[Mesh, Mesh]) -> PyTree:
    """Return the same arrays on other meshes of the same devices."""

    def move(leaf: Any) -> Any:
        sharding = _sharding(leaf)
        if sharding is None or sharding.mesh not in meshes:
            return leaf
        return jax.device_put(leaf, NamedSharding(meshes[sharding.mesh], sharding.spec))

    return jax.tree.map(move, tree) if meshes else tree


def _sharding(leaf: Any) -> NamedSharding | None:
    is_concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    sharding = leaf.sharding if is_concrete else None
    return sharding if isinstance(sharding, NamedSharding) else None
