"""Nodes of some kind inside a tree."""

from typing import Any, TypeVar

import jax

Node = TypeVar("Node")


def inside(tree: Any, *kinds: type[Node]) -> list[Node]:
    """Return the nodes of some kinds in a chain, a wrapper, a `TrainState` or any other tree."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in nodes if isinstance(node, kinds)]
