"""`python -m gnp_optax.experiments curve`: several comparisons, along one of their options."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from gnp_optax.experiments.report import figures, summary
from gnp_optax.experiments.report.table import STYLES, Runs, markdown
from gnp_optax.experiments.training import records
from gnp_optax.experiments.training.records import Metrics, Run

Rows = dict[float, dict[str, Any]]  # the summary's objects, by the option's value and by method


@dataclasses.dataclass(frozen=True)
class CurveConfig:
    """Draw the test errors of finished comparisons against an option, one line a method.

    Prints a table as well, and writes both, curve.md and curve.png, under --out.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of finished comparisons."""
    over: str = "label_noise"
    """The option that they differ in."""
    metric: str = "test_error"
    """What to draw, a key of summary.json: test_error, best_epoch_error, ece, error_4bit, ..."""
    epoch: int | None = None
    """After how many epochs of as many as were planned; without it, after the last. A method that
    was not tested then is left out."""
    out: Path = Path("results/curve")
    """Folder for the results."""


def run(args: Sequence[str]) -> None:
    """Read the options, draw, and print the table."""
    config = tyro.cli(CurveConfig, prog="python -m gnp_optax.experiments curve", args=args)
    rows = dict(sorted(_read(folder, config) for folder in config.folders))
    _check_metric(rows, config.metric)
    text = table(rows, config.over, config.metric)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "curve.md").write_text(text)
    figures.along(rows, config.over, config.metric, config.out / "curve.png")
    print(text, end="")
    print(f"\nWrote curve.md and curve.png to {config.out}.")


def _check_metric(rows: Rows, metric: str) -> None:
    every = [row for found in rows.values() for row in found.values()]
    known = [name for name in every[0] if all(_is_number(row.get(name)) for row in every)]
    if metric not in known:
        raise ValueError(
            f"--metric: {metric!r} is not known of every method; known are {', '.join(known)}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(folder: Path, config: CurveConfig) -> tuple[float, dict[str, Any]]:
    if not (folder / "summary.json").exists() or not (folder / "runs.jsonl").exists():
        raise ValueError(f"{folder} is not the folder of a finished comparison.")
    options, epochs = records.read(folder / "runs.jsonl")
    if not isinstance(options.get(config.over), (int, float)):
        raise ValueError(f"--over: {config.over!r} is no number among the options of {folder}.")
    found = json.loads((folder / "summary.json").read_text())
    if config.epoch is not None:
        found = summary.of(_until(config.epoch, epochs, folder))
    return options[config.over], {row["method"]: row for row in found}


def _until(last: int, epochs: list[Metrics], folder: Path) -> Runs:
    """Return runs as if they had ended after so many epochs."""
    tested = sorted({e["epoch"] for e in epochs if math.isfinite(e["test_error"])})
    if last not in tested:
        raise ValueError(
            f"--epoch {last}: {folder} has tests after the epochs {', '.join(map(str, tested))}."
        )
    runs: dict[Run, list[Metrics]] = {}
    for epoch in epochs:
        if epoch["epoch"] <= last:
            runs.setdefault((epoch["method"], epoch["seed"]), []).append(epoch)
    left_out = {
        method
        for (method, _), each in runs.items()
        if each[-1]["epoch"] != last or not math.isfinite(each[-1]["test_error"])
    }
    return {run: each for run, each in runs.items() if run[0] not in left_out}


def table(rows: Rows, over: str, metric: str) -> str:
    """Write a row a method and a column a value; with test errors, the difference to plain."""
    header = (f"{metric} by {over}", *(f"{value:g}" for value in rows))
    names = [method for method in STYLES if any(method in found for found in rows.values())]
    lines = [
        (STYLES[m][0], *(_cell(found.get(m), metric) for found in rows.values())) for m in names
    ]
    return markdown([header, *lines])


def _cell(row: Any, metric: str) -> str:
    if row is None or row[metric] is None:
        return "-"
    text = f"{row[metric]:.2f}"
    if metric != "test_error" or row["difference_standard_error"] is None:
        return text
    if row["is_reference"]:
        return f"{text} (best plain)"
    return f"{text} ({row['difference']:+.2f} +- {row['difference_standard_error']:.2f})"
