"""The Hessian as a linear operator on one array, and what products of it with vectors tell."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnp_optax._core import numerics
from gnp_optax.diagnostics import _dataset
from gnp_optax.diagnostics._embedding import Embedding, normal, signs

PyTree = Any


class Hessian:
    """The Hessian of the loss of the selected parameters, on embedded vectors."""

    def __init__(
        self, objective: _dataset.Objective, bar: jax.Array | None, params: PyTree, args: PyTree
    ) -> None:
        self._losses = _dataset.Losses(objective, bar, params, args)
        self._embedding = Embedding(self._losses.perturbed, self._losses.shardings)
        self._precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def __call__(self, vector: jax.Array) -> jax.Array:
        """Return the Hessian times a vector, the loss in the precision that was the user's."""
        with jax.default_matmul_precision(self._precision):
            tangents = self._embedding.restore(vector)
            return self._embedding.embed(self._losses.hessian_product(tangents))

    def tree(self, vector: jax.Array) -> PyTree:
        """Return a vector as a tree like the parameters."""
        return self._losses.filled(self._embedding.restore(vector))

    def random(self, key: jax.Array, of_bits: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return a random vector, the same however the parameters are sharded."""
        return self._embedding.random(key, of_bits)


class Krylov(NamedTuple):
    """What the Lanczos iteration finds: H times `basis[i]` is `matrix[i]` times the basis.

    Attributes:
        basis: Orthonormal vectors (num_matvecs + 1, *shape); 0 from where the iteration ended.
        matrix: Coefficients (num_matvecs, num_matvecs + 1), tridiagonal up to rounding.
    """

    basis: jax.Array
    matrix: jax.Array


class Ritz(NamedTuple):
    """Eigenvalues ascending and eigenvectors of the matrix; which eigenvalues are real."""

    values: jax.Array
    vectors: jax.Array
    is_value: jax.Array


class _Split(NamedTuple):
    """A vector's coefficients along the basis, and the rest; after so many passes."""

    passes: Any
    along: jax.Array
    rest: jax.Array
    norm: jax.Array  # of the rest
    left: jax.Array  # as a share of the norm before the last pass


@numerics.promoting
def lanczos(
    product: Callable[[jax.Array], jax.Array], start: jax.Array, num_matvecs: int
) -> Krylov:
    """Span the Krylov space of a symmetric operator, with full reorthogonalization.

    Where the vectors span an invariant subspace, a product has nothing new but rounding errors,
    and what of these is orthogonal serves to go on. Where they span everything, the iteration ends.
    """
    rows = jnp.arange(num_matvecs + 1)

    def step(basis: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        def orthogonalize(found: _Split) -> _Split:
            along = jnp.tensordot(basis, found.rest, found.rest.ndim)
            rest = found.rest - jnp.tensordot(along, basis, 1)
            norm = _norm(rest)
            return _Split(found.passes + 1, found.along + along, rest, norm, norm / found.norm)

        image = product(jax.lax.dynamic_index_in_dim(basis, i, keepdims=False))
        # So that not even the squares of its rounding errors underflow.
        scale = jnp.max(jnp.abs(image))
        image = image / jnp.where(scale == 0, 1, scale)
        # Until a pass leaves most of the rest, which is orthogonal then (Daniel, Gragg, Kaufman and
        # Stewart 1976).
        found = jax.lax.while_loop(
            lambda found: (found.passes < 3) & ~(found.left > 0.5),
            orthogonalize,
            _Split(0, jnp.zeros(len(rows), image.dtype), image, _norm(image), 0 * scale),
        )
        is_new = found.left > 0.5
        new = jnp.where(is_new, found.rest / found.norm, 0)
        basis = jax.lax.dynamic_update_index_in_dim(basis, new, i + 1, 0)
        beside = jnp.where(is_new & (rows == i + 1), found.norm, 0)
        return basis, scale * (found.along + beside)

    zeros = jnp.zeros((num_matvecs, *start.shape), start.dtype)
    basis = jnp.concatenate([(start / _norm(start))[None], zeros])
    return Krylov(*jax.lax.scan(step, basis, jnp.arange(num_matvecs)))


@numerics.promoting
def ritz(matrix: jax.Array) -> Ritz:
    """Decompose the matrix of a Lanczos iteration, up to where it ended."""
    rows = jnp.arange(len(matrix))
    is_row = (rows == 0) | (jnp.roll(jnp.diagonal(matrix, 1), 1) > 0)
    # Of elements up to 1, whose squares are safe.
    scale = jnp.max(jnp.abs(matrix))
    scale = jnp.where(scale == 0, 1, scale)
    matrix = matrix[:, :-1] / scale
    # Beyond where it ended, what is below all eigenvalues.
    below = -2 - 2 * _norm(matrix)
    matrix = jnp.where(is_row | (rows != rows[:, None]), matrix, below)
    values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    return Ritz(values * scale, vectors, jnp.flip(is_row))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))


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
    with _precisely():
        start = hessian.random(key, normal)
        basis, matrix = lanczos(hessian, start, num_matvecs)
        found = ritz(matrix)
        values, is_value = found.values[::-1][:k], found.is_value[::-1][:k]
        values = jnp.where(is_value, values, jnp.nan)
        coefficients = jnp.pad(found.vectors[:, ::-1][:, :k].T, [(0, 0), (0, 1)])
        vectors = jnp.tensordot(coefficients, basis, 1)
        errors = coefficients[:, :-1] @ matrix - values[:, None] * coefficients
        errors = jnp.tensordot(errors, basis, 1)
        residuals = jax.vmap(lambda error: numerics.norm([error]))(errors)
    return values, jax.vmap(hessian.tree)(vectors), residuals


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

    def sample(key: jax.Array) -> jax.Array:
        vector = hessian.random(key, signs)
        return numerics.product(vector, hessian(vector))

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
        start = hessian.random(key, signs)
        with _precisely():
            found = ritz(lanczos(hessian, start, num_matvecs).matrix)
        weights = jnp.where(found.is_value, jnp.square(found.vectors[0]), 0)
        # In place of what was not found, the last value again, of no weight, after the others.
        values = jnp.where(found.is_value, found.values, found.values[-1])
        missing = num_matvecs - jnp.sum(found.is_value)
        return jnp.roll(values, -missing), jnp.roll(weights, -missing)

    return jax.lax.map(sample, jax.random.split(key, num_samples))


def _precisely() -> contextlib.AbstractContextManager[None]:
    """Multiply in full: a GPU would round float32 to 10 bits, and no basis were orthogonal."""
    precision: contextlib.AbstractContextManager[None] = jax.default_matmul_precision("highest")
    return precision
