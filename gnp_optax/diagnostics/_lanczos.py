"""The Hessian as a linear operator on one array, and what matfree finds out about it."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from matfree import decomp, stochtrace

from gnp_optax._core import numerics
from gnp_optax.diagnostics import _dataset, _layout

PyTree = Any
Arrays = list[Any]


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
        return self._embedding.embed(self._losses.random(key, sample))


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
    is_row = jnp.cumprod(is_orthonormal.at[0].set(True)).astype(bool)
    diagonal = jnp.where(is_row, jnp.diagonal(hessenberg), 0)
    beside = jnp.where(is_row[1:], jnp.diagonal(hessenberg, -1), 0)
    bound = jnp.maximum(jnp.max(jnp.abs(diagonal)), jnp.max(jnp.abs(beside), initial=0))
    below = -4 * jnp.where(bound == 0, 1, bound)  # all eigenvalues are above -3 * bound
    diagonal = jnp.where(is_row, diagonal, below)
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
        return hessian.tree(vector), numerics.norm([hessian(vector) - value * vector])

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


class Embedding:
    """An isometry from lists of arrays to arrays of shape (*mesh, length), padded with zeros.

    matfree works on vectors. To flatten a model into one would gather it on every device. Here each
    device flattens its own shard, and of an array that it has in common with others its own share.
    Complex arrays go to their real and imaginary parts. Without a mesh the shape is (length,).

    Args:
        arrays: Arrays such as those to embed.
        shardings: Their shardings, all of one mesh, or all None.
    """

    def __init__(self, arrays: Arrays, shardings: Sequence[NamedSharding | None]) -> None:
        self._shardings = shardings
        self._templates = [_template(x) for x in arrays]

    @numerics.promoting
    def embed(self, arrays: Arrays) -> jax.Array:
        """Return arrays as one; no device needs what another has."""
        pieces = [
            _on_devices(part, sharding)
            for x, sharding in zip(arrays, self._shardings, strict=True)
            for part in ([jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x])
        ]
        return jnp.concatenate(pieces, axis=-1)

    def restore(self, vector: jax.Array) -> Arrays:
        """Undo `embed`."""
        # Of an isometry the transpose is the inverse; JAX's is not conjugated.
        (arrays,) = jax.linear_transpose(self.embed, self._templates)(vector)
        return [
            _layout.place(jnp.conj(x), sharding)
            for x, sharding in zip(arrays, self._shardings, strict=True)
        ]


def _template(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), numerics.wide(jnp.result_type(x)))


def _on_devices(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Return an array as (*mesh, length): what each device has, or its share of it."""
    if sharding is None:
        return x.ravel()
    mesh = sharding.mesh
    sizes = [mesh.shape[name] for name in mesh.axis_names]
    x, used = _shards(_layout.place(x, sharding), sharding)
    common = [name for name in mesh.axis_names if name not in used]
    length = x.shape[-1]
    shares = math.prod(mesh.shape[name] for name in common)
    x = jnp.pad(x, [(0, 0)] * len(used) + [(0, -length % shares)])
    x = x.reshape(*x.shape[:-1], *(mesh.shape[name] for name in common), -1)
    x = x.transpose(*((used + common).index(name) for name in mesh.axis_names), len(sizes))
    return _layout.place(x, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))


def _shards(x: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, list[str]]:
    """Return an array as (*axes of the mesh that divide it, length), and these axes."""
    mesh = sharding.mesh
    entries = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    shape: list[int] = []
    names: list[str | None] = []
    for size, entry in zip(x.shape, entries, strict=True):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        parts = [mesh.shape[name] for name in axes]
        shape += [*parts, size // math.prod(parts)]
        names += [*axes, None]
    used = [name for name in mesh.axis_names if name in names]
    within = [i for i, name in enumerate(names) if name is None]
    x = x.reshape(shape).transpose(*(names.index(name) for name in used), *within)
    x = x.reshape(*(mesh.shape[name] for name in used), -1)
    return _layout.place(x, NamedSharding(mesh, PartitionSpec(*used))), used
