"""What the runs of a comparison come to: one object a method, and a sentence."""

import csv
import gzip
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from gnp_optax.experiments.report.table import STYLES, Runs, methods
from gnp_optax.experiments.training.records import Metrics

Row = dict[str, Any]
Seeds = dict[int, list[Metrics]]  # the epochs of every seed of a method
# From how many standard errors on a difference is spoken of.
_CLEAR = 3


def of(runs: Runs) -> list[Row]:
    """Return one object a method, that of the smallest test error first.

    Errors and calibration errors are in percent, of the last epoch and as means over the seeds.
    `difference` is that of the test error to the best plain run, which is chosen by the error on
    the validation examples, as a mean of the pairs of one seed. `best_epoch_error` is the test
    error at the epoch that is best on these, `best_epoch_loss` the loss at the one of the least
    loss. What can't be told is None.
    """
    by_method = {method: _by_seed(runs, method) for method in methods(runs)}
    reference = _best_plain(by_method)
    plain = by_method.get("plain")
    rows = []
    for method, seeds in by_method.items():
        time = _seconds(seeds) / _seconds(plain) if plain else None
        compared = by_method[reference] if reference else {}
        rows.append(
            {
                "method": method,
                **_row(seeds),
                **_difference(seeds, compared),
                "is_reference": method == reference,
                "time_per_step": time,
            }
        )
    return sorted(rows, key=lambda row: float(row["test_error"]))


def sentence(rows: Sequence[Row]) -> str:
    """Say what the table shows; of differences, those of three standard errors or more."""
    reference = next((row for row in rows if row["is_reference"]), None)
    others = [row for row in rows if row is not reference]
    if reference is None or reference["seeds"] < 2 or not others:
        return "What differs can be told where there are a plain method, others, and several seeds."
    groups: dict[str, list[str]] = {"less": [], "more": [], "as much, to the noise": []}
    for row in others:
        change, error = row["difference"], row["difference_standard_error"]
        is_clear = error is not None and abs(change) >= _CLEAR * error and change != 0
        kind = ("less" if change < 0 else "more") if is_clear else "as much, to the noise"
        points = f" by {abs(change):.1f}" if is_clear else ""
        groups[kind].append(STYLES[row["method"]][0] + points)
    said = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in groups.items() if names)
    best = STYLES[reference["method"]][0]
    return (
        f"Against the best plain run ({best}), seed by seed, these err {said}. "
        f"(Points of error where they are {_CLEAR} standard errors or more.)"
    )


def epochs(runs: Runs) -> bytes:
    """Return a line a run and epoch that was tested, as a compressed table, for the record."""
    shown = (
        *("method", "seed", "epoch", "test_error", "validation_error", "test_loss", "train_loss"),
        *("ece", "error_4bit", "gradient_norm", "sharpness", "gradients_per_step"),
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(shown)
    for run in runs.values():
        for epoch in run:
            if np.isfinite(epoch["test_error"]):
                values = (epoch[name] for name in shown)
                writer.writerow([f"{x:.4g}" if isinstance(x, float) else x for x in values])
    return gzip.compress(text.getvalue().encode(), mtime=0)


def _by_seed(runs: Runs, method: str) -> Seeds:
    return {seed: epochs for (name, seed), epochs in sorted(runs.items()) if name == method}


def _best_plain(by_method: dict[str, Seeds]) -> str | None:
    """Return the plain run of least validation error; without one, `plain` itself."""
    plain = [method for method in by_method if method.startswith("plain")]
    errors = {method: _last(by_method[method], "validation_error") for method in plain}
    known = {method: error for method, error in errors.items() if error is not None}
    if len(known) < len(plain) or not plain:
        return "plain" if "plain" in plain else None
    return min(known, key=lambda method: known[method])


def _row(seeds: Seeds) -> Row:
    errors = [epochs[-1]["test_error"] for epochs in seeds.values()]
    measured = ("test_loss", "train_loss", "ece", "error_4bit", "gradient_norm", "sharpness")
    return {
        "seeds": len(seeds),
        "test_error": float(np.mean(errors)),
        "test_error_std": float(np.std(errors, ddof=1)) if len(errors) > 1 else None,
        **{
            f"best_epoch_{kind}": _mean([_at_best_epoch(epochs, kind) for epochs in seeds.values()])
            for kind in ("error", "loss")
        },
        **{key: _last(seeds, key) for key in measured},
        "gradients_per_step": _mean([x["gradients_per_step"] for e in seeds.values() for x in e]),
        "test_errors": [float(f"{error:.5g}") for error in errors],
    }


def _difference(seeds: Seeds, reference: Seeds) -> Row:
    """Return the mean of the differences of one seed, and its standard error."""
    pairs = [
        epochs[-1]["test_error"] - reference[seed][-1]["test_error"]
        for seed, epochs in seeds.items()
        if seed in reference
    ]
    many = len(pairs) > 1
    return {
        "difference": float(np.mean(pairs)) if pairs else None,
        "difference_standard_error": np.std(pairs, ddof=1) / len(pairs) ** 0.5 if many else None,
    }


def _at_best_epoch(epochs: list[Metrics], kind: str) -> float:
    """Return the test error, or loss, at the first epoch of the least on the validation examples.

    NaN without any.
    """
    validation = np.array([epoch[f"validation_{kind}"] for epoch in epochs])
    if not np.isfinite(validation).any():
        return float("nan")
    return float(epochs[int(np.nanargmin(validation))][f"test_{kind}"])


def _last(seeds: Seeds, key: str) -> float | None:
    return _mean([epochs[-1][key] for epochs in seeds.values()])


def _mean(values: Sequence[float]) -> float | None:
    mean = float(np.mean(values))
    return mean if np.isfinite(mean) else None


def _seconds(seeds: Seeds) -> float:
    """Return the seconds of a step: the mean over the epochs of the median over the seeds.

    So an epoch during which the machine slept, or did other work, does not count if it is one of
    three; and epochs that differ, as before and after a warmup, all count.
    """
    seconds = [[epoch["seconds_per_step"] for epoch in run] for run in seeds.values()]
    return float(np.mean(np.median(seconds, axis=0)))
