"""The spectral density of a Hessian, from Lanczos quadrature."""

from typing import Protocol

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes

from gnp_optax._core import checks
from gnp_optax.plots import _curves, _plotted


class Spectrum(Protocol):
    """Ritz values and quadrature weights, one row per random vector; a row of weights sums to 1."""

    @property
    def eigenvalues(self) -> ArrayLike: ...

    @property
    def weights(self) -> ArrayLike: ...


def spectrum(
    ax: Axes,
    spectrum: Spectrum,
    *,
    width: float | None = None,
    floor: float = 1e-8,
    label: str | None = None,
    style: _curves.Style | None = None,
) -> Axes:
    r"""Draw the spectral density of a Hessian on a logarithmic axis.

    `density(t) = mean_s sum_i weights[s, i] N(t; eigenvalues[s, i], width^2)`: each eigenvalue is
    smoothed to a Gaussian of standard deviation `width`, and the whole integrates to 1. One
    eigenvalue of a model with P parameters has the weight `1 / P`: the axis has to reach that far
    down to show it.

    Args:
        ax: Axes to draw into. To compare minima, call again with the same axes and another `label`,
            then `ax.legend()`.
        spectrum: Eigenvalues and weights, both of shape `(num_samples, num_matvecs)`.
        width: Standard deviation of the smoothing, in units of the eigenvalues; by default 1 % of
            their range. The height of a peak depends on it: to compare, give both the same.
        floor: Smallest density drawn, as a share of the largest.
        label: Name of the curve in the legend.
        style: Colour and dashes; by default those of `curve_style`, by the lines already there.

    Returns:
        `ax`.

    Raises:
        TypeError: If eigenvalues or weights are not numbers.
        ValueError: If their shapes do not fit, if they are not finite, if weights are negative or a
            row of them does not sum to 1, or if `width` or `floor` is out of range.

    Example:
        >>> from types import SimpleNamespace
        >>> from matplotlib.figure import Figure
        >>> found = SimpleNamespace(eigenvalues=[[0.0, 9.0]], weights=[[0.99, 0.01]])
        >>> ax = spectrum(Figure().subplots(), found, width=0.1, label="SAM")
        >>> ax.get_yscale(), ax.get_xlabel()
        ('log', 'eigenvalue of the Hessian')

    References:
        Ghorbani, Krishnan and Xiao, "An Investigation into Neural Net Optimization via Hessian
        Eigenvalue Density", ICML 2019, section 2.
    """
    eigenvalues, weights = _checked(spectrum)
    if not 0 < floor < 1:
        raise ValueError(f"floor must lie between 0 and 1, got {floor!r}.")
    width = _default_width(eigenvalues) if width is None else _checked_width(width)
    # To where a Gaussian falls below the floor, but far enough that it integrates to 1.
    reach = width * max(5.0, np.sqrt(-2 * np.log(floor)))
    low, high = eigenvalues.min() - reach, eigenvalues.max() + reach
    at = np.linspace(low, high, int(np.ceil(4 * (high - low) / width)) + 1)
    density = _smoothed(at, eigenvalues, weights, width)
    lowest = floor * density.max()
    _open_axis(ax, lowest, 2 * density.max())
    # Where it is smaller, the curve leaves the axes.
    _curves.draw(ax, at, np.maximum(density, lowest / 10), label, style)
    ax.set(xlabel="eigenvalue of the Hessian", ylabel="density")
    _curves.tidy(ax)
    return ax


def _checked(spectrum: Spectrum) -> tuple[_plotted.Floats, _plotted.Floats]:
    axes = ("num_samples", "num_matvecs")
    eigenvalues = _plotted.floats("eigenvalues", spectrum.eigenvalues, axes)
    weights = _plotted.floats("weights", spectrum.weights, axes)
    _plotted.check_shape("weights", weights, eigenvalues.shape, "of eigenvalues")
    if not np.isfinite(eigenvalues).all() or not np.isfinite(weights).all():
        raise ValueError("The spectrum is not finite: the loss or its curvature overflows there.")
    # Half-precision sums are that far off; a forgotten normalisation is farther.
    if (weights < 0).any() or not np.allclose(weights.sum(1), 1, atol=1e-2):
        raise ValueError("weights must not be negative, and each row of them must sum to 1.")
    return eigenvalues, weights


def _checked_width(width: float) -> float:
    checks.check_scalar("width", width)
    if width == 0:
        raise ValueError("width must be positive: it is the smoothing's standard deviation.")
    return float(width)


def _default_width(eigenvalues: _plotted.Floats) -> float:
    # Equal eigenvalues have no range: then 1 % of their size, or of 1.
    return 0.01 * float(np.ptp(eigenvalues) or np.abs(eigenvalues).max() or 1.0)


def _smoothed(
    at: _plotted.Floats, eigenvalues: _plotted.Floats, weights: _plotted.Floats, width: float
) -> _plotted.Floats:
    total = np.zeros_like(at)
    # One sample at a time: all at once need num_samples times the memory.
    for row, weight in zip(eigenvalues, weights, strict=True):
        total += np.exp(-(((at[:, None] - row) / width) ** 2) / 2) @ weight
    return total / (len(weights) * width * np.sqrt(2 * np.pi))


def _open_axis(ax: Axes, low: float, high: float) -> None:
    # A curve drawn before must keep its peak. Its floor gives way: a curve that ends above the axis
    # would look like a density that is constant there.
    if ax.lines and ax.get_yscale() == "log":
        low, high = np.maximum((low, high), ax.get_ylim())
    ax.set_yscale("log")
    ax.set_ylim(low, high)
