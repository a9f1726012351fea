"""Checks of what the measurements of the Hessian are given."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax import _checks, _selection

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


def dimension(mask: _selection.Mask, params: PyTree) -> int:
    """Return the number of real coordinates under a mask."""
    _selection.check_mask(mask)
    total = 0
    pairs = zip(jax.tree.leaves(params), _selection.selected_leaves(mask, params), strict=True)
    for leaf, selected in pairs:
        elements = math.prod(jnp.shape(leaf)) * (2 if jnp.iscomplexobj(leaf) else 1)
        if isinstance(selected, bool):
            total += elements * selected
        else:
            total += elements // len(selected) * int(np.sum(selected))
    return total


def size(num_matvecs: int | None, default: int, dimension: int) -> int:
    """Return the dimension of the Krylov space: as asked for, or by default."""
    if num_matvecs is None:
        return min(default, dimension)
    _checks.check_integer("num_matvecs", num_matvecs, at_least=1)
    if num_matvecs > dimension:
        raise ValueError(
            f"num_matvecs={num_matvecs} is more than the {dimension} parameters under the mask, "
            f"all that a Krylov space can have. num_matvecs={dimension} gives the exact spectrum."
        )
    return int(num_matvecs)
