"""`python -m gnp_optax.experiments curve`: several comparisons, along one of their options."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from gnp_optax.experiments.report import figures
from gnp_optax.experiments.report.table import STYLES, markdown

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
    out: Path = Path("results/curve")
    """Folder for the results."""


def run(args: Sequence[str]) -> None:
    """Read the options, draw, and print the table."""
    config = tyro.cli(CurveConfig, prog="python -m gnp_optax.experiments curve", args=args)
    rows = dict(sorted(_read(folder, config.over) for folder in config.folders))
    text = table(rows, config.over, config.metric)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "curve.md").write_text(text)
    figures.along(rows, config.over, config.metric, config.out / "curve.png")
    print(text, end="")
    print(f"\nWrote curve.md and curve.png to {config.out}.")


def _read(folder: Path, over: str) -> tuple[float, dict[str, Any]]:
    summary, runs = folder / "summary.json", folder / "runs.jsonl"
    if not summary.exists() or not runs.exists():
        raise ValueError(f"{folder} is not the folder of a finished comparison.")
    with runs.open() as file:
        options = json.loads(file.readline())["options"]
    if not isinstance(options.get(over), (int, float)):
        raise ValueError(f"--over: {over!r} is no number among the options of {folder}.")
    return options[over], {row["method"]: row for row in json.loads(summary.read_text())}


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
