"""The table and the figure of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gnp_optax.experiments.records import Metrics, Run

Runs = Mapping[Run, list[Metrics]]

# Okabe and Ito's palette, made to be told apart by colour-blind readers; dashes tell the methods
# apart in black and white.
STYLES: dict[str, tuple[str, str, Any]] = {
    "plain": ("plain", "#000000", "-"),
    "gr": ("GR", "#D55E00", "-"),
    "gr-r-warmup": ("GR + r-warmup", "#E69F00", (0, (5, 1))),
    "gr-lambda-warmup": ("GR + lambda-warmup", "#CC79A7", (0, (3, 1, 1, 1))),
    "gr-zero-warmup": ("GR + zero-warmup", "#009E73", (0, (1, 1))),
    "sam": ("SAM", "#0072B2", "-"),
    "layerwise": ("layer-wise GR", "#56B4E9", (0, (5, 1))),
    "layerwise-1": ("layer-wise GR, 1 layer", "#56B4E9", (0, (1, 2))),
    "layerwise-2": ("layer-wise GR, 2 layers", "#E69F00", (0, (3, 1, 1, 1))),
    "layerwise-4": ("layer-wise GR, 4 layers", "#CC79A7", (0, (5, 1))),
    "layerwise-8": ("layer-wise GR, 8 layers", "#009E73", (0, (8, 2))),
    "layerwise-budget": ("layer-wise GR, budget", "#882255", (0, (2, 1))),
}
COLUMNS = (
    "method",
    "test error, %",
    "train loss",
    "gradient norm",
    "sharpness",
    "gradients / step",
    "time / step",
)


def table(runs: Runs) -> str:
    """Write the last epoch of all runs as a Markdown table: means, and deviations over seeds."""
    rows = [COLUMNS]
    for method in _methods(runs):
        last = [epochs[-1] for (name, _), epochs in runs.items() if name == method]

        def mean(key: str, last: list[Metrics] = last) -> float:
            return float(np.mean([epoch[key] for epoch in last]))

        rows.append(
            (
                STYLES[method][0],
                f"{mean('test_error'):.2f}{_deviation([epoch['test_error'] for epoch in last])}",
                f"{mean('train_loss'):.4f}",
                f"{mean('gradient_norm'):.3f}",
                f"{mean('sharpness'):.4f}",
                f"{_mean_over_epochs(runs, method, 'gradients_per_step'):.2f}",
                _relative_time(runs, method),
            )
        )
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Write rows, the first of which is the header, as a Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines) + "\n"


def selections(runs: Runs) -> str:
    """Say how many selections of layers were compiled, if any."""
    chosen = [
        {tuple(epoch["perturbed_layers"]) for epoch in run if epoch["perturbed_layers"]}
        for run in runs.values()
    ]
    if not any(chosen):
        return ""
    most = max(map(len, chosen))
    return (
        f"Layer-wise GR used {len(set().union(*chosen))} selections of layers, at most {most} in "
        f"a run. Each is compiled once."
    )


def figure(runs: Runs, title: str, warmup_epochs: int, path: Path) -> None:
    """Draw test error and gradient norm over the epochs: the mean over seeds, and a band.

    The band reaches from the smallest to the largest of the seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gnp_optax import plots

    canvas = Figure(figsize=(10, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    panels = canvas.subplots(1, 2)
    names = (("test_error", "test error, %"), ("gradient_norm", "gradient norm"))
    for axes, (key, label) in zip(panels, names, strict=True):
        for method in _methods(runs):
            name, color, dashes = STYLES[method]
            values = np.array(
                [[e[key] for e in run] for (m, _), run in runs.items() if m == method]
            )
            epochs = np.arange(1, values.shape[1] + 1)
            plots.band(axes, epochs, values, name, style=plots.Style(color, dashes))
        positive = any(epoch[key] > 0 for run in runs.values() for epoch in run)
        axes.set(xlabel="epoch", ylabel=label, yscale="log" if positive else "linear")
        if warmup_epochs:
            at = {"transform": axes.get_xaxis_transform(), "fontsize": 8, "va": "top"}
            axes.axvline(warmup_epochs, color="grey", lw=0.8, ls=":")
            axes.text(warmup_epochs, 1.0, " warmup ends", color="grey", **at)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(True, alpha=0.3)
        if positive:
            _plain_numbers(axes.yaxis)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    canvas.suptitle(title, fontsize=11)
    canvas.savefig(path)


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with 2, 5, 10, 20, ... instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _methods(runs: Runs) -> list[str]:
    present = {method for method, _ in runs}
    return [method for method in STYLES if method in present]


def _deviation(values: Sequence[float]) -> str:
    return f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""


def _mean_over_epochs(runs: Runs, method: str, key: str) -> float:
    chosen = [epoch[key] for (name, _), run in runs.items() if name == method for epoch in run]
    return float(np.mean(chosen))


def _relative_time(runs: Runs, method: str) -> str:
    if not any(name == "plain" for name, _ in runs):
        return "-"
    seconds, plain = (_mean_over_epochs(runs, m, "seconds_per_step") for m in (method, "plain"))
    return f"{seconds / plain:.2f}"
