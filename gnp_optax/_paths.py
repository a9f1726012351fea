"""Names of leaves, the same for every library's parameter trees."""

import sys
from typing import Any

import jax

PyTree = Any


def leaf_paths(tree: PyTree) -> list[str]:
    """Return one path per leaf, in the order of `jax.tree.leaves`.

    Keys are joined by `/`. An index below a name is written as Flax linen names the items of a
    list: `blocks_0/attention/kernel`, so that a list of modules in NNX or Equinox has the same
    paths as in linen. The box of an NNX `Variable` is not part of the path.
    """
    boxes = _nnx_variable_types()
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, boxes))
    return [name for path, node in nodes for name in [_join(path)] * len(jax.tree.leaves(node))]


def layer_of(path: str) -> str:
    """Return the path of the module that owns a leaf; `""` is the outermost module."""
    return path.rpartition("/")[0]


def _join(path: tuple[Any, ...]) -> str:
    joined = ""
    for key in path:
        part = jax.tree_util.keystr((key,), simple=True)
        is_index = part.isdigit() and not isinstance(getattr(key, "key", None), str)
        joined += ("_" if is_index else "/") + part if joined else part
    return joined


def _nnx_variable_types() -> tuple[type, ...]:
    # Only a program that has imported Flax NNX can hold its variables: never import it here.
    nnx = sys.modules.get("flax.nnx")
    names = ("Variable", "VariableState")
    return tuple(vars(nnx)[name] for name in names if name in vars(nnx)) if nnx else ()
