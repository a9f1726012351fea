"""Plots: what was drawn is what was given, read back from matplotlib's artists."""

import itertools
from collections import namedtuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

import gnp_optax as gnp
from gnp_optax import plots

Spectrum = namedtuple("Spectrum", "eigenvalues weights")
Line = namedtuple("Line", "distances losses")
Surface = namedtuple("Surface", "x y losses")
LayerNorms = namedtuple("LayerNorms", "paths norms")

X, Y = np.linspace(-1, 1, 9), np.linspace(-2, 2, 7)
BOWL = Surface(X, Y, 1 + X**2 + 4 * Y[:, None] ** 2)
TWO = Spectrum(np.array([[0.0, 10.0]]), np.array([[0.75, 0.25]]))
HOLED = BOWL._replace(losses=np.where(BOWL.losses > 12, np.inf, BOWL.losses))


RadiusProfile = namedtuple("RadiusProfile", "radii surrogate_gap cosine correction curvature moved")
PROFILE = RadiusProfile(
    radii=np.array([0.01, 0.1, 1.0, 10.0]),
    surrogate_gap=np.array([0.01, 0.2, 5.0, np.inf]),
    cosine=np.array([1.0, 0.9, 0.6, 0.0]),
    correction=np.array([0.02, 0.2, 2.0, 20.0]),
    curvature=np.array([1.0, 0.9, 0.6, 0.1]),
    moved=np.ones(4),
)


@pytest.fixture
def figure():
    figure = Figure(figsize=(3.5, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@pytest.fixture
def ax(figure):
    return figure.subplots()


@pytest.fixture
def ax3d(figure):
    return figure.add_subplot(projection="3d")


def fill_of(ax):
    """Lower and upper edge of a filled band, by x."""
    points = ax.collections[0].get_paths()[0].vertices
    return {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in X}


# Every function.


@pytest.mark.parametrize(
    ("label", "draw"),
    [
        ("density", lambda ax: plots.spectrum(ax, TWO)),
        ("loss", lambda ax: plots.loss_line(ax, Line(X, X**2))),
        ("direction 2", lambda ax: plots.loss_contour(ax, BOWL)),
        ("value", lambda ax: plots.schedules(ax, {"a": optax.constant_schedule(1.0)}, 5)),
        ("layer", lambda ax: plots.layer_norms(ax, ["a", "b"], [[1.0, 2.0]])),
    ],
)
def test_each_returns_its_axes_with_labels(figure, ax, label, draw):
    assert draw(ax) is ax
    assert ax.get_ylabel() == label
    assert ax.get_xlabel()
    figure.canvas.draw()


def test_the_surface_and_the_band_return_their_axes(figure, ax3d, ax):
    assert plots.loss_surface(ax3d, BOWL) is ax3d
    labels = ax3d.get_xlabel(), ax3d.get_ylabel(), ax3d.get_zlabel()
    assert labels == ("direction 1", "direction 2", "loss")
    assert plots.band(ax, X, [X], "x") is ax
    figure.canvas.draw()


def test_jax_arrays_of_low_precision_are_drawn(ax):
    line = Line(jnp.array([-1.0, 0.0, 1.0], jnp.bfloat16), jnp.array([2.0, 1.0, 2.0], jnp.float16))
    np.testing.assert_array_equal(plots.loss_line(ax, line).lines[0].get_ydata(), [2.0, 1.0, 2.0])


# Curves.


def test_neighbouring_styles_differ_in_colour_and_in_dashes():
    styles = [plots.curve_style(n) for n in range(42)]
    assert len({(color, str(dashes)) for color, dashes in styles}) == 42
    assert len({color for color, _ in styles[:7]}) == 7
    for one, other in itertools.pairwise(styles):
        assert one.color != other.color
        assert one.linestyle != other.linestyle


def test_a_path_between_two_solutions_is_one(ax):
    path = namedtuple("Path", "positions losses")(np.linspace(0, 1, 3), [1.0, 2.0, 1.0])
    plots.loss_line(ax, path)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), path.positions)
    assert ax.get_xlabel() == "position (0: start, 1: end)"


def test_curves_on_the_same_axes_get_successive_styles(ax):
    for n in range(3):
        plots.loss_line(ax, Line(X, X**2), label=str(n))
        plots.band(ax, X, [X], "band")
    colors = [line.get_color() for line in ax.lines]
    assert colors == [plots.curve_style(n).color for n in range(6)]


def test_a_given_style_is_used(ax):
    style = plots.Style("#123456", "--")
    plots.band(ax, X, [X, X + 1], "x", style=style)
    assert (ax.lines[0].get_color(), ax.lines[0].get_linestyle()) == style
    assert ax.collections[0].get_facecolor()[0, :3] == pytest.approx(np.array([18, 52, 86]) / 255)


def test_band_is_the_mean_between_the_extremes(ax):
    values = np.random.default_rng(0).normal(size=(4, len(X)))
    plots.band(ax, X, values, "runs")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), X)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.average(values, axis=0))
    assert ax.lines[0].get_label() == "runs"
    found = fill_of(ax)
    for x, column in zip(X, values.T, strict=True):
        assert found[x] == (min(column), max(column))


def test_band_leaves_out_where_a_run_diverged(figure, ax):
    plots.band(ax, [1, 2, 3], [[1.0, 2.0, 3.0], [3.0, np.inf, -np.inf]], "runs")
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2.0, np.nan, np.nan])
    figure.canvas.draw()


def test_a_single_point_is_marked(ax):
    plots.band(ax, [1], [[1.0], [3.0]], "runs")
    assert ax.lines[0].get_marker() == "o"


def test_schedules_are_read_at_the_steps(ax):
    given = {"zero": gnp.schedules.zero_warmup(0.8, 3), "constant": 0.5, "jax": jnp.asarray(0.25)}
    plots.schedules(ax, given, 5)
    zero, constant, traced = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(zero, [0, 0, 0, 0.8, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(constant, [0.5] * 5)
    np.testing.assert_array_equal(traced, [0.25] * 5)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(given)


def test_schedules_at_given_steps(ax):
    plots.schedules(ax, {"a": lambda step: 2.0 * step, "b": lambda _: 1.0}, range(0, 300, 100))
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 100, 200])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [0, 200, 400])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [1, 1, 1])


# What each radius would do.


def test_a_radius_profile_is_drawn_with_the_range_that_does_something_and_is_local(figure, ax):
    assert plots.radius_profile(ax, PROFILE) is ax
    figure.canvas.draw()
    shares = [line.get_ydata() for line in ax.lines]
    np.testing.assert_array_equal(shares, [PROFILE.cosine, PROFILE.curvature, PROFILE.moved])
    _, beside = figure.axes
    np.testing.assert_array_equal(beside.lines[0].get_ydata(), [0.01, 0.2, 5.0, np.nan])
    assert (ax.get_xscale(), beside.get_yscale()) == ("log", "log")
    (shaded,) = ax.patches
    # Of 0.1 and 1, half-way to the neighbours on the logarithmic axis.
    np.testing.assert_allclose(
        [shaded.get_x(), shaded.get_x() + shaded.get_width()], [10**-1.5, 10**0.5]
    )
    assert len(ax.get_legend().get_texts()) == 4


def test_a_radius_profile_without_such_a_range_has_none(figure, ax):
    plots.radius_profile(
        ax, PROFILE._replace(correction=np.full(4, 0.01), surrogate_gap=-X[:4] - 2)
    )
    assert not ax.patches
    assert figure.axes[1].get_yscale() == "linear"
    figure.canvas.draw()


# Spectrum.


def integral(line):
    x, y = line.get_data()
    return np.sum((y[1:] + y[:-1]) / 2 * np.diff(x))


@pytest.mark.parametrize("width", [None, 0.01, 3.0])
def test_spectrum_integrates_to_one(ax, width):
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=(3, 20))
    found = Spectrum(rng.normal(size=(3, 20)), weights / weights.sum(1, keepdims=True))
    plots.spectrum(ax, found, width=width)
    assert integral(ax.lines[0]) == pytest.approx(1, abs=1e-5)


def test_spectrum_is_the_mean_over_samples_of_gaussians(ax):
    samples = Spectrum(np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[0.5, 0.5], [0.9, 0.1]]))
    plots.spectrum(ax, samples, width=0.5)
    x, y = ax.lines[0].get_data()
    at = np.argmin(abs(x - 1.7))
    scaled = [0.25, 0.25, 0.45, 0.05] * np.exp(-2 * (x[at] - np.arange(4)) ** 2)
    assert y[at] == pytest.approx(scaled.sum() / (0.5 * np.sqrt(2 * np.pi)))


def test_the_default_width_is_a_hundredth_of_the_range(ax):
    plots.spectrum(ax, TWO)
    assert ax.lines[0].get_ydata().max() == pytest.approx(
        0.75 / (0.1 * np.sqrt(2 * np.pi)), rel=0.01
    )


def test_the_axis_of_a_spectrum_ends_at_the_floor_and_the_curve_leaves_it(ax):
    plots.spectrum(ax, TWO, floor=1e-5)
    y = ax.lines[0].get_ydata()
    assert ax.get_ylim()[0] == pytest.approx(1e-5 * y.max())
    assert 0 < y.min() < ax.get_ylim()[0]
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize("sharper_first", [False, True])
def test_two_spectra_fit_on_the_same_axes(figure, ax, sharper_first):
    scales = (10, 1) if sharper_first else (1, 10)
    for scale in scales:
        plots.spectrum(ax, TWO._replace(eigenvalues=TWO.eigenvalues * scale), label=str(scale))
    figure.canvas.draw()
    low, high = ax.get_ylim()
    for line in ax.lines:
        assert line.get_ydata().max() < high
        assert line.get_ydata().min() < low
        assert line.get_xdata().max() < ax.get_xlim()[1]
    assert ax.get_legend_handles_labels()[1] == [str(scale) for scale in scales]


def test_a_spectrum_of_equal_eigenvalues_has_a_width(ax):
    for value in (0.0, 5.0):
        plots.spectrum(ax, Spectrum(np.full((2, 3), value), np.full((2, 3), 1 / 3)))
    assert all(integral(line) == pytest.approx(1, abs=1e-5) for line in ax.lines)


# Landscapes.


def test_loss_line_is_interrupted_where_the_loss_overflows(figure, ax):
    plots.loss_line(ax, Line([-1, 0, 1, 2], [np.inf, 1.0, 2.0, np.nan]), label="SAM")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [-1, 0, 1, 2])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [np.nan, 1.0, 2.0, np.nan])
    assert ax.lines[0].get_label() == "SAM"
    figure.canvas.draw()


def test_contours_lie_where_the_loss_is_that_of_their_label(ax):
    fine = np.linspace(-1, 1, 101)
    losses = 1 + fine**2 + 4 * fine[:, None] ** 2
    plots.loss_contour(ax, Surface(fine, fine, losses), levels=[1.25, 2.0])
    contours = ax.collections[0]
    for level, path in zip([1.25, 2.0], contours.get_paths(), strict=True):
        x, y = path.vertices.T
        np.testing.assert_allclose(1 + x**2 + 4 * y**2, level, atol=2e-3)
    assert {text.get_text() for text in ax.texts} == {"1.25", "2"}
    assert ax.get_aspect() == 1


def test_contours_mark_the_origin(ax):
    plots.loss_contour(ax, BOWL)
    np.testing.assert_array_equal(ax.collections[-1].get_offsets(), [[0, 0]])


def test_logarithmic_levels_grow_by_a_ratio_and_are_written_as_they_are(ax):
    surface = BOWL._replace(losses=np.exp(BOWL.losses / 2))
    plots.loss_contour(ax, surface, scale="log")
    contours = ax.collections[0]
    low, high = surface.losses.min(), surface.losses.max()
    expected = low * (high / low) ** (np.arange(1, 9) / 9)
    np.testing.assert_allclose(contours.levels, expected, rtol=0.05)
    np.testing.assert_array_equal(contours.levels, [float(f"{v:.2g}") for v in contours.levels])
    assert isinstance(contours.norm, LogNorm)


def test_linear_levels_are_about_as_many_as_asked_for(ax):
    levels = plots.loss_contour(ax, BOWL, levels=5).collections[0].levels
    assert 3 <= len(levels) <= 6
    assert np.ptp(np.diff(levels)) < 1e-9
    assert BOWL.losses.min() < levels[0] < levels[-1] < BOWL.losses.max()


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_landscapes_have_holes_where_the_loss_overflows(figure, ax, scale):
    highest = HOLED.losses[np.isfinite(HOLED.losses)].max()
    assert plots.loss_contour(ax, HOLED, scale=scale).collections[0].levels[-1] < highest
    solid = figure.add_subplot(projection="3d")
    plots.loss_surface(solid, HOLED, scale=scale)
    figure.canvas.draw()
    top = np.log10(highest) if scale == "log" else highest
    assert solid.get_zlim()[1] == pytest.approx(top, rel=0.1)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_the_surface_goes_through_every_loss(ax3d, scale):
    plots.loss_surface(ax3d, BOWL, scale=scale)
    (surface,) = ax3d.collections
    heights = np.log10(BOWL.losses) if scale == "log" else BOWL.losses
    corners = heights[:-1, :-1] + heights[1:, :-1] + heights[:-1, 1:] + heights[1:, 1:]
    np.testing.assert_allclose(surface.get_array(), corners.ravel() / 4)
    assert ("log10" in ax3d.get_zlabel()) == (scale == "log")


# Layer norms.

PATHS = ("embed", "blocks_0", "head")
NORMS = np.array([[0.0, 1.0, 2.0], [0.1, np.nan, 4.0]])


def cells(ax):
    return np.ma.filled(ax.collections[0].get_array(), -1)


def rows(ax):
    ax.figure.canvas.draw()
    return [text.get_text() for text in ax.get_yticklabels()]


def test_layer_norms_are_the_cells_with_the_first_path_at_the_top(ax):
    plots.layer_norms(ax, PATHS, NORMS)
    np.testing.assert_array_equal(cells(ax), [[-1, 0.1], [1, -1], [2, 4]])
    bottom, top = ax.get_ylim()
    assert top < bottom
    assert rows(ax) == list(PATHS)
    assert isinstance(ax.collections[0].norm, LogNorm)


def test_what_has_no_colour_is_hatched_and_named(ax):
    plots.layer_norms(ax, PATHS, NORMS)
    assert ax.patch.get_hatch()
    assert "0 or not finite" in ax.figure.axes[1].get_ylabel()


def test_a_colour_bar_without_holes_speaks_of_none(ax):
    plots.layer_norms(ax, ["a"], [[1.0]])
    assert ax.figure.axes[1].get_ylabel() == "gradient norm"


def test_layer_norms_over_time_are_found_by_path(ax):
    history = [LayerNorms(PATHS, jnp.asarray(NORMS[0])), LayerNorms(PATHS[::-1], NORMS[1, ::-1])]
    plots.layer_norms(ax, ["head", "embed"], history)
    np.testing.assert_allclose(cells(ax), [[2, 4], [-1, 0.1]], rtol=1e-6)


def test_layer_norms_over_time_bring_their_paths(ax):
    plots.layer_norms(ax, [LayerNorms(PATHS, NORMS[0]), LayerNorms(PATHS[::-1], NORMS[1, ::-1])])
    np.testing.assert_allclose(cells(ax), [[-1, 0.1], [1, -1], [2, 4]], rtol=1e-6)
    assert rows(ax) == list(PATHS)


def test_maps_with_the_same_limits_have_the_same_colours(figure):
    maps = figure.subplots(1, 2)
    for one, norms in zip(maps, ([[1.0, 2.0]], [[3.0, 0.1]]), strict=True):
        plots.layer_norms(one, ["a", "b"], norms, limits=(0.1, 3.0))
    for one in maps:
        assert (one.collections[0].norm.vmin, one.collections[0].norm.vmax) == (0.1, 3.0)


def test_cells_are_centred_at_their_epochs(ax):
    plots.layer_norms(ax, ["a"], [[1.0], [2.0], [3.0]], epochs=[0, 10, 30])
    edges = ax.collections[0].get_coordinates()[0, :, 0]
    np.testing.assert_array_equal(edges, [-5, 5, 20, 40])


def test_dots_mark_the_selected_layers(ax):
    selected = np.array([[True, False, True], [False, False, True]])
    plots.layer_norms(ax, PATHS, NORMS, selected=selected, epochs=[2, 4])
    np.testing.assert_array_equal(ax.collections[1].get_offsets(), [[2, 0], [2, 2], [4, 2]])


def test_long_paths_are_shortened_to_what_tells_them_apart(ax):
    paths = ["params/patch_embed"] + [
        f"params/encoder/blocks_{i}/{name}"
        for i in (0, 1)
        for name in ("attention/query", "mlp/in", "mlp/projection")
    ]
    plots.layer_norms(ax, paths, np.ones((1, 7)))
    assert rows(ax) == [
        "patch_embed",
        "blocks_0/.../query",
        "blocks_0/mlp/in",
        "blocks_0/.../projection",
        "blocks_1/.../query",
        "blocks_1/mlp/in",
        "blocks_1/.../projection",
    ]


def test_the_outermost_module_has_a_name(ax):
    plots.layer_norms(ax, ["", "head"], [[1.0, 2.0]])
    assert rows(ax) == ["(root)", "head"]


@pytest.mark.parametrize("layers", [5, 26, 200])
def test_names_of_layers_do_not_overlap(ax, layers):
    plots.layer_norms(ax, [f"blocks_{i}" for i in range(layers)], np.ones((3, layers)))
    assert len(rows(ax)) >= min(layers, 10)
    boxes = [text.get_window_extent() for text in ax.get_yticklabels()]
    for upper, lower in itertools.pairwise(boxes):
        assert upper.y0 >= lower.y1 - 1


# Errors.

NAN = np.full((7, 9), np.nan)
NOT_FINITE = "infinite or NaN"


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda ax: plots.spectrum(ax, Spectrum([0.0], [1.0])), r"\(num_samples, num_matvecs\)"),
        (lambda ax: plots.spectrum(ax, TWO._replace(weights=[[1.0]])), r"weights must have"),
        (lambda ax: plots.spectrum(ax, TWO._replace(weights=[[1.0, 1.0]])), "sum to 1"),
        (lambda ax: plots.spectrum(ax, TWO._replace(weights=[[1.5, -0.5]])), "not be negative"),
        (lambda ax: plots.spectrum(ax, TWO._replace(eigenvalues=[[0, np.nan]])), "not finite"),
        (lambda ax: plots.spectrum(ax, TWO, width=0), "width must be positive"),
        (lambda ax: plots.spectrum(ax, TWO, floor=0), "floor must lie between 0 and 1"),
        (lambda ax: plots.loss_line(ax, Line(X, Y)), r"losses must have .* \(9,\), got \(7,\)"),
        (lambda ax: plots.loss_line(ax, Line(X[::-1], X)), "distances must .* increase"),
        (lambda ax: plots.loss_line(ax, Line(X, X * np.nan)), NOT_FINITE),
        (
            lambda ax: plots.loss_contour(ax, Surface(X, Y, BOWL.losses.T)),
            r"\(len\(y\), len\(x\)\) = \(7, 9\), got \(9, 7\)",
        ),
        (lambda ax: plots.loss_contour(ax, BOWL._replace(losses=NAN)), NOT_FINITE),
        (lambda ax: plots.loss_contour(ax, Surface([0.0], Y, BOWL.losses[:, :1])), "two points"),
        (lambda ax: plots.loss_contour(ax, BOWL._replace(losses=np.ones((7, 9)))), "give levels"),
        (lambda ax: plots.loss_contour(ax, BOWL, scale="Log"), "must be 'linear' or 'log'"),
        (
            lambda ax: plots.loss_contour(ax, BOWL._replace(losses=BOWL.losses - 1), scale="log"),
            "the smallest is 0",
        ),
        (lambda ax: plots.loss_contour(ax, BOWL, levels=[2.0, 1.5]), "levels must .* increase"),
        (lambda ax: plots.band(ax, X, X, "x"), r"\(runs, n\)"),
        (lambda ax: plots.band(ax, X, [Y], "x"), r"\(runs, len\(x\)\) = \(1, 9\)"),
        (lambda ax: plots.band(ax, X, np.empty((0, 9)), "x"), r"got \(0, 9\)"),
        (lambda ax: plots.schedules(ax, {}, 5), "nothing to draw"),
        (lambda ax: plots.schedules(ax, {"a": lambda t: jnp.ones(2)}, 5), r"\['a'\] must have"),
        (lambda ax: plots.schedules(ax, {"a": 1.0}, 0), "at least 1"),
        (lambda ax: plots.layer_norms(ax, ["a"], NORMS), r"len\(paths\)\) = \(2, 1\)"),
        (lambda ax: plots.layer_norms(ax, ["a", "a"], [[1, 2]]), r"more than once: \['a'\]"),
        (lambda ax: plots.layer_norms(ax, ["a"], [LayerNorms(["b"], [1.0])]), "no layer 'a'.* 'b'"),
        (lambda ax: plots.layer_norms(ax, ["a"], [[-1.0]]), "not be negative"),
        (lambda ax: plots.layer_norms(ax, []), "no norms"),
        (
            lambda ax: plots.layer_norms(ax, ["a"], [[1.0]], limits=(0, 1)),
            "limits must be positive",
        ),
        (
            lambda ax: plots.layer_norms(ax, ["a"], [[1.0]], limits=(2, 1)),
            "limits must .* increase",
        ),
        (lambda ax: plots.radius_profile(ax, PROFILE._replace(radii=X)), "radii must be positive"),
        (lambda ax: plots.radius_profile(ax, PROFILE._replace(moved=Y)), r"moved must .* of radii"),
        (lambda ax: plots.layer_norms(ax, ["a"], [[0.0]]), "No norm is positive"),
        (lambda ax: plots.layer_norms(ax, PATHS, NORMS, epochs=[1]), r"epochs .* \(2,\)"),
        (lambda ax: plots.layer_norms(ax, PATHS, NORMS, selected=[[True]]), "selected must have"),
    ],
)
def test_wrong_values_are_named(ax, draw, message):
    with pytest.raises(ValueError, match=message):
        draw(ax)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda ax: plots.loss_surface(ax, BOWL), r"add_subplot\(projection='3d'\)"),
        (lambda ax: plots.loss_line(ax, Line(X, ["a"])), "losses must be an array of numbers"),
        (lambda ax: plots.schedules(ax, {"a": "b"}, 5), r"schedules\['a'\] must be a real scalar"),
        (lambda ax: plots.schedules(ax, {"a": 1.0}, [0.5, 1.0]), "must be integers"),
        (lambda ax: plots.layer_norms(ax, "ab", [[1, 2]]), "sequence of strings"),
        (lambda ax: plots.layer_norms(ax, PATHS), r"layer_norms\(ax, paths, norms\)"),
        (lambda ax: plots.layer_norms(ax, PATHS, LayerNorms(PATHS, NORMS[0])), "array of numbers"),
        (lambda ax: plots.layer_norms(ax, PATHS, NORMS, selected=NORMS), "must hold booleans"),
    ],
)
def test_wrong_types_are_named(ax, draw, message):
    with pytest.raises(TypeError, match=message):
        draw(ax)
