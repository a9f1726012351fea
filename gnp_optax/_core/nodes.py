"""Nodes of some kind inside a tree: in a chain, a wrapper, a `TrainState` or any other."""

import sys
from typing import Any, TypeVar

import jax

Keys = tuple[Any, ...]
Node = TypeVar("Node")


def kind_of(home: str, name: str) -> Any:
    """Return a class of a library by its module and its name, or `None` if there is none.

    Only a program that has imported a library can hold its objects: it is never imported here.
    """
    return vars(sys.modules[home]).get(name) if home in sys.modules else None


def inside(tree: Any, *kinds: type[Node]) -> list[Node]:
    """Return the nodes of some kinds."""
    return [node for _, node in with_keys(tree, *kinds)]


def with_keys(tree: Any, *kinds: type[Node]) -> list[tuple[Keys, Node]]:
    """Return the nodes of some kinds, with the keys to get there."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kinds))
    return [(keys, node) for keys, node in found if isinstance(node, kinds)]
