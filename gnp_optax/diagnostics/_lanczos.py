"""The Hessian as a linear operator on one array, and what matfree finds out about it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matfree import decomp, stochtrace

from gnp_optax._core import numerics
from gnp_optax.diagnostics import _dataset
from gnp_optax.diagnostics._embedding import Embedding

PyTree = Any


class Hessian:
    """The Hessian of the loss of the selected parameters, on embedded vectors."""

    def __init__(
        self, objective: _dataset.Objective, bar: jax.Array | None, params: PyTree, args: PyTree
    ) -> None:
        self._losses = _dataset.Losses(objective, bar, params, args)
        self._embedding = Embedding(self._losses.perturbed, self._losses.shardings)

    def __call__(self, vector: jax.Array) -> jax.Array:
        """Return the Hessian times a vector."""
        tangents = self._embedding.restore(vector)
        return self._embedding.embed(self._losses.hessian_product(tangents))

    def tree(self, vector: jax.Array) -> PyTree:
        """Return a vector as a tree like the parameters."""
        return self._losses.filled(self._embedding.restore(vector))

    def random(self, key: jax.Array, sample: Callable[..., jax.Array]) -> jax.Array:
        """Return a random vector, the same however the parameters are sharded."""
        return self._embedding.random(key, sample)


class Ritz(NamedTuple):
    """Eigenvalues ascending and eigenvectors of the tridiagonal matrix; which of both are real."""

    values: jax.Array
    vectors: jax.Array
    is_row: jax.Array
    is_value: jax.Array


@numerics.promoting
def ritz(basis: jax.Array, hessenberg: jax.Array) -> Ritz:
    """Decompose the matrix of a Lanczos iteration, up to where it broke down.

    That is where the vectors so far span an invariant subspace: the next one is 0 / 0, or rounding
    errors. If these are orthogonal to the vectors before them they serve to go on. If not, the
    iteration ends there, and the eigenvalues of the matrix up to there are exact.
    """
    size = len(hessenberg)
    products = jnp.tensordot(basis, basis, axes=(tuple(range(1, basis.ndim)),) * 2)
    is_orthonormal = jnp.all(jnp.abs(jnp.tril(products) - jnp.eye(size)) < 1e-3, axis=1)
    rows = jnp.arange(size)
    # The smallest number, as a cumulative product compiles into a kernel for each power of two.
    is_row = rows < jnp.min(jnp.where(is_orthonormal | (rows == 0), size, rows))
    diagonal = jnp.where(is_row, jnp.diagonal(hessenberg), 0)
    beside = jnp.where(is_row[1:], jnp.diagonal(hessenberg, -1), 0)
    bound = jnp.maximum(jnp.max(jnp.abs(diagonal)), jnp.max(jnp.abs(beside), initial=0))
    below = -4 * jnp.where(bound == 0, 1, bound)  # all eigenvalues are above -3 * bound
    diagonal = jnp.where(is_row, diagonal, below)
    matrix = jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return Ritz(values, vectors, is_row, rows >= size - jnp.sum(is_row))


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
        return hessian.tree(vector), numerics.norm([hessian(vector) - value * vector])

    trees, residuals = jax.lax.map(checked, (values, vectors))
    return values, trees, residuals


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_samples")
def trace(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    key: jax.Array,
    *,
    num_samples: int,
) -> tuple[jax.Array, jax.Array]:
    """Return the mean of `v' H v` over random vectors of signs, and its standard error."""
    hessian = Hessian(objective, bar, params, args)
    quadratic_form = stochtrace.monte_carlo_trace()

    def sample(key: jax.Array) -> jax.Array:
        return quadratic_form(hessian, hessian.random(key, jax.random.rademacher))

    # One after the other: `vmap` would keep all of them in memory.
    samples = jax.lax.map(sample, jax.random.split(key, num_samples))
    spread = jnp.std(samples, ddof=1) if num_samples > 1 else jnp.full([], jnp.nan, samples.dtype)
    return jnp.mean(samples), spread / num_samples**0.5


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
        # In place of what was not found, the last value again, of no weight, after the others.
        values = jnp.where(found.is_value, found.values, found.values[-1])
        missing = num_matvecs - jnp.sum(found.is_value)
        return jnp.roll(values, -missing), jnp.roll(weights, -missing)

    return jax.lax.map(sample, jax.random.split(key, num_samples))


def _lanczos(hessian: Hessian, start: jax.Array, num_matvecs: int) -> tuple[jax.Array, Ritz]:
    # What is beneath matfree's `eigh_partial(tridiag_sym(n))`: that makes as many eigenvectors as
    # there are products, and takes no notice of a breakdown.
    decompose = decomp.hessenberg(num_matvecs, reortho="full", custom_vjp=False)
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def product(vector: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(precision):
            return hessian(vector)

    # A GPU would round float32 to 10 bits, and the basis would not be orthogonal.
    with jax.default_matmul_precision("highest"):
        basis, matrix, *_ = decompose(product, start)
        return basis, ritz(basis, matrix)


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
