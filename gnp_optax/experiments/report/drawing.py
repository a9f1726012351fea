"""What the figures of the experiments have in common."""

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gnp_optax.experiments.training.records import replace


def canvas(
    panels: int, width: float, height: float, *, rows: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure, of a size in inches, and its panels in rows."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.subplots(rows, -(-panels // rows), squeeze=False, **options).ravel().tolist()
    for unused in found[panels:]:
        unused.remove()
    return figure, found[:panels]


def save(figure: Figure, panel: Axes, title: str, path: Path, columns: int) -> None:
    """Write the figure to a file, beneath it the legend of one of its panels.

    In so many columns, or as many as are not wider than the figure.
    """
    handles, labels = panel.get_legend_handles_labels()
    while True:
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
        columns -= 1
    figure.suptitle(title, fontsize=11)
    write(figure, path)


def write(figure: Figure, path: Path) -> None:
    """Write the figure to a file, whole."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."))
    replace(path, content.getvalue())
