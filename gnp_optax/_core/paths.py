"""Names of leaves, the same for every library's parameter trees."""

from typing import Any

import jax

from gnp_optax._core import nodes

PyTree = Any


def leaf_paths(tree: PyTree) -> list[str]:
    """Return one path per leaf, in the order of `jax.tree.leaves`.

    Keys are joined by `/`. An index below a name is written as Flax linen names the items of a
    list: `blocks_0/attention/kernel`, so that a list of modules in NNX or Equinox has the same
    paths as in linen. The box of an NNX `Variable` or of `nn.Partitioned` is no part of a path.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    paths: list[str] = []
    for path, node in found:
        paths += [_join(path)] * len(jax.tree.leaves(node))
    return paths


def layer_of(path: str) -> str:
    """Return the path of the module that owns a leaf; `""` is the outermost module."""
    return path.rpartition("/")[0]


def layers_of(tree: PyTree) -> list[str]:
    """Return the layers of a tree, each once, in the order of their first leaves."""
    return [*dict.fromkeys(map(layer_of, leaf_paths(tree)))]


def _join(path: tuple[Any, ...]) -> str:
    joined = ""
    for key in path:
        part = jax.tree_util.keystr((key,), simple=True)
        is_index = part.isdigit() and not isinstance(getattr(key, "key", None), str)
        joined += ("_" if is_index else "/") + part if joined else part
    return joined


def is_box(node: object) -> bool:
    """Whether a node of a tree is the box of a leaf: an NNX `Variable`, an `nn.Partitioned`."""
    names = (
        ("flax.nnx", "Variable"),
        ("flax.nnx", "VariableState"),
        ("flax.core.meta", "AxisMetadata"),
    )
    found = (nodes.kind_of(home, name) for home, name in names)
    return isinstance(node, tuple(box for box in found if box is not None))
