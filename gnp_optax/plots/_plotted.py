"""What a plot is given: numbers of the right shape, as NumPy arrays."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def floats(name: str, values: Any, axes: tuple[str, ...]) -> Floats:
    """Return `values` in float64, or raise unless they are numbers with one dimension per axis."""
    wanted = "(" + ", ".join(axes) + ("," if len(axes) == 1 else "") + ")"
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be an array of numbers of shape {wanted}, got {type(values).__name__}."
        ) from error
    if found.ndim != len(axes) or not found.size:
        raise ValueError(f"{name} must have the shape {wanted}, got {found.shape}.")
    return found


def coordinates(name: str, values: Any) -> Floats:
    """Return one axis' values, or raise unless they are finite and increase."""
    found = floats(name, values, ("n",))
    if not np.isfinite(found).all() or (np.diff(found) <= 0).any():
        raise ValueError(f"{name} must be finite and increase from one point to the next.")
    return found


def check_shape(name: str, values: Floats, shape: tuple[int, ...], what: str) -> None:
    """Raise unless `values` has the shape that the other arguments call for."""
    if values.shape != shape:
        raise ValueError(f"{name} must have the shape {what} = {shape}, got {values.shape}.")


def without_infinities(name: str, values: Floats) -> Floats:
    """Return `values` with NaN for all that is not finite, or raise if nothing is.

    A landscape overflows far from the minimum. NaN is left out of a drawing; an infinity would
    stretch its axis.
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(f"{name} are all infinite or NaN: there is nothing to draw.")
    return np.where(finite, values, np.nan)
