"""Nodes of some kind inside a tree: in a chain, a wrapper, a `TrainState` or any other."""

from typing import Any, TypeVar

import jax

Keys = tuple[Any, ...]
Node = TypeVar("Node")


def inside(tree: Any, *kinds: type[Node]) -> list[Node]:
    """Return the nodes of some kinds."""
    return [node for _, node in with_keys(tree, *kinds)]


def with_keys(tree: Any, *kinds: type[Node]) -> list[tuple[Keys, Node]]:
    """Return the nodes of some kinds, with the keys to get there."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kinds))
    return [(keys, node) for keys, node in found if isinstance(node, kinds)]
