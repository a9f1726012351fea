"""What measurements are given beside the loss and its arguments: checks and defaults."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax._core import checks, numerics, selection

PyTree = Any


def checked_key(name: str, key: Any) -> jax.Array:
    """Return a random key, raising unless it is one."""
    is_key = hasattr(key, "dtype") and (
        (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ())
        or (key.dtype == jnp.uint32 and jnp.ndim(key) == 1)
    )
    if not is_key:
        raise TypeError(
            f"gnp.diagnostics.{name} needs one random key: key=jax.random.key(0); got {key!r}."
        )
    return key


def dimension(mask: selection.Mask, params: PyTree) -> int:
    """Return the number of real coordinates under a mask."""
    selection.check_mask(mask)
    total = 0
    pairs = zip(jax.tree.leaves(params), selection.selected_leaves(mask, params), strict=True)
    for leaf, selected in pairs:
        elements = math.prod(jnp.shape(leaf)) * (2 if jnp.iscomplexobj(leaf) else 1)
        if isinstance(selected, bool):
            total += elements * selected
        else:
            total += elements // selected.size * int(np.sum(selected))
    return total


def krylov_size(num_matvecs: int | None, default: int, dimension: int) -> int:
    """Return the dimension of the Krylov space: as asked for, or by default."""
    if num_matvecs is None:
        return min(default, dimension)
    checks.check_integer("num_matvecs", num_matvecs, at_least=1)
    if num_matvecs > dimension:
        raise ValueError(
            f"num_matvecs={num_matvecs} is more than the {dimension} parameters under the mask, "
            f"all that a Krylov space can have. num_matvecs={dimension} gives the exact spectrum."
        )
    return int(num_matvecs)


def scalar(value: jax.typing.ArrayLike) -> jax.Array:
    """Return a scalar in the widest real type that there is."""
    return jnp.asarray(value, jax.dtypes.canonicalize_dtype(float))


def check_like(params: PyTree, name: str, tree: PyTree) -> None:
    """Raise unless a tree has the structure and the shapes of the parameters."""
    checks.check_parameters((params, tree))
    expected: Any = jax.tree.structure(params)
    structure: Any = jax.tree.structure(tree)
    if structure != expected:
        raise ValueError(
            f"{name} must be a tree like the parameters. {name}: {structure}. Parameters: "
            f"{expected}."
        )
    paths = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), w in zip(paths, jax.tree.leaves(params), strict=True):
        if jnp.shape(leaf) != jnp.shape(w):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has the shape {jnp.shape(leaf)}, but the "
                f"parameter {jnp.shape(w)}. Of eigenvectors take one: "
                f"jax.tree.map(lambda v: v[0], found.eigenvectors)."
            )


def coordinates(name: str, values: jax.typing.ArrayLike) -> jax.Array:
    """Return a vector of real numbers, raising for what is none."""
    if isinstance(values, (list, tuple)):
        values = np.asarray(values)
    if jnp.ndim(values) != 1 or jnp.iscomplexobj(values):
        raise ValueError(
            f"{name} must be a vector of real numbers, such as jnp.linspace(-1, 1, 21); got the "
            f"shape {jnp.shape(values)}."
        )
    return numerics.widen(values)
