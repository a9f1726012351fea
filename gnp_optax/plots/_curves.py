"""Curves that are told apart by colour and by dashes: bands over runs, and schedules."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.typing import ArrayLike
from matplotlib.axes import Axes

from gnp_optax._core import checks
from gnp_optax.plots import _plotted


class Style(NamedTuple):
    """Colour and dashes of a curve, as matplotlib writes them."""

    color: str
    linestyle: Any = "-"


# Okabe and Ito's palette without its yellow, which is too pale for a line on white paper.
_COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# As many as have no common factor with the number of colours: 42 styles before one comes again.
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (2.5, 2.5)),
    (0, (5, 1.5, 1, 1.5, 1, 1.5)),
)


def curve_style(n: int) -> Style:
    """Return colour and dashes of the n-th of several curves.

    The first seven differ in colour, for colour-blind readers too, and neighbours differ in dashes,
    for black-and-white print. Every function here that draws a curve takes for `n` the number of
    lines that are on the axes already, unless it is given a style.

    Args:
        n: Number of the curve, from 0. After 42 the styles come again.

    Returns:
        The `Style`: `color` and `linestyle`, named as matplotlib's `Axes.plot` names them.

    Raises:
        TypeError: If `n` is not an integer.
        ValueError: If `n` is negative.

    Example:
        >>> curve_style(0)
        Style(color='#000000', linestyle='-')
        >>> curve_style(1).color
        '#D55E00'

    References:
        Okabe and Ito, "Color Universal Design", 2008: the palette.
    """
    checks.check_integer("n", n, at_least=0)
    return Style(_COLORS[n % len(_COLORS)], _DASHES[n % len(_DASHES)])


def band(
    ax: Axes, x: ArrayLike, values: ArrayLike, label: str, *, style: Style | None = None
) -> Axes:
    """Draw the mean over runs as a curve, in a band from the smallest run to the largest.

    Where a run is not finite, there is neither. The axes get no labels, since only you know what is
    drawn, and no legend: `ax.legend()`.

    Args:
        ax: Axes to draw into.
        x: Where the values were taken, such as epochs; shape `(n,)`, increasing.
        values: One row per run; shape `(runs, n)`.
        label: Name of the curve in the legend.
        style: Colour and dashes; by default those of `curve_style`, by the lines already there.

    Returns:
        `ax`.

    Raises:
        TypeError: If `x` or `values` are not numbers.
        ValueError: If the shapes do not fit, or `x` does not increase.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = band(Figure().subplots(), [1, 2], [[4.0, 2.0], [6.0, 3.0]], "SAM")
        >>> ax.lines[0].get_ydata().tolist()
        [5.0, 2.5]
    """
    x = _plotted.coordinates("x", x)
    runs = _plotted.floats("values", values, ("runs", "n"))
    _plotted.check_shape("values", runs, (len(runs), len(x)), "(runs, len(x))")
    runs = np.where(np.isfinite(runs), runs, np.nan)
    style = draw(ax, x, runs.mean(0), label, style)
    ax.fill_between(x, runs.min(0), runs.max(0), color=style.color, alpha=0.12, lw=0)
    return ax


def schedules(
    ax: Axes, schedules: Mapping[str, optax.ScalarOrSchedule], steps: int | ArrayLike
) -> Axes:
    """Draw schedules over the steps of the optimizer, with a legend.

    A value holds from its step until the next that is drawn.

    Args:
        ax: Axes to draw into.
        schedules: The name of each curve, and its schedule or number.
        steps: How many steps to draw, or which: integers of shape `(n,)`, increasing. Of a long
            training draw every hundredth: `range(0, 90_000, 100)`.

    Returns:
        `ax`.

    Raises:
        TypeError: If one of `schedules` is neither a schedule nor a number, or `steps` are not
            integers.
        ValueError: If there are no schedules or no steps, if `steps` do not increase, or if a
            schedule returns anything but one number a step.

    Example:
        >>> import gnp_optax as gnp
        >>> from matplotlib.figure import Figure
        >>> warmup = gnp.schedules.zero_warmup(0.8, warmup_steps=2)
        >>> ax = schedules(Figure().subplots(), {"zero-warmup": warmup, "none": 0.8}, 3)
        >>> ax.lines[0].get_ydata().round(2).tolist()
        [0.0, 0.0, 0.8]
    """
    if not schedules:
        raise ValueError("schedules is empty: there is nothing to draw.")
    at = _steps(steps)
    for name, schedule in schedules.items():
        draw(ax, at, _values(name, schedule, at), name, None, drawstyle="steps-post")
    ax.set(xlabel="step", ylabel="value")
    tidy(ax)
    ax.legend(frameon=False, fontsize=8)
    return ax


def draw(
    ax: Axes,
    x: Any,
    y: Any,
    label: str | None,
    style: Style | None,
    drawstyle: Any = "default",
) -> Style:
    """Draw one curve and return its style, which by default is the next on these axes."""
    style = curve_style(len(ax.lines)) if style is None else style
    # A single point makes no line.
    marker = "o" if len(x) == 1 else None
    line = {"color": style.color, "linestyle": style.linestyle, "lw": 1.8, "marker": marker}
    ax.plot(x, y, label=label, drawstyle=drawstyle, **line)
    return style


def tidy(ax: Axes) -> None:
    """Give the axes a faint grid and no frame at the top and on the right."""
    ax.grid(True, alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _steps(steps: Any) -> Any:
    if np.ndim(steps) == 0:
        checks.check_integer("steps", steps, at_least=1)
        return np.arange(int(steps))
    _plotted.coordinates("steps", steps)
    if np.asarray(steps).dtype.kind not in "iu":
        raise TypeError("steps must be integers: the optimizer's step counts.")
    return np.asarray(steps)


def _values(name: str, schedule: Any, steps: Any) -> _plotted.Floats:
    checks.check_scalar_or_schedule(f"schedules[{name!r}]", schedule)
    if not callable(schedule):
        return np.full(len(steps), float(schedule))
    # Mapped, since not every schedule takes an array of steps.
    return _plotted.floats(f"schedules[{name!r}]", jax.vmap(schedule)(steps), ("steps",))
