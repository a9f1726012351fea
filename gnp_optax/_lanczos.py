"""The Hessian as a linear operator on one array, and what matfree finds out about it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matfree import decomp, stochtrace

from gnp_optax import _dataset, _embedding, _layout, _numerics

PyTree = Any
Arrays = list[Any]


class Hessian:
    """The Hessian of the loss of the selected parameters, on embedded vectors."""

    def __init__(
        self, objective: _dataset.Objective, bar: jax.Array | None, params: PyTree, args: PyTree
    ) -> None:
        self._losses = _dataset.Losses(objective, bar, params, args)
        self._embedding = _embedding.Embedding(self._losses.perturbed, self._losses.shardings)

    def __call__(self, vector: jax.Array) -> jax.Array:
        """Return the Hessian times a vector."""
        tangents = self._embedding.restore(vector)
        return self._embedding.embed(self._losses.hessian_product(tangents))

    def tree(self, vector: jax.Array) -> PyTree:
        """Return a vector as a tree like the parameters."""
        return self._losses.filled(self._embedding.restore(vector))

    def random(self, key: jax.Array, sample: Callable[..., jax.Array]) -> jax.Array:
        """Return a random vector, the same however the parameters are sharded."""
        arrays, shardings = self._losses.perturbed, self._losses.shardings
        keys = jax.random.split(key, len(arrays))
        drawn = [
            _layout.place(draw(sample, key, w), sharding)
            for key, w, sharding in zip(keys, arrays, shardings, strict=True)
        ]
        return self._embedding.embed(drawn)


def draw(sample: Callable[..., jax.Array], key: jax.Array, w: jax.Array) -> jax.Array:
    """Return a random array like w, in float32 or wider, its real and imaginary part drawn apart."""
    dtype = _numerics.wide(w.dtype)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return sample(key, w.shape, dtype)
    parts = (sample(k, w.shape, _numerics.real(dtype)) for k in jax.random.split(key))
    return jax.lax.complex(*parts)


class Ritz(NamedTuple):
    """Eigenvalues ascending and eigenvectors of the tridiagonal matrix; which of both are real."""

    values: jax.Array
    vectors: jax.Array
    is_row: jax.Array
    is_value: jax.Array


@_numerics.promoting
def ritz(tridiagonal: jax.Array) -> Ritz:
    """Decompose the matrix of a Lanczos iteration, up to where it broke down.

    That is where the vectors so far span an invariant subspace: the next one is 0 / 0. The
    eigenvalues of the matrix up to there are exact.
    """
    size = len(tridiagonal)
    diagonal = jnp.diagonal(tridiagonal)
    beside = jnp.append(jnp.diagonal(tridiagonal, 1), 0)
    scale = jax.lax.cummax(jnp.maximum(jnp.abs(diagonal), jnp.abs(beside)))
    # A residual of rounding errors is orthogonal to the vectors before it, and serves to go on.
    continues = beside > 1e-3 * jnp.finfo(scale.dtype).eps * scale
    is_row = jnp.cumprod(jnp.append(True, continues[:-1])).astype(bool)
    bound = jnp.max(jnp.where(is_row, scale, 0))
    below = -4 * jnp.where(bound == 0, 1, bound)  # all eigenvalues are above -3 * bound
    diagonal = jnp.where(is_row, diagonal, below)
    beside = jnp.where(is_row[1:], beside[:-1], 0)
    matrix = jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return Ritz(values, vectors, is_row, jnp.arange(size) >= size - jnp.sum(is_row))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("k", "num_matvecs"))
def eigenpairs(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    key: jax.Array,
    *,
    k: int,
    num_matvecs: int,
) -> tuple[jax.Array, PyTree, jax.Array]:
    """Return the largest eigenvalues, their eigenvectors as trees, and the residuals."""
    hessian = Hessian(objective, bar, params, args)
    basis, found = _lanczos(hessian, hessian.random(key, jax.random.normal), num_matvecs)
    values, is_value = found.values[::-1][:k], found.is_value[::-1][:k]
    values = jnp.where(is_value, values, jnp.nan)
    vectors = _combined(basis, found.vectors[:, ::-1][:, :k], found.is_row)

    def checked(pair: tuple[jax.Array, jax.Array]) -> tuple[PyTree, jax.Array]:
        value, vector = pair
        return hessian.tree(vector), _numerics.norm([hessian(vector) - value * vector])

    trees, residuals = jax.lax.map(checked, (values, vectors))
    return values, trees, residuals


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_samples")
def trace_samples(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    key: jax.Array,
    *,
    num_samples: int,
) -> jax.Array:
    """Return `v' H v` for random vectors of signs."""
    hessian = Hessian(objective, bar, params, args)
    quadratic_form = stochtrace.monte_carlo_trace()

    def sample(key: jax.Array) -> jax.Array:
        return quadratic_form(hessian, hessian.random(key, jax.random.rademacher))

    # One after the other: `vmap` would keep all of them in memory.
    return jax.lax.map(sample, jax.random.split(key, num_samples))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("num_matvecs", "num_samples"))
def quadrature(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    key: jax.Array,
    *,
    num_matvecs: int,
    num_samples: int,
) -> tuple[jax.Array, jax.Array]:
    """Return the nodes and weights of the Gauss quadrature that belongs to each random vector."""
    hessian = Hessian(objective, bar, params, args)

    def sample(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = hessian.random(key, jax.random.rademacher)
        _, found = _lanczos(hessian, start, num_matvecs)
        weights = jnp.where(found.is_value, jnp.square(found.vectors[0]), 0)
        # In place of what was not found, a value within the spectrum, of no weight.
        return jnp.where(found.is_value, found.values, found.values[-1]), weights

    return jax.lax.map(sample, jax.random.split(key, num_samples))


def _lanczos(hessian: Hessian, start: jax.Array, num_matvecs: int) -> tuple[jax.Array, Ritz]:
    # Not matfree's `eigh_partial`: it makes all eigenvectors, as many as there are products.
    tridiagonalize = decomp.tridiag_sym(num_matvecs, custom_vjp=False)
    basis, tridiagonal, *_ = tridiagonalize(hessian, start)
    return basis, ritz(tridiagonal)


def _combined(basis: jax.Array, coefficients: jax.Array, is_row: jax.Array) -> jax.Array:
    """Return as many vectors as `coefficients` has columns, from the rows that are real."""

    def add(total: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        vector, weights, is_real = row
        weights = weights.reshape(-1, *[1] * vector.ndim)
        return total + weights * jnp.where(is_real, vector, 0), None

    zeros = jnp.zeros((coefficients.shape[1], *basis.shape[1:]), basis.dtype)
    # One by one: a product of matrices would take a copy of the basis without its NaN.
    total, _ = jax.lax.scan(add, zeros, (basis, coefficients, is_row))
    return total
