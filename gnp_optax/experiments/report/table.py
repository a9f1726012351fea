"""The table of a comparison, and how its methods are called and drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

from gnp_optax.experiments.training.records import Metrics, Run

Runs = Mapping[Run, list[Metrics]]

# Okabe and Ito's palette, made to be told apart by colour-blind readers; dashes tell the methods
# apart in black and white.
STYLES: dict[str, tuple[str, str, Any]] = {
    "plain": ("plain", "#000000", "-"),
    "plain-weight-decay": ("plain, weight decay", "#555555", (0, (5, 1))),
    "plain-label-smoothing": ("plain, label smoothing", "#777777", (0, (1, 1))),
    "plain-twice": ("plain, twice the epochs", "#999999", (0, (3, 1, 1, 1))),
    "gr": ("GR", "#D55E00", "-"),
    "gr-r-warmup": ("GR + r-warmup", "#E69F00", (0, (5, 1))),
    "gr-lambda-warmup": ("GR + lambda-warmup", "#CC79A7", (0, (3, 1, 1, 1))),
    "gr-zero-warmup": ("GR + zero-warmup", "#009E73", (0, (1, 1))),
    "gr-after-warmup": ("GR, r rising after warmup", "#882255", (0, (3, 1))),
    "sam": ("SAM", "#0072B2", "-"),
    "sam-every-2": ("SAM, every 2nd step", "#0072B2", (0, (5, 1))),
    "sam-every-5": ("SAM, every 5th step", "#0072B2", (0, (1, 1))),
    "sam-last-quarter": ("SAM, last quarter", "#0072B2", (0, (3, 1, 1, 1))),
    "momentum-sam": ("one gradient, momentum", "#332288", (0, (5, 1))),
    "stale-sam": ("one gradient, stale", "#882255", (0, (1, 1))),
    "hybrid-sam": ("early stale, late fresh", "#44AA99", "-"),
    "layerwise": ("layer-wise GR", "#56B4E9", (0, (5, 1))),
    "layerwise-1": ("layer-wise GR, 1 layer", "#56B4E9", (0, (1, 2))),
    "layerwise-2": ("layer-wise GR, 2 layers", "#E69F00", (0, (3, 1, 1, 1))),
    "layerwise-4": ("layer-wise GR, 4 layers", "#CC79A7", (0, (5, 1))),
    "layerwise-8": ("layer-wise GR, 8 layers", "#009E73", (0, (8, 2))),
    "layerwise-budget": ("layer-wise GR, budget", "#882255", (0, (2, 1))),
    "layerwise-last": ("layer-wise GR, last layers", "#56B4E9", (0, (2, 1))),
    "layerwise-last-1": ("layer-wise GR, last block", "#56B4E9", (0, (4, 1))),
    "layerwise-last-2": ("layer-wise GR, last 2 blocks", "#56B4E9", (0, (6, 1))),
    "layerwise-last-3": ("layer-wise GR, last 3 blocks", "#56B4E9", (0, (8, 1))),
    "layerwise-first-1": ("layer-wise GR, first block", "#CC79A7", (0, (4, 1))),
    "gr-plain-statistics": ("GR, plain statistics", "#999933", (0, (4, 2, 1, 2))),
}
COLUMNS = (
    *("method", "test error, %", "to the best plain", "best epoch", "ECE, %", "4 bits"),
    *("gradients", "time"),
)


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Write a summary as a Markdown table, in its order."""
    rows: list[Sequence[str]] = [COLUMNS]
    for row in summary:
        change = f"{row['difference']:+.2f}" if row["difference"] is not None else "-"
        error = row["difference_standard_error"]
        rows.append(
            (
                STYLES[row["method"]][0],
                f"{row['test_error']:.2f}" + _spread(row["test_error_std"]),
                "(the best plain)" if row["is_reference"] else change + _spread(error),
                *(_number(row[key]) for key in ("best_epoch_error", "ece", "error_4bit")),
                f"{row['gradients_per_step']:.2f}",
                _number(row["time_per_step"]),
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


def _spread(value: float | None) -> str:
    return "" if value is None else f" +- {value:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
