"""A map of the layers' gradient norms over training."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator

from gnp_optax._core import checks
from gnp_optax.plots import _plotted

# Of the layers' names: their size and what a row takes, in points, and how many characters.
_SIZE, _ROW, _LENGTH = 8, 10, 16


class LayerNorms(Protocol):
    """Norms `(layers,)` of the layers of these paths, at one time."""

    @property
    def paths(self) -> Sequence[str]: ...

    @property
    def norms(self) -> ArrayLike: ...


def layer_norms(
    ax: Axes,
    paths: Sequence[str] | Sequence[LayerNorms],
    norms: ArrayLike | Sequence[LayerNorms] | None = None,
    *,
    epochs: ArrayLike | None = None,
    selected: ArrayLike | None = None,
    limits: tuple[float, float] | None = None,
) -> Axes:
    """Draw the gradient norms of the layers over training as a map of logarithmic colours.

    The first path is at the top: give the paths from the network's input to its output, then the
    input is at the top and the output at the bottom. (JAX sorts the keys of a dict: `block_10`
    comes before `block_2`.) A norm that is 0 or not finite is hatched instead of coloured. Long
    paths are shortened to what tells them apart, and where there are more than fit, only every
    second, third, ... is written. A colour bar is added to the figure.

    Args:
        ax: Axes to draw into.
        paths: The layers to draw, in this order; or, in place of both, one
            `LayerNorms(paths, norms)` per time, of which all layers are drawn.
        norms: Gradient norms of shape `(times, layers)`, with columns in the order of `paths`; or
            one `LayerNorms(paths, norms)` per time, of which the layers named by `paths` are drawn.
        epochs: When the norms were taken, shape `(times,)`, increasing; by default 1, 2, 3, ...
        selected: Booleans of shape `(times, layers)`, in the order of `paths`: the layers that were
            perturbed, which are marked with dots.
        limits: The norms at both ends of the colours, for several maps to have the same; by default
            the smallest and the largest.

    Returns:
        `ax`.

    Raises:
        TypeError: If norms or epochs are not numbers, or `selected` holds anything but booleans.
        ValueError: If the shapes do not fit, if a path comes twice or is not in `norms`, if a norm
            is negative or none is positive, or if `epochs` or `limits` do not increase.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure(layout="constrained").subplots()
        >>> ax = layer_norms(ax, ["embed", "head"], [[0.0, 1.0], [0.1, 2.0], [0.3, 4.0]])
        >>> ax.collections[0].get_array().tolist()  # layers x times
        [[None, 0.1, 0.3], [1.0, 2.0, 4.0]]
    """
    order: Any = paths if norms is not None else _paths(paths)
    names = _shortened(order)
    table = _table(list(order), paths if norms is None else norms)
    at = (
        np.arange(1.0, len(table) + 1) if epochs is None else _plotted.coordinates("epochs", epochs)
    )
    _plotted.check_shape("epochs", at, (len(table),), "(times,)")
    drawn = np.ma.masked_where(~(np.isfinite(table) & (table > 0)), table)
    _draw_map(ax, at, drawn, limits)
    if selected is not None:
        _draw_dots(ax, at, _checked_selection(selected, table.shape))
    ax.set(xlabel="epoch", ylabel="layer", ylim=(len(names) - 0.5, -0.5))
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.yaxis.set_major_locator(_Rows(len(names)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda row, _: names[round(row)]))
    ax.tick_params(axis="y", labelsize=_SIZE)
    return ax


class _Rows(Locator):
    """As many rows as have room for their names, at whatever size the axes end up with."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self) -> Any:
        return self.tick_values(0, self.rows)

    def tick_values(self, vmin: float, vmax: float) -> Any:
        del vmin, vmax
        axes: Any = self.axis.axes  # type: ignore[union-attr]
        points = axes.bbox.height * 72 / axes.figure.dpi
        return np.arange(0, self.rows, max(1, int(np.ceil(self.rows * _ROW / points))))


def _table(paths: list[str], norms: Any) -> _plotted.Floats:
    if isinstance(norms, Sequence) and any(hasattr(one, "paths") for one in norms):
        norms = [_row(paths, one) for one in norms]
    table = _plotted.floats("norms", norms, ("times", "layers"))
    _plotted.check_shape("norms", table, (len(table), len(paths)), "(times, len(paths))")
    if (table < 0).any():
        raise ValueError(f"norms must not be negative, but the smallest is {np.nanmin(table):g}.")
    if not (np.isfinite(table) & (table > 0)).any():
        raise ValueError("No norm is positive and finite: there is nothing to draw.")
    return table


def _row(paths: list[str], one: LayerNorms) -> list[float]:
    values = _plotted.floats("norms", one.norms, ("layers",))
    _plotted.check_shape("norms", values, (len(one.paths),), "(len(paths),)")
    found = dict(zip(one.paths, values.tolist(), strict=True))
    missing = [path for path in paths if path not in found]
    if missing:
        raise ValueError(
            f"norms has no layer {checks.listed(missing)}; it has {checks.listed(found)}."
        )
    return [found[path] for path in paths]


def _paths(norms: Any) -> Sequence[str]:
    if not isinstance(norms, Sequence) or not all(hasattr(one, "paths") for one in norms):
        raise TypeError(
            "Without norms, layer_norms draws one LayerNorms(paths, norms) per time: "
            "layer_norms(ax, [found]). Of arrays it needs the names: layer_norms(ax, paths, norms)."
        )
    if not norms:
        raise ValueError("There are no norms: nothing to draw.")
    paths: Sequence[str] = norms[0].paths
    return paths


def _checked_limits(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = _plotted.coordinates("limits", limits)
    if low <= 0:
        raise ValueError(f"limits must be positive, for logarithmic colours, got {limits!r}.")
    return float(low), float(high)


def _checked_selection(selected: Any, shape: tuple[int, ...]) -> Any:
    chosen = np.asarray(selected)
    if chosen.dtype != np.bool_:
        raise TypeError(f"selected must hold booleans, got {chosen.dtype}.")
    if chosen.shape != shape:
        raise ValueError(
            f"selected must have the shape of norms, (times, layers) = {shape}, got {chosen.shape}."
        )
    return chosen


def _draw_map(
    ax: Axes, epochs: _plotted.Floats, norms: Any, limits: tuple[float, float] | None
) -> None:
    rows = np.arange(norms.shape[1] + 1) - 0.5
    scale = LogNorm(*((norms.min(), norms.max()) if limits is None else _checked_limits(limits)))
    cells = ax.pcolormesh(_edges(epochs), rows, norms.T, norm=scale, cmap="viridis")
    # What has no colour shows the background.
    ax.patch.set(hatch="//////", edgecolor="#999999", linewidth=0)
    bar = ax.figure.colorbar(cells, ax=ax, pad=0.03, aspect=30)
    absent = "\n(hatched: 0 or not finite)" if np.ma.is_masked(norms) else ""
    bar.set_label(f"gradient norm{absent}", size=_SIZE)
    bar.ax.tick_params(which="both", labelsize=_SIZE)


def _edges(centres: _plotted.Floats) -> _plotted.Floats:
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    inner = (centres[1:] + centres[:-1]) / 2
    return np.array([2 * centres[0] - inner[0], *inner, 2 * centres[-1] - inner[-1]])


def _draw_dots(ax: Axes, epochs: _plotted.Floats, selected: Any) -> None:
    times, layers = np.nonzero(selected)
    cell = min(ax.bbox.width, ax.bbox.height) * 72 / ax.figure.dpi / max(selected.shape)
    size = np.clip(0.6 * cell, 1.2, 4.0)
    dots: Any = {"color": "white", "edgecolors": "black", "linewidths": 0.4, "label": "perturbed"}
    ax.scatter(epochs[times], layers, s=size**2, **dots)


def _shortened(paths: Sequence[str]) -> list[str]:
    if isinstance(paths, str) or not all(isinstance(path, str) for path in paths):
        raise TypeError("paths must be a sequence of strings, one per layer.")
    twice = sorted(path for path, count in Counter(paths).items() if count > 1)
    if twice:
        raise ValueError(f"paths must differ, but these come more than once: {twice}.")
    split = [path.split("/") for path in paths]
    while len(split) > 1 and all(len(one) > 1 and one[0] == split[0][0] for one in split):
        split = [one[1:] for one in split]
    ways = [_elisions(modules) for modules in split]
    taken = Counter(name for names in ways for name in names)
    return [_best([name for name in names if taken[name] == 1]) or "(root)" for names in ways]


def _elisions(modules: list[str]) -> set[str]:
    """All ways to write a path with its last module and at most two of the others, or in full."""
    last = len(modules) - 1
    names = {"/".join(modules)}
    for kept in itertools.chain(*(itertools.combinations(range(last), k) for k in range(3))):
        shown, before = "", None
        for i in (*kept, last):
            if before is not None:
                shown += "/" if i == before + 1 else "/.../"
            shown, before = shown + modules[i], i
        names.add(shown)
    return names


def _best(names: list[str]) -> str:
    fitting = [name for name in names if len(name) <= _LENGTH]
    # By name, too: the order of a set differs from one process to the next.
    return (
        max(fitting, key=lambda n: (len(n), n))
        if fitting
        else min(names, key=lambda n: (len(n), n))
    )
