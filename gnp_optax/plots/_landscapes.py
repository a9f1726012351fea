"""The loss along a line and over a plane through the parameters."""

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jax.typing import ArrayLike
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from mpl_toolkits.mplot3d import Axes3D

from gnp_optax._core import checks
from gnp_optax.plots import _curves, _plotted

Scale = Literal["linear", "log"]


class Line(Protocol):
    """Losses `(n,)` at distances `(n,)` from the parameters."""

    @property
    def distances(self) -> ArrayLike: ...

    @property
    def losses(self) -> ArrayLike: ...


class Path(Protocol):
    """Losses `(n,)` at positions `(n,)` between two solutions, at 0 and at 1."""

    @property
    def positions(self) -> ArrayLike: ...

    @property
    def losses(self) -> ArrayLike: ...


class Surface(Protocol):
    """Losses `(m, n)` on a grid: `losses[i, j]` is that at `(x[j], y[i])`."""

    @property
    def x(self) -> ArrayLike: ...

    @property
    def y(self) -> ArrayLike: ...

    @property
    def losses(self) -> ArrayLike: ...


def loss_line(
    ax: Axes, line: Line | Path, *, label: str | None = None, style: _curves.Style | None = None
) -> Axes:
    """Draw the loss along a line through the parameters, or between two solutions.

    Where the loss is infinite or NaN, the curve is interrupted.

    Args:
        ax: Axes to draw into. To compare minima, call again with the same axes and another `label`,
            then `ax.legend()`.
        line: Distances, or positions between two solutions, and losses, all of shape `(n,)`; the
            distances increase. It is what `loss_along` and `loss_between` return.
        label: Name of the curve in the legend.
        style: Colour and dashes; by default those of `curve_style`, by the lines already there.

    Returns:
        `ax`.

    Raises:
        TypeError: If distances or losses are not numbers.
        ValueError: If their shapes do not fit, the distances do not increase, or no loss is finite.

    Example:
        >>> from types import SimpleNamespace
        >>> from matplotlib.figure import Figure
        >>> line = SimpleNamespace(distances=[-1.0, 0.0, 1.0], losses=[2.0, 1.0, float("inf")])
        >>> loss_line(Figure().subplots(), line).lines[0].get_ydata().tolist()
        [2.0, 1.0, nan]
    """
    name = "positions" if hasattr(line, "positions") else "distances"
    at = _plotted.coordinates(name, getattr(line, name))
    losses = _plotted.floats("losses", line.losses, ("n",))
    _plotted.check_shape("losses", losses, at.shape, f"of {name}")
    _curves.draw(ax, at, _plotted.without_infinities("losses", losses), label, style)
    where = {
        "distances": "distance from the parameters",
        "positions": "position (0: start, 1: end)",
    }
    ax.set(xlabel=where[name], ylabel="loss")
    _curves.tidy(ax)
    return ax


def loss_contour(
    ax: Axes, surface: Surface, *, levels: int | ArrayLike = 8, scale: Scale = "linear"
) -> Axes:
    """Draw contour lines of the loss over a plane, each labelled with its loss.

    A cross marks the origin, which is where the parameters are. Where the loss is infinite or NaN,
    no line is drawn.

    Args:
        ax: Axes to draw into.
        surface: Coordinates `x (n,)` and `y (m,)`, which increase, and losses `(m, n)`.
        levels: About how many lines to draw, at round losses; or the losses themselves, increasing.
        scale: `"log"` spaces levels and colours by ratio: for a loss that grows by orders of
            magnitude.

    Returns:
        `ax`.

    Raises:
        TypeError: If coordinates, losses or levels are not numbers.
        ValueError: If the shapes do not fit, if coordinates or levels do not increase, if no loss
            is finite or all are equal, or with `scale="log"` if one is not positive.

    Example:
        >>> from types import SimpleNamespace
        >>> from matplotlib.figure import Figure
        >>> x = np.linspace(-1, 1, 21)
        >>> surface = SimpleNamespace(x=x, y=x, losses=x**2 + 4 * x[:, None] ** 2)
        >>> ax = loss_contour(Figure().subplots(), surface, levels=[0.5, 1.0, 2.0])
        >>> ax.collections[0].levels.tolist()
        [0.5, 1.0, 2.0]
    """
    plane = _checked(surface, scale)
    heights = _levels(plane.losses, levels, scale)
    norm = (LogNorm if scale == "log" else Normalize)(heights[0], heights[-1])
    lines = ax.contour(
        plane.x,
        plane.y,
        np.ma.masked_invalid(plane.losses),
        levels=heights,
        norm=norm,
        cmap=_dark_viridis(),
        linewidths=1.2,
    )
    ax.clabel(lines, fmt="%g", fontsize=8)
    ax.scatter([0.0], [0.0], marker="+", s=60, color="black", linewidths=1.5, zorder=3)
    ax.set(xlabel="direction 1", ylabel="direction 2", aspect="equal")
    # A little wider than the plane: a label at the end of a line would lie across the frame.
    ax.set(xlim=_widened(plane.x), ylim=_widened(plane.y))
    ax.locator_params(nbins=5)
    return ax


def loss_surface(ax: Axes3D, surface: Surface, *, scale: Scale = "linear") -> Axes3D:
    """Draw the loss over a plane as a surface in three dimensions.

    For reading off values, `loss_contour` is the better picture. Where the loss is infinite or NaN,
    the surface has a hole.

    Args:
        ax: Axes with `projection="3d"` to draw into.
        surface: Coordinates `x (n,)` and `y (m,)`, which increase, and losses `(m, n)`.
        scale: `"log"` draws the logarithm of the loss to base 10, and says so on the axis.

    Returns:
        `ax`.

    Raises:
        TypeError: If `ax` is flat, or coordinates or losses are not numbers.
        ValueError: If the shapes do not fit, if coordinates do not increase, if no loss is finite,
            or with `scale="log"` if one is not positive.

    Example:
        >>> from types import SimpleNamespace
        >>> from matplotlib.figure import Figure
        >>> x = np.linspace(-1, 1, 21)
        >>> surface = SimpleNamespace(x=x, y=x, losses=x**2 + 4 * x[:, None] ** 2)
        >>> loss_surface(Figure().add_subplot(projection="3d"), surface).get_zlabel()
        'loss'
    """
    if not isinstance(ax, Axes3D):
        raise TypeError(
            "loss_surface needs axes in three dimensions: ax = figure.add_subplot(projection='3d')."
        )
    plane = _checked(surface, scale)
    heights = np.log10(plane.losses) if scale == "log" else plane.losses
    x, y = np.meshgrid(plane.x, plane.y)
    mesh = {"edgecolor": (0, 0, 0, 0.4), "linewidth": 0.2}
    # Every point is drawn: by default matplotlib leaves out all but 50 rows and columns.
    ax.plot_surface(x, y, heights, cmap="viridis", rstride=1, cstride=1, **mesh)
    ax.set_xlabel("direction 1", labelpad=2)
    ax.set_ylabel("direction 2", labelpad=2)
    ax.zaxis.set_rotate_label(False)
    ax.set_zlabel("log10 of the loss" if scale == "log" else "loss", rotation=90, labelpad=0)
    ax.tick_params(labelsize=8, pad=-1)
    ax.locator_params(nbins=5)
    numbers = ScalarFormatter()
    # Longer ones would lie across the axis.
    numbers.set_powerlimits((-2, 3))
    ax.zaxis.set_major_formatter(numbers)
    # The minimum lies behind the nearest corner otherwise.
    ax.view_init(elev=35, azim=-60)
    # Leaves room for the labels, which layouts do not know of.
    ax.set_box_aspect(None, zoom=0.85)
    return ax


class _Plane(NamedTuple):
    x: _plotted.Floats
    y: _plotted.Floats
    losses: _plotted.Floats


def _checked(surface: Surface, scale: Scale) -> _Plane:
    if scale not in ("linear", "log"):
        raise ValueError(f"scale must be 'linear' or 'log', got {scale!r}.")
    x = _plotted.coordinates("x", surface.x)
    y = _plotted.coordinates("y", surface.y)
    losses = _plotted.floats("losses", surface.losses, ("m", "n"))
    _plotted.check_shape("losses", losses, (len(y), len(x)), "(len(y), len(x))")
    if min(losses.shape) < 2:
        raise ValueError(f"A surface needs two points each way, got losses of {losses.shape}.")
    losses = _plotted.without_infinities("losses", losses)
    if scale == "log" and np.nanmin(losses) <= 0:
        raise ValueError(
            f"scale='log' needs positive losses, but the smallest is {np.nanmin(losses):g}. Leave "
            f"it out, or draw the loss above a bound: surface._replace(losses=losses - bound)."
        )
    return _Plane(x, y, losses)


def _levels(losses: _plotted.Floats, levels: Any, scale: Scale) -> _plotted.Floats:
    if np.ndim(levels):
        return _plotted.coordinates("levels", levels)
    checks.check_integer("levels", levels, at_least=1)
    low, high = np.nanmin(losses), np.nanmax(losses)
    if scale == "log":
        spaced = np.geomspace(low, high, int(levels) + 2)[1:-1]
        # Rounded, so that the labels are true.
        found = np.unique([float(f"{level:.2g}") for level in spaced])
    else:
        found = np.array(MaxNLocator(int(levels)).tick_values(low, high))
    found = found[(low < found) & (found < high)]
    if not len(found):
        raise ValueError(f"All losses are about {low:g}: give levels, the losses to be drawn.")
    return found


def _widened(values: _plotted.Floats) -> tuple[float, float]:
    margin = 0.03 * float(np.ptp(values))
    return float(values[0]) - margin, float(values[-1]) + margin


def _dark_viridis() -> ListedColormap:
    # Without its yellow end, which is too pale for a line on white paper.
    return ListedColormap(colormaps["viridis"](np.linspace(0, 0.65, 256)))
