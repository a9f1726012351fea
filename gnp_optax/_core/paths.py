"""Names of leaves, the same for every library's parameter trees."""

import sys
from typing import Any, TypeVar

import jax

PyTree = Any
Node = TypeVar("Node")


def leaf_paths(tree: PyTree) -> list[str]:
    """Return one path per leaf, in the order of `jax.tree.leaves`.

    Keys are joined by `/`. An index below a name is written as Flax linen names the items of a
    list: `blocks_0/attention/kernel`, so that a list of modules in NNX or Equinox has the same
    paths as in linen. The box of an NNX `Variable` or of `nn.Partitioned` is no part of a path.
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    paths: list[str] = []
    for path, node in nodes:
        paths += [_join(path)] * len(jax.tree.leaves(node))
    return paths


def layer_of(path: str) -> str:
    """Return the path of the module that owns a leaf; `""` is the outermost module."""
    return path.rpartition("/")[0]


def nodes(tree: PyTree, kind: type[Node]) -> list[tuple[tuple[Any, ...], Node]]:
    """Return every node of one kind, as `optax.chain` has states, with the keys to get there."""

    def is_one(node: object) -> bool:
        return isinstance(node, kind)

    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_one)
    return [(path, node) for path, node in found if is_one(node)]


def _join(path: tuple[Any, ...]) -> str:
    joined = ""
    for key in path:
        part = jax.tree_util.keystr((key,), simple=True)
        is_index = part.isdigit() and not isinstance(getattr(key, "key", None), str)
        joined += ("_" if is_index else "/") + part if joined else part
    return joined


def is_box(node: object) -> bool:
    """Whether a node of a tree is the box of a leaf: an NNX `Variable`, an `nn.Partitioned`."""
    # Only a program that has imported Flax can hold its boxes: never import it here.
    names = (
        ("flax.nnx", "Variable"),
        ("flax.nnx", "VariableState"),
        ("flax.core.meta", "AxisMetadata"),
    )
    found = (vars(sys.modules[m]).get(name) for m, name in names if m in sys.modules)
    return isinstance(node, tuple(box for box in found if box is not None))
