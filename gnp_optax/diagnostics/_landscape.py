"""The loss along lines and on planes through the parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax._core import numerics, selection
from gnp_optax._core.mixing import mix
from gnp_optax._core.perturbation import perturb
from gnp_optax.diagnostics import _dataset, _layout, _operands
from gnp_optax.diagnostics._embedding import Embedding, normal

PyTree = Any
Arrays = list[Any]


class Line(NamedTuple):
    """Distances from the parameters, and the losses there, both (n,)."""

    distances: jax.Array
    losses: jax.Array


class Path(NamedTuple):
    """Positions between two solutions, from 0 to 1, and the losses there, both (n,)."""

    positions: jax.Array
    losses: jax.Array


class Surface(NamedTuple):
    """Coordinates x (n,) and y (m,), and the losses (m, n), a row for every y."""

    x: jax.Array
    y: jax.Array
    losses: jax.Array


def random_direction(key: jax.Array, params: PyTree, *, mask: selection.Mask = None) -> PyTree:
    """Draw a random direction whose filters are as long as those of the parameters.

    A filter is what one output feature is computed with: `kernel[..., j]`, the last axis being the
    output features, as in Flax and Keras. Each is Gaussian, scaled to the norm of the same filter
    of the parameters, so that landscapes of networks can be compared whatever the scales of their
    layers. Leaves of less than two dimensions (biases, the scales of normalizations) are zero. In
    an embedding a filter is a feature, not a token. Layers that are stacked for `lax.scan`, and the
    heads of attention in kernels of three dimensions, share their filters.

    At distance 1 one moves by the norm of the parameters, a hundred times the radius of SAM: what
    SAM does is seen at distances of a few hundredths.

    Args:
        key: Random key.
        params: The parameters.
        mask: Which leaves; zeros elsewhere.

    Returns:
        A tree like the parameters, in float32 or wider; integer leaves are zeros of their type.

    Raises:
        TypeError: If `key` is no random key.
        ValueError: If the mask selects nothing.

    Example:
        >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}
        >>> direction = random_direction(jax.random.key(0), params)
        >>> jnp.linalg.norm(direction["kernel"], axis=0).round(4).tolist()
        [5.0, 1.0]
        >>> direction["bias"].tolist()
        [0.0, 0.0]

    References:
        Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, section 4.
    """
    _operands.checked_key("random_direction", key)
    with _layout.automatic_axes((key, params)) as ((key, params), meshes):
        direction = _filter_normalized(_layout.layout_of(mask, params), key, params)
    return _layout.moved(direction, meshes)


def loss_along(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    direction: PyTree,
    distances: jax.typing.ArrayLike,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> Line:
    """Compute the loss along a line: `L(params + distance * direction)`.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded as they are trained.
        *args: Further arguments of `fun`, such as inputs and labels.
        direction: A tree like the parameters: of `random_direction`, a row of the eigenvectors, a
            gradient. Integer leaves of the parameters stay what they are.
        distances: Multiples (n,) of the direction.
        batch_size: Number of examples that are computed at a time; `None` for all.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        `Line(distances, losses)`.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If the direction is not like the parameters; if the arguments cannot be split.

    Example:
        >>> line = loss_along(jnp.sum, jnp.ones(2), direction=jnp.array([1.0, 0.0]),
        ...                   distances=jnp.array([-1.0, 0.0, 2.0]))
        >>> line.losses.tolist()
        [1.0, 2.0, 4.0]

    References:
        Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.
    """
    _operands.check_like(params, "direction", direction)
    distances = _operands.coordinates("distances", distances)
    losses = _dataset.measure(
        "loss_along",
        _losses_at,
        fun,
        params,
        args,
        ((direction,), distances[:, None]),
        mask=None,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=distances.size,
    )
    return Line(distances, losses)


def loss_surface(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    directions: tuple[PyTree, PyTree],
    x: jax.typing.ArrayLike,
    y: jax.typing.ArrayLike,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> Surface:
    """Compute the loss on a plane: `L(params + x * directions[0] + y * directions[1])`.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded as they are trained.
        *args: Further arguments of `fun`, such as inputs and labels.
        directions: Two trees like the parameters.
        x: Multiples (n,) of the first direction.
        y: Multiples (m,) of the second direction.
        batch_size: Number of examples that are computed at a time; `None` for all.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        `Surface(x, y, losses)` with losses (m, n), for `matplotlib.pyplot.contour(*surface)`.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If a direction is not like the parameters; if the arguments cannot be split.

    Example:
        >>> loss = lambda w: w[0] + 10 * w[1]
        >>> axes = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        >>> surface = loss_surface(loss, jnp.zeros(2), directions=axes,
        ...                        x=jnp.arange(3.0), y=jnp.arange(2.0))
        >>> surface.losses.tolist()
        [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]

    References:
        Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.
    """
    if not (isinstance(directions, (tuple, list)) and len(directions) == 2):
        raise TypeError("directions must be a pair of trees like the parameters: (first, second).")
    for i, direction in enumerate(directions):
        _operands.check_like(params, f"directions[{i}]", direction)
    x, y = _operands.coordinates("x", x), _operands.coordinates("y", y)
    points = jnp.stack(jnp.meshgrid(x, y), axis=-1).reshape(-1, 2)
    losses = _dataset.measure(
        "loss_surface",
        _losses_at,
        fun,
        params,
        args,
        (tuple(directions), points),
        mask=None,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=len(points),
    )
    return Surface(x, y, losses.reshape(y.size, x.size))


def loss_between(
    fun: Callable[..., Any],
    start: PyTree,
    end: PyTree,
    *args: Any,
    positions: jax.typing.ArrayLike | None = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> Path:
    """Compute the loss between two solutions: `L((1 - position) * start + position * end)`.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        start: The parameters at position 0.
        end: The parameters at position 1; integer leaves are those of `start`.
        *args: Further arguments of `fun`, such as inputs and labels.
        positions: Positions (n,), also outside of 0 to 1; by default 21 from 0 to 1.
        batch_size: Number of examples that are computed at a time; `None` for all.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        `Path(positions, losses)`, which `gnp.plots.loss_line` draws, too.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If `end` is not like `start`; if the arguments cannot be split.

    Example:
        >>> line = loss_between(jnp.sum, jnp.zeros(2), jnp.ones(2), positions=jnp.array([0.0, 0.5]))
        >>> line.losses.tolist()
        [0.0, 1.0]

    References:
        Goodfellow, Vinyals and Saxe, "Qualitatively Characterizing Neural Network Optimization
        Problems", ICLR 2015.
    """
    _operands.check_like(start, "end", end)
    at = np.linspace(0, 1, 21) if positions is None else positions
    positions = _operands.coordinates("positions", at)
    losses = _dataset.measure(
        "loss_between",
        _losses_between,
        fun,
        start,
        args,
        (end, positions),
        mask=None,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=positions.size,
    )
    return Path(positions, losses)


@functools.partial(jax.jit, static_argnums=0)
def _losses_at(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    directions: tuple[PyTree, ...],
    points: jax.Array,
) -> jax.Array:
    """Return the losses (n,) at points (n, len(directions)) in the basis of the directions."""
    losses = _dataset.Losses(objective, bar, params, args)
    basis = [losses.parts.divide(direction)[0] for direction in directions]

    def at(point: jax.Array) -> jax.Array:
        steps = [_combination(point, list(axes)) for axes in zip(*basis, strict=True)]
        pairs = zip(losses.perturbed, steps, strict=True)
        return losses.value([perturb(w, d, 1.0) for w, d in pairs])

    # One after the other: `vmap` would keep as many networks in memory.
    return jax.lax.map(at, points)


@functools.partial(jax.jit, static_argnums=0)
def _losses_between(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    start: PyTree,
    args: PyTree,
    end: PyTree,
    positions: jax.Array,
) -> jax.Array:
    """Return the losses (n,) at positions (n,) on the line from `start` to `end`."""
    losses = _dataset.Losses(objective, bar, start, args)
    pairs = list(zip(losses.perturbed, losses.parts.divide(end)[0], strict=True))

    def at(position: jax.Array) -> jax.Array:
        return losses.value([_between(a, b, position) for a, b in pairs])

    return jax.lax.map(at, positions)


@functools.partial(jax.jit, static_argnums=0)
def _filter_normalized(layout: _layout.Layout, key: jax.Array, params: PyTree) -> PyTree:
    """Return a random direction whose filters have the norms of the parameters' filters."""
    parts = _layout.divided(layout, params)
    perturbed, others = parts.divide(params)
    embedding = Embedding(perturbed, _layout.shardings_of(layout, parts))
    drawn = embedding.restore(embedding.random(key, normal))
    filters = [_filters(x, w) for x, w in zip(drawn, perturbed, strict=True)]
    return parts.unite(filters, [jnp.zeros_like(w) for w in others])


def _between(start: jax.Array, end: jax.Array, position: jax.Array) -> jax.Array:
    # A mixture, not a step from the start, so that both ends are exact.
    wide = mix(numerics.widen(start), numerics.widen(end), position)
    return numerics.round_to(wide, start.dtype)


@numerics.promoting
def _combination(point: jax.Array, axes: Arrays) -> jax.Array:
    wide = [numerics.widen(axis) for axis in axes]
    total = sum(
        x.astype(numerics.real(axis.dtype)) * axis for x, axis in zip(point, wide, strict=True)
    )
    return jnp.asarray(total)


@numerics.promoting
def _filters(drawn: jax.Array, w: jax.Array) -> jax.Array:
    """Return the filters of a random array, as long as those of w."""
    if jnp.ndim(w) < 2:
        return jnp.zeros_like(drawn)
    target, length = (_length(numerics.widen(x)) for x in (w, drawn))
    return drawn * (target / jnp.where(length == 0, 1, length))


def _length(x: jax.Array) -> jax.Array:
    """Return the norm of every filter, an array that broadcasts over the filters."""
    within = tuple(range(x.ndim - 1))
    return jnp.sqrt(jnp.sum(jnp.real(x * jnp.conj(x)), axis=within, keepdims=True))
