"""The tables and the figure of a measurement of costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gnp_optax.experiments.report import drawing
from gnp_optax.experiments.report.table import markdown
from gnp_optax.plots import _curves

CAPTION = """\
Everything is relative to the plain gradient, `jax.jit(jax.value_and_grad(loss))`, in the same
process. GR has r = 0.1 and alpha = 0.8. "Head" is everything after the last block; of GPT-2 only
the normalisation, since its matrix is the embedding, which comes first.

- FLOPs: XLA's count for the compiled programs, summed over the programs that a step calls. Of a
  conditional (traced alpha) XLA counts the dearest branch; in the row of zero-warmup during warmup,
  the count is that of the same program after XLA was told that alpha is 0.
- wall-clock: every method runs once a round, in shuffled order; the median, and in brackets the
  quartiles, over the rounds, of its time divided by that of the plain gradient in the same round.
- memory: temporary bytes plus output bytes of the compiled program, by `memory_analysis()`, without
  parameters and batch; with several programs in a step, the largest sum of these and the outputs of
  the programs before it.
- compilation: tracing and compiling from empty caches, every method once a round, in shuffled
  order; the median over the rounds, in seconds, and divided by that of the plain gradient.
- q: FLOPs of the gradient of what follows the perturbed part's input, for the parameters and that
  input, counted on its own: a model of which only this part exists.
"""

# As in `report`: Okabe and Ito's palette.
STYLES: dict[str, tuple[str, str, str]] = {
    "all": ("scope all", "#0072B2", "o"),
    "masked": ("scope masked", "#D55E00", "s"),
}


def table(found: dict[str, Any]) -> str:
    """Write the costs of all methods, relative to the first of them, as a Markdown table."""
    plain = found["rows"][0]
    header = ("method", "FLOPs", "wall-clock", "memory", "compilation, s", "compilation")
    rows = [
        (
            row["name"],
            _ratio(row["flops"], plain["flops"]),
            relative_times(row["seconds"], plain["seconds"]),
            _ratio(row["memory"], plain["memory"]),
            f"{_median_compilation(row):.1f}",
            f"{_median_compilation(row) / _median_compilation(plain):.2f}",
        )
        for row in found["rows"]
    ]
    return markdown([header, *rows])


def depth_table(found: dict[str, Any]) -> str:
    """Write the costs by the depth of the earliest perturbed layer as a Markdown table."""
    plain = found["rows"][0]
    header = ("perturbed from", "1 + q", "FLOPs, scope all", "FLOPs, scope masked")
    timed = ("wall-clock, scope all", "wall-clock, scope masked")
    rows = []
    for suffix in found["suffixes"]:
        block = suffix["block"]
        costs = [c for c in found["depths"] if c["block"] == block]
        share = _quotient(suffix["flops"], plain["flops"])
        rows.append(
            (
                "head" if block == found["blocks"] else f"block {block}",
                "-" if share is None else f"{1 + share:.3f}",
                *(_ratio(c["flops"], plain["flops"], digits=3) for c in costs),
                *(relative_times(c["seconds"], plain["seconds"]) for c in costs),
            )
        )
    return markdown([(*header, *timed), *rows])


def relative_times(seconds: Sequence[float] | None, reference: Sequence[float]) -> str:
    """Write the median and the quartiles, over the rounds, of the ratio of the times in a round."""
    if not seconds:
        return "-"
    low, middle, high = _quartiles(seconds, reference)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def figure(found: dict[str, Any], title: str, path: Path) -> None:
    """Draw FLOPs, and wall-clock if there is one, over the depth of the earliest perturbed layer.

    The line is `1 + q`; the bars are the quartiles over the rounds.
    """
    plain = found["rows"][0]
    names = ["FLOPs", "wall-clock"] if plain["seconds"] else ["FLOPs"]
    canvas, panels = drawing.canvas(len(names), 1 + 4.5 * len(names), 4.8, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        _draw_share(axes, found)
        for scope in STYLES:
            costs = [cost for cost in found["depths"] if cost["scope"] == scope]
            (_draw_flops if name == "FLOPs" else _draw_times)(axes, costs, plain, scope)
        last = found["blocks"]
        blocks = [suffix["block"] for suffix in found["suffixes"]]
        axes.set_xticks(blocks, ["head" if b == last else str(b) for b in blocks])
        axes.set(xlabel=f"first perturbed block (0 to {last - 1})", title=name)
        _curves.tidy(axes)
    panels[0].set_ylabel("cost, in plain gradients")
    drawing.save(canvas, panels[0], title, path, columns=3)


def _draw_share(axes: Any, found: dict[str, Any]) -> None:
    plain = found["rows"][0]["flops"]
    blocks = [suffix["block"] for suffix in found["suffixes"]]
    shares = [_quotient(suffix["flops"], plain) for suffix in found["suffixes"]]
    cost = [np.nan if share is None else 1 + share for share in shares]
    axes.plot(blocks, cost, color="#000000", lw=1.2, ls="--", label="1 + q")


def _draw_flops(axes: Any, costs: list[Any], plain: Any, scope: str) -> None:
    label, color, marker = STYLES[scope]
    ratios = [_quotient(cost["flops"], plain["flops"]) for cost in costs]
    heights = [np.nan if ratio is None else ratio for ratio in ratios]
    # The later of two equal markers must not hide the earlier one.
    face = color if scope == "all" else "none"
    axes.plot(
        [cost["block"] for cost in costs],
        heights,
        color=color,
        marker=marker,
        markersize=6 if scope == "all" else 9,
        markerfacecolor=face,
        ls="",
        label=label,
    )


def _draw_times(axes: Any, costs: list[Any], plain: Any, scope: str) -> None:
    label, color, marker = STYLES[scope]
    low, middle, high = np.transpose(
        [_quartiles(cost["seconds"], plain["seconds"]) for cost in costs]
    )
    # Side by side, so that the bars of one do not cover those of the other.
    shift = -0.12 if scope == "all" else 0.12
    axes.errorbar(
        [cost["block"] + shift for cost in costs],
        middle,
        yerr=[middle - low, high - middle],
        color=color,
        marker=marker,
        markerfacecolor=color if scope == "all" else "none",
        ls="",
        capsize=3,
        label=label,
    )


def _median_compilation(cost: Any) -> float:
    # Not by round: what disturbs a compilation is shorter than a round, and would disturb all of
    # the round's ratios if it hit the plain gradient.
    return float(np.median(cost["compile_seconds"]))


def _quartiles(seconds: Sequence[float], reference: Sequence[float]) -> Sequence[float]:
    return np.percentile(np.divide(seconds, reference), (25, 50, 75)).tolist()


def _quotient(value: float | None, plain: float | None) -> float | None:
    return None if value is None or not plain else value / plain


def _ratio(value: float | None, plain: float | None, digits: int = 2) -> str:
    ratio = _quotient(value, plain)
    return "-" if ratio is None else f"{ratio:.{digits}f}"
