"""What each radius of a perturbation would do."""

from typing import Any, Protocol

import numpy as np
from jax.typing import ArrayLike
from matplotlib.axes import Axes

from gnp_optax.plots import _curves, _plotted

# Where a radius does something, and where it is local.
_CORRECTION, _CURVATURE = 0.1, 0.5


class RadiusProfile(Protocol):
    """Radii `(n,)`, and for every radius the rest, `(n,)`."""

    @property
    def radii(self) -> ArrayLike: ...

    @property
    def surrogate_gap(self) -> ArrayLike: ...

    @property
    def cosine(self) -> ArrayLike: ...

    @property
    def correction(self) -> ArrayLike: ...

    @property
    def curvature(self) -> ArrayLike: ...

    @property
    def moved(self) -> ArrayLike: ...


def radius_profile(ax: Axes, profile: RadiusProfile) -> Axes:
    """Draw what each radius would do, over a logarithmic axis of the radius.

    On the left axis the cosine between both gradients, what of the correction is curvature, and the
    share of the weights that move; on a second, logarithmic one on the right the growth of the
    loss, where it grows. Shaded is the range in which r does something and is still local: the
    correction is at least a tenth of the gradient, and at least half of it is curvature. The range
    may be empty.

    Args:
        ax: Axes to draw into; a legend is added.
        profile: What `gnp.diagnostics.radius_profile` returned, for radii that increase.

    Returns:
        `ax`.

    Raises:
        TypeError: If the profile does not hold numbers.
        ValueError: If its shapes do not fit, if the radii are not positive or do not increase, or
            if the loss is not finite at any of them.

    Example:
        >>> from types import SimpleNamespace
        >>> from matplotlib.figure import Figure
        >>> found = SimpleNamespace(radii=[0.01, 0.1, 1.0], surrogate_gap=[0.01, 0.2, 5.0],
        ...                         cosine=[1.0, 0.9, 0.2], correction=[0.02, 0.2, 2.0],
        ...                         curvature=[1.0, 0.9, 0.1], moved=[1.0, 1.0, 1.0])
        >>> ax = radius_profile(Figure().subplots(), found)
        >>> [line.get_label() for line in ax.lines]
        ['cosine of g and g~', 'curvature in the correction', 'weights that move']
    """
    radii = _plotted.coordinates("radii", profile.radii)
    if radii[0] <= 0:
        raise ValueError(f"radii must be positive, for a logarithmic axis; got {radii[0]:g}.")
    gap = _row("surrogate_gap", profile.surrogate_gap, radii)
    cosine, correction, curvature, moved = (
        _row(name, getattr(profile, name), radii)
        for name in ("cosine", "correction", "curvature", "moved")
    )
    ax.set_xscale("log")
    is_useful = (correction >= _CORRECTION) & (curvature >= _CURVATURE)
    for low, high in _ranges(radii, is_useful):
        ax.axvspan(low, high, color="#009E73", alpha=0.15, lw=0)
    marked: Any = {"lw": 1.8, "ms": 3.5}
    markers = "os^D"
    shares = (
        ("cosine of g and g~", cosine),
        ("curvature in the correction", curvature),
        ("weights that move", moved),
    )
    lines = []
    for n, (label, values) in enumerate(shares):
        style = _curves.curve_style(n)._asdict()
        lines += ax.plot(radii, values, label=label, marker=markers[n], **style, **marked)
    beside = ax.twinx()
    growth = _plotted.without_infinities("surrogate_gap", gap)
    if (growth > 0).any():
        beside.set_yscale("log", nonpositive="mask")
    style = _curves.curve_style(len(shares))._asdict()
    name: Any = {"label": "growth of the loss (right)", "marker": markers[len(shares)]}
    lines += beside.plot(radii, growth, **name, **style, **marked)
    least = min(0.0, *(values.min() for _, values in shares))
    ax.set(xlabel="radius r", ylabel="share", ylim=(least - 0.05, 1.05))
    beside.set_ylabel("growth of the loss")
    _curves.tidy(ax)
    beside.spines["top"].set_visible(False)
    # Below: the curves go everywhere.
    below: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 5.5}
    ax.legend(handles=lines, frameon=False, fontsize=7, ncols=2, **below)
    return ax


def _row(name: str, values: Any, radii: _plotted.Floats) -> _plotted.Floats:
    row = _plotted.floats(name, values, ("n",))
    _plotted.check_shape(name, row, radii.shape, "of radii")
    return row


def _ranges(radii: _plotted.Floats, chosen: Any) -> list[tuple[float, float]]:
    """Return where runs of chosen radii begin and end, half-way to their neighbours."""
    logs = np.log(radii)
    inner = (logs[1:] + logs[:-1]) / 2
    edges = np.exp([logs[0], *inner, logs[-1]])
    changes = np.flatnonzero(np.diff([False, *chosen, False]))
    return [(edges[a], edges[b]) for a, b in changes.reshape(-1, 2)]
