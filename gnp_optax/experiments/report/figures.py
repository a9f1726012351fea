"""The figures of a comparison."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from gnp_optax import plots
from gnp_optax.experiments.report import drawing
from gnp_optax.experiments.report.table import STYLES, Runs, mean_over_epochs, methods
from gnp_optax.experiments.training.records import Metrics
from gnp_optax.plots import _curves

_MARKERS = "osD^vPX<>hp*"
_EARLY = (
    ("gradient_norm", "norm of the gradient"),
    ("second_moment_norm", "norm of the second moment"),
    ("learning_rate_log_variance", "variance of log adaptive learning rate"),
)


def draw(runs: Runs, title: str, warmup_epochs: int, folder: Path) -> list[str]:
    """Draw what the runs have to show into a folder, and return the names of the files."""
    curves(runs, title, warmup_epochs, folder / "curves.png")
    names = ["curves.png"]
    if any("second_moment_norm" in epoch["early"] for run in runs.values() for epoch in run):
        early(runs, title, warmup_epochs, folder / "early.png")
        names.append("early.png")
    if any(run[-1]["perturbed_layers"] for run in runs.values()):
        layers(runs, title, folder / "layers.png")
        tradeoff(runs, title, folder / "tradeoff.png")
        names += ["layers.png", "tradeoff.png"]
    return names


def curves(runs: Runs, title: str, warmup_epochs: int, path: Path) -> None:
    """Draw test error and gradient norm over the epochs: the mean over seeds, and a band.

    The band reaches from the smallest to the largest of the seeds.
    """
    canvas, panels = drawing.canvas(2, 10.0, 4.8)
    names = (("test_error", "test error, %"), ("gradient_norm", "gradient norm"))
    for axes, (key, label) in zip(panels, names, strict=True):
        for method in methods(runs):
            values = np.array([[e[key] for e in run] for run in _runs_of(runs, method)])
            measured = np.isfinite(values).any(axis=0)
            _band(axes, 1 + np.flatnonzero(measured), values[:, measured], method)
        positive = any(epoch[key] > 0 for run in runs.values() for epoch in run)
        _finish(axes, label, warmup_epochs, positive)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    drawing.save(canvas, panels[0], title, path, columns=4)


def early(runs: Runs, title: str, warmup_epochs: int, path: Path) -> None:
    """Draw what an adaptive optimizer sees in the warmup and as long again."""
    canvas, panels = drawing.canvas(len(_EARLY), 5.0 * len(_EARLY), 4.8)
    for axes, (key, label) in zip(panels, _EARLY, strict=True):
        for method in methods(runs):
            chosen = [run[: max(2 * warmup_epochs, 1)] for run in _runs_of(runs, method)]
            values = np.array([[x for epoch in run for x in epoch["early"][key]] for run in chosen])
            each = len(chosen[0][0]["early"][key])
            _band(axes, np.arange(values.shape[1]) / each, values, method)
        _finish(axes, label, warmup_epochs, is_log=True)
    drawing.save(canvas, panels[0], title, path, columns=4)


def layers(runs: Runs, title: str, path: Path) -> None:
    """Draw the norm of each layer's gradient over the epochs of each method's first seed.

    Dots mark the layers that were penalized.
    """
    shown = [m for m in methods(runs) if m == "plain" or m.startswith("layerwise")]
    columns = min(len(shown), 3)
    rows = -(-len(shown) // columns)
    canvas, panels = drawing.canvas(len(shown), 5.0 * columns, 7.0 * rows, rows=rows)
    for axes, method in zip(panels, shown, strict=True):
        run = _runs_of(runs, method)[0]
        names = sorted(run[0]["layer_norms"], key=_natural)
        norms = np.array([[epoch["layer_norms"][name] for name in names] for epoch in run])
        chosen = [epoch["perturbed_layers"] or () for epoch in run]
        selected = np.array([[name in layers for name in names] for layers in chosen])
        plots.layer_norms(axes, names, norms, selected=selected if selected.any() else None)
        axes.set_title(STYLES[method][0], fontsize=9)
    canvas.suptitle(f"{title.partition(',')[0]}, first seed", fontsize=11)
    canvas.savefig(path)


def tradeoff(runs: Runs, title: str, path: Path) -> None:
    """Draw the test error against the cost of a step, with the spread of the seeds."""
    canvas, (axes,) = drawing.canvas(1, 6.0, 5.6)
    costs: list[float] = []
    for i, method in enumerate(methods(runs)):
        label, color, _ = STYLES[method]
        last = [run[-1]["test_error"] for run in _runs_of(runs, method)]
        mean = np.mean(last)
        spread = [[mean - np.min(last)], [np.max(last) - mean]]
        cost = mean_over_epochs(runs, method, "gradients_per_step")
        costs.append(cost)
        # Where methods cost the same, beside each other.
        cost += 0.012 * (sum(abs(cost - other) < 0.01 for other in costs) - 1)
        marker: Any = {"fmt": _MARKERS[i % len(_MARKERS)], "color": color, "label": label}
        axes.errorbar([cost], [mean], yerr=spread, capsize=3, **marker)
    axes.set(xlabel="cost of a step, in plain gradients", ylabel="test error, %")
    _curves.tidy(axes)
    drawing.save(canvas, axes, title, path, columns=2)


def _runs_of(runs: Runs, method: str) -> list[list[Metrics]]:
    return [run for (name, _), run in runs.items() if name == method]


def _band(axes: Any, x: Any, values: Any, method: str) -> None:
    name, color, dashes = STYLES[method]
    plots.band(axes, x, values, name, style=plots.Style(color, dashes))


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
    first = ("", "class_token", "embedding", "patches", "stem", "norm_stem")
    place = 1 if number.isdigit() else 0 if part in first else 3 if part == "head" else 2
    return place, int(number) if place == 1 else 0, part, rest


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with 2, 5, 10, 20, ... instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
