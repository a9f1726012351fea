"""The figures of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from gnp_optax import plots
from gnp_optax.experiments.models import BEFORE_BLOCKS
from gnp_optax.experiments.report import drawing
from gnp_optax.experiments.report.summary import Row
from gnp_optax.experiments.report.table import STYLES, Runs, methods
from gnp_optax.experiments.training.records import Metrics
from gnp_optax.plots import _curves

# Told apart in grey and at half size; after the last they come again, hollow.
_MARKERS = "os^DvX<*>P"
_EARLY = (
    ("gradient_norm", "norm of the gradient"),
    ("second_moment_norm", "norm of the second moment"),
    ("learning_rate_log_variance", "variance of log adaptive learning rate"),
)


def draw(
    runs: Runs, rows: Sequence[Row], title: str, warmup_epochs: int, folder: Path
) -> list[str]:
    """Draw what the runs have to show into a folder, and return the names of the files."""
    summary(rows, title, folder / "summary.png")
    curves(runs, title, warmup_epochs, folder / "curves.png")
    names = ["summary.png", "curves.png"]
    if any("second_moment_norm" in epoch["early"] for run in runs.values() for epoch in run):
        early(runs, title, warmup_epochs, folder / "early.png")
        names.append("early.png")
    if len({round(row["gradients_per_step"], 2) for row in rows}) > 1:
        tradeoff(rows, title, folder / "tradeoff.png")
        names.append("tradeoff.png")
    if any(m.startswith("layerwise") and run[-1]["layer_norms"] for (m, _), run in runs.items()):
        layers(runs, title, folder / "layers.png")
        names.append("layers.png")
    return names


def summary(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the test error by method: a dot a seed, the mean with its 95 % interval, and the cost.

    The best is at the top. Plain runs are grey; a line marks the best of them.
    """
    height = 1.2 + 0.3 * len(rows)
    canvas, (axes,) = drawing.canvas(1, 8.0, height)
    reference = next((row for row in rows if row["is_reference"]), None)
    if reference is not None:
        axes.axvline(reference["test_error"], color="#999999", lw=1.0, ls="--", zorder=0)
        at: Any = {"transform": axes.get_xaxis_transform(), "ha": "center", "color": "#777777"}
        axes.text(reference["test_error"], 1.01, "best plain", fontsize=9, **at)
    for place, row in enumerate(rows):
        color = "#777777" if row["method"].startswith("plain") else "#0072B2"
        errors = np.asarray(row["test_errors"])
        spread = np.linspace(-0.18, 0.18, len(errors)) if len(errors) > 1 else np.zeros(1)
        axes.scatter(errors, place + spread, s=9, color=color, alpha=0.45, lw=0)
        deviation = row["test_error_std"] or 0.0
        interval = _STUDENT.get(len(errors), 2.0) * deviation / len(errors) ** 0.5
        axes.errorbar(
            [row["test_error"]], [place], xerr=interval, fmt="o", color=color, ms=6, capsize=4
        )
    axes.set_yticks(range(len(rows)), [STYLES[row["method"]][0] for row in rows])
    axes.set(xlabel="test error, %", ylim=(len(rows) - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(8))
    _curves.tidy(axes)
    axes.grid(visible=False, axis="y")
    beside: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 9}
    for place, row in enumerate(rows):
        axes.text(1.02, place, f"{row['test_error']:.2f}", **beside)
        axes.text(1.12, place, f"{row['gradients_per_step']:.2f}", **beside)
    axes.text(1.02, -0.8, "mean", **{**beside, "color": "#555555"})
    axes.text(1.12, -0.8, "gradients / step", **{**beside, "color": "#555555"})
    axes.set_title(title, fontsize=11, loc="left", pad=18)
    drawing.write(canvas, path)


# Quantiles of Student's distribution, for the 95 % interval of the mean of so many.
_STUDENT = {2: 12.7, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def curves(runs: Runs, title: str, warmup_epochs: int, path: Path) -> None:
    """Draw test error and gradient norm over the epochs: the mean over seeds, and a band.

    The band reaches from the smallest to the largest of the seeds.
    """
    canvas, panels = drawing.canvas(2, 10.0, 4.8)
    names = (("test_error", "test error, %"), ("gradient_norm", "gradient norm"))
    for axes, (key, label) in zip(panels, names, strict=True):
        for i, method in enumerate(methods(runs)):
            values = np.array([[e[key] for e in run] for run in _runs_of(runs, method)])
            measured = np.isfinite(values).any(axis=0)
            _band(axes, 1 + np.flatnonzero(measured), values[:, measured], method, i)
        positive = any(epoch[key] > 0 for run in runs.values() for epoch in run)
        _finish(axes, label, warmup_epochs, positive)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    drawing.save(canvas, panels[0], title, path, columns=4)


def early(runs: Runs, title: str, warmup_epochs: int, path: Path) -> None:
    """Draw what an adaptive optimizer sees in the warmup and as long again: a point an epoch.

    Of plain training, GR with its warmups and SAM, as far as they were run: more are a tangle.
    """
    named = [m for m in methods(runs) if m in ("plain", "sam") or m.startswith("gr")]
    canvas, panels = drawing.canvas(len(_EARLY), 5.0 * len(_EARLY), 4.8)
    for axes, (key, label) in zip(panels, _EARLY, strict=True):
        for i, method in enumerate(named or methods(runs)):
            chosen = [[e for e in run if e["early"]] for run in _runs_of(runs, method)]
            values = np.array([[np.mean(e["early"][key]) for e in run] for run in chosen])
            _band(axes, np.arange(values.shape[1]) + 0.5, values, method, i)
        _finish(axes, label, warmup_epochs, is_log=True)
    drawing.save(canvas, panels[0], title, path, columns=4)


def layers(runs: Runs, title: str, path: Path) -> None:
    """Draw the norm of each layer's gradient over the epochs of each method's first seed.

    Dots mark the layers that were penalized.
    """
    shown = [m for m in methods(runs) if _runs_of(runs, m)[0][-1]["layer_norms"]]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    canvas, panels = drawing.canvas(len(shown), 5.0 * columns, 7.0 * rows, rows=rows)
    first = {method: _runs_of(runs, method)[0] for method in shown}
    names = sorted(first[shown[0]][0]["layer_norms"], key=_natural)
    every = [x for run in first.values() for epoch in run for x in epoch["layer_norms"].values()]
    positive = [x for x in every if 0 < x < np.inf]
    for axes, (method, run) in zip(panels, first.items(), strict=True):
        norms = np.array([[epoch["layer_norms"][name] for name in names] for epoch in run])
        chosen = [epoch["perturbed_layers"] or () for epoch in run]
        selected = np.array([[name in layers for name in names] for layers in chosen])
        dots = selected if selected.any() else None
        limits = min(positive), max(positive)  # in all panels the same colours
        plots.layer_norms(axes, names, norms, selected=dots, limits=limits)
        axes.set_title(STYLES[method][0], fontsize=9)
    canvas.suptitle(f"{title.partition(',')[0]}, first seed", fontsize=11)
    drawing.write(canvas, path)


def tradeoff(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the test error against the cost of a step; a bar is the standard error of the mean.

    A step of twice the epochs counts twice. The line is the frontier: nothing that costs less errs
    less.
    """
    canvas, (axes,) = drawing.canvas(1, 7.0, 5.6)
    points = []
    for i, row in enumerate(rows):
        label, color, _ = STYLES[row["method"]]
        error = (row["test_error_std"] or 0.0) / row["seeds"] ** 0.5
        cost = row["gradients_per_step"] * (2 if row["method"] == "plain-twice" else 1)
        points.append((cost, row["test_error"]))
        point: Any = {"color": color, "label": label, "linestyle": "none", "ms": 7, **_marker(i)}
        axes.errorbar([cost], [row["test_error"]], yerr=[error], capsize=3, **point)
    frontier = [p for p in points if all(q[0] > p[0] or q[1] >= p[1] for q in points)]
    axes.plot(*zip(*sorted(frontier), strict=True), color="#999999", lw=1.0, zorder=0)
    axes.set(xlabel="cost of a step, in plain gradients", ylabel="test error, %")
    _curves.tidy(axes)
    drawing.save(canvas, axes, title, path, columns=3)


def along(rows: Mapping[float, Mapping[str, Row]], over: str, metric: str, path: Path) -> None:
    """Draw a metric against an option, one line a method, with standard errors of the mean."""
    canvas, (axes,) = drawing.canvas(1, 7.0, 4.6)
    names = [m for m in STYLES if any(m in found for found in rows.values())]
    for i, method in enumerate(names):
        at = [value for value, found in rows.items() if method in found]
        values = [rows[value][method] for value in at]
        label, color, dashes = STYLES[method]
        bars = [
            (row["test_error_std"] or 0.0) / row["seeds"] ** 0.5 if metric == "test_error" else 0.0
            for row in values
        ]
        line: Any = {"color": color, "linestyle": dashes, **_marker(i)}
        axes.errorbar(
            at, [row[metric] for row in values], yerr=bars, label=label, ms=5, capsize=3, **line
        )
    axes.set(xlabel=over.replace("_", " "), ylabel=metric.replace("_", " ") + ", %")
    if min(rows) > 0 and max(rows) >= 8 * min(rows):
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(list(rows), [f"{value:g}" for value in rows])
    _curves.tidy(axes)
    drawing.save(canvas, axes, "", path, columns=3)


def _runs_of(runs: Runs, method: str) -> list[list[Metrics]]:
    return [run for (name, _), run in runs.items() if name == method]


def _marker(i: int) -> dict[str, Any]:
    """Return the marker of the i-th method of a figure, as matplotlib names its properties."""
    marker = {"marker": _MARKERS[i % len(_MARKERS)]}
    return marker if i < len(_MARKERS) else {**marker, "markerfacecolor": "white"}


def _band(axes: Any, x: Any, values: Any, method: str, i: int) -> None:
    name, color, dashes = STYLES[method]
    plots.band(axes, x, values, name, style=plots.Style(color, dashes))
    # Few markers, and not those of all curves above one another.
    axes.lines[-1].set(**_marker(i), markersize=5, markevery=(0.02 + 0.013 * i % 0.13, 0.13))


def _finish(axes: Any, label: str, warmup_epochs: int, is_log: bool) -> None:
    axes.set(xlabel="epoch", ylabel=label, yscale="log" if is_log else "linear")
    if warmup_epochs:
        at: Any = {"transform": axes.get_xaxis_transform(), "fontsize": 8, "va": "top"}
        axes.axvline(warmup_epochs, color="grey", lw=0.8, ls=":")
        axes.text(warmup_epochs, 1.0, " warmup ends", color="grey", **at)
    _curves.tidy(axes)
    if is_log:
        _plain_numbers(axes.yaxis)


def _natural(name: str) -> tuple[Any, ...]:
    """Order block_10 after block_2, and what is no block where the data flows through it."""
    part, _, rest = name.partition("/")
    number = part.rpartition("_")[2]
    place = 1 if number.isdigit() else 0 if part in BEFORE_BLOCKS else 3 if part == "head" else 2
    return place, int(number) if place == 1 else 0, part, rest


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with 2, 5, 10, 20, ... instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
