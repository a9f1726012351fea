"""The table of a comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gnp_optax.experiments.training.records import Metrics, Run

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
    "gr-plain-statistics": ("GR, plain statistics", "#999933", (0, (4, 2, 1, 2))),
}
COLUMNS = (
    "method",
    "test error, %",
    "test loss",
    "train loss",
    "gradient norm",
    "sharpness",
    "gradients / step",
    "time / step",
)


def table(runs: Runs) -> str:
    """Write the last epoch of all runs as a Markdown table: means, and deviations over seeds."""
    rows = [COLUMNS]
    for method in methods(runs):
        last = [epochs[-1] for (name, _), epochs in runs.items() if name == method]

        def mean(key: str, last: list[Metrics] = last) -> float:
            return float(np.mean([epoch[key] for epoch in last]))

        rows.append(
            (
                STYLES[method][0],
                f"{mean('test_error'):.2f}{_deviation([epoch['test_error'] for epoch in last])}",
                f"{mean('test_loss'):.3f}",
                f"{mean('train_loss'):.4f}",
                f"{mean('gradient_norm'):.3f}",
                f"{mean('sharpness'):.4f}",
                f"{mean_over_epochs(runs, method, 'gradients_per_step'):.2f}",
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


def methods(runs: Runs) -> list[str]:
    """Return the methods of the runs, always in the same order."""
    present = {method for method, _ in runs}
    return [method for method in STYLES if method in present]


def _deviation(values: Sequence[float]) -> str:
    return f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""


def mean_over_epochs(runs: Runs, method: str, key: str) -> float:
    """Return the mean of a metric over all epochs of all seeds."""
    chosen = [epoch[key] for (name, _), run in runs.items() if name == method for epoch in run]
    return float(np.mean(chosen))


def _relative_time(runs: Runs, method: str) -> str:
    if not any(name == "plain" for name, _ in runs):
        return "-"
    return f"{_seconds_per_step(runs, method) / _seconds_per_step(runs, 'plain'):.2f}"


def _seconds_per_step(runs: Runs, method: str) -> float:
    """Return the mean over the epochs of the median over the seeds.

    So an epoch during which the machine slept, or did other work, does not count if it is one of
    three; and epochs that differ, as before and after a warmup, all count.
    """
    seconds = [
        [epoch["seconds_per_step"] for epoch in run]
        for (name, _), run in runs.items()
        if name == method
    ]
    return float(np.mean(np.median(seconds, axis=0)))
