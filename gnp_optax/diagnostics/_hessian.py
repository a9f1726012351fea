"""Eigenvalues and trace of the Hessian, from products of it with vectors."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gnp_optax._core import checks, selection
from gnp_optax.diagnostics import _dataset, _lanczos, _operands

PyTree = Any


class Eigenpairs(NamedTuple):
    """Eigenvalues (k,) descending, eigenvectors with a first axis of k, `||H v - lambda v||`."""

    eigenvalues: jax.Array
    eigenvectors: PyTree
    residuals: jax.Array


class TraceEstimate(NamedTuple):
    """The mean over the probes, and its standard error."""

    trace: jax.Array
    standard_error: jax.Array


def hessian_eigenvalues(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    k: int = 1,
    num_matvecs: int | None = None,
    key: jax.Array | None = None,
    mask: selection.Mask = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> Eigenpairs:
    """Compute the k largest eigenvalues of the Hessian, and their eigenvectors.

    The Lanczos iteration with full reorthogonalization, on `num_matvecs` products of the Hessian
    with a vector, each the forward derivative of a gradient. It keeps one vector more of the size
    of the parameters, in float32 or wider, shared by all devices that the parameters are on: of
    parameters that each device has, each keeps a part of the vectors.

    An eigenvalue counts as found when its residual is small: some eigenvalue lies within
    `residuals[i]` of `eigenvalues[i]`. If it is not, raise `num_matvecs`. Residuals come from the
    coefficients of the same products, which hold up to rounding in the parameters' type. From the
    smallest eigenvalue comes the largest of `-loss`.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded as they are trained.
        *args: Further arguments of `fun`, such as inputs and labels.
        k: How many eigenvalues, from the algebraically largest.
        num_matvecs: Dimension of the Krylov space; default `30 + 2 * k`, or all dimensions.
        key: Random key of the first vector; default `jax.random.key(0)`.
        mask: Which leaves: the eigenvalues are those of the Hessian's block for these.
        batch_size: Number of examples that are computed at a time; `None` for all.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        `Eigenpairs(eigenvalues, eigenvectors, residuals)`. The eigenvectors are a tree like the
        parameters, whose leaves have a new first axis, with zeros where the mask selects nothing.
        Lanczos cannot see an eigenvalue twice: where the Hessian has less than k that are
        different, the others may be NaN.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If k or `num_matvecs` is more than the number of parameters under the mask; if
            the mask selects nothing; if the arguments cannot be split.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda w: (3 * w["a"] ** 2 + w["b"] ** 2).sum() / 2
        >>> found = hessian_eigenvalues(loss, {"a": jnp.ones(1), "b": jnp.ones(1)}, k=2)
        >>> [round(float(x), 4) for x in found.eigenvalues]
        [3.0, 1.0]
        >>> [round(abs(float(x)), 4) for x in found.eigenvectors["a"][0]]
        [1.0]

    References:
        Lanczos, "An Iteration Method for the Solution of the Eigenvalue Problem", 1950.
    """
    dimension = _operands.dimension(mask, params)
    checks.check_integer("k", k, at_least=1)
    size = _operands.krylov_size(num_matvecs, 30 + 2 * k, dimension)
    if k > size:
        raise ValueError(
            f"k={k} eigenvalues were asked for, but "
            + (
                f"the parameters under the mask have {dimension} dimensions."
                if k > dimension
                else f"num_matvecs={size} products yield {size}: num_matvecs must be more than k."
            )
        )
    found = _dataset.measure(
        "hessian_eigenvalues",
        functools.partial(_lanczos.eigenpairs, k=int(k), num_matvecs=size),
        fun,
        params,
        args,
        (_operands.checked_key("hessian_eigenvalues", jax.random.key(0) if key is None else key),),
        mask=mask,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=size,
    )
    return Eigenpairs(*found)


def hessian_trace(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    key: jax.Array,
    num_samples: int = 32,
    mask: selection.Mask = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> TraceEstimate:
    """Estimate the trace of the Hessian, the sum of its eigenvalues.

    Hutchinson's estimator: the mean of `v' H v` over random vectors v of signs, one after the
    other. For a diagonal Hessian each is exact.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded as they are trained.
        *args: Further arguments of `fun`, such as inputs and labels.
        key: Random key.
        num_samples: Number of vectors.
        mask: Which leaves: the trace is that of the Hessian's block for these.
        batch_size: Number of examples that are computed at a time; `None` for all.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        `TraceEstimate(trace, standard_error)`. The standard error of a single sample is NaN.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If the mask selects nothing; if the arguments cannot be split.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda w: (3 * w["a"] ** 2 + w["b"] ** 2).sum() / 2
        >>> params = {"a": jnp.ones(1), "b": jnp.ones(1)}
        >>> found = hessian_trace(loss, params, key=jax.random.key(0))
        >>> float(found.trace), float(found.standard_error)
        (4.0, 0.0)

    References:
        Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix", 1990.
    """
    checks.check_integer("num_samples", num_samples, at_least=1)
    found = _dataset.measure(
        "hessian_trace",
        functools.partial(_lanczos.trace, num_samples=int(num_samples)),
        fun,
        params,
        args,
        (_operands.checked_key("hessian_trace", key),),
        mask=mask,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=num_samples,
    )
    return TraceEstimate(*found)
