"""The distribution of the Hessian's eigenvalues."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax._core import checks, numerics, selection
from gnp_optax.diagnostics import _dataset, _lanczos, _operands

PyTree = Any


class Spectrum(NamedTuple):
    """Eigenvalues and their weights, which sum to 1, both (num_samples, num_matvecs)."""

    eigenvalues: jax.Array
    weights: jax.Array


def hessian_spectrum(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    key: jax.Array,
    num_matvecs: int | None = None,
    num_samples: int = 4,
    mask: selection.Mask = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> Spectrum:
    """Estimate how the eigenvalues of the Hessian are distributed.

    Stochastic Lanczos quadrature: for each of `num_samples` random vectors of signs, nodes and
    weights such that `n * sum(weights * f(eigenvalues))` estimates the trace of `f(H)`, with n the
    number of parameters. `spectral_density` draws them as a curve. It takes `num_samples *
    num_matvecs` products of the Hessian with a vector, and the memory of `hessian_eigenvalues`.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded as they are trained.
        *args: Further arguments of `fun`, such as inputs and labels.
        key: Random key.
        num_matvecs: Number of nodes for each vector; default 64, or the number of parameters.
        num_samples: Number of random vectors.
        mask: Which leaves: the spectrum is that of the Hessian's block for these.
        batch_size: Number of examples that are computed at a time; `None` for all.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        `Spectrum(eigenvalues, weights)`, each (num_samples, num_matvecs), with rows ascending.
        Where a vector reaches fewer different eigenvalues, the rest has the weight 0.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If `num_matvecs` is more than the number of parameters under the mask; if the
            mask selects nothing; if the arguments cannot be split.

    Example:
        >>> loss = lambda w: (3 * w["a"] ** 2 + (w["b"] ** 2).sum()) / 2
        >>> params = {"a": jnp.ones([]), "b": jnp.ones(3)}
        >>> found = hessian_spectrum(loss, params, key=jax.random.key(0), num_samples=1)
        >>> [[round(float(x), 2) for x in row[0]] for row in found]
        [[1.0, 3.0, 3.0, 3.0], [0.75, 0.25, 0.0, 0.0]]

    References:
        Ghorbani, Krishnan and Xiao, "An Investigation into Neural Net Optimization via Hessian
        Eigenvalue Density", ICML 2019.
    """
    checks.check_integer("num_samples", num_samples, at_least=1)
    size = _operands.krylov_size(num_matvecs, 64, _operands.dimension(mask, params))
    found = _dataset.measure(
        "hessian_spectrum",
        functools.partial(_lanczos.quadrature, num_matvecs=size, num_samples=int(num_samples)),
        fun,
        params,
        args,
        (_operands.checked_key("hessian_spectrum", key),),
        mask=mask,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=size * num_samples,
    )
    return Spectrum(*found)


@numerics.promoting
def spectral_density(
    spectrum: Spectrum, grid: jax.typing.ArrayLike, width: jax.typing.ArrayLike
) -> jax.Array:
    """Smooth a spectrum into a density, with a Gaussian around every eigenvalue.

    `sum(weights * normal(grid; eigenvalues, width))`, averaged over the samples; its integral is 1.

    Args:
        spectrum: What `hessian_spectrum` returned.
        grid: Points (n,) at which to compute it.
        width: Standard deviation of the Gaussians, in the units of the eigenvalues.

    Returns:
        The density at the points, (n,).

    Raises:
        ValueError: If `width` is not positive.

    Example:
        >>> spectrum = Spectrum(jnp.array([[0.0, 1.0]]), jnp.array([[0.75, 0.25]]))
        >>> grid = jnp.linspace(-1.0, 2.0, 301)
        >>> density = spectral_density(spectrum, grid, width=0.1)
        >>> round(float(jnp.trapezoid(density, grid)), 4), int(density.argmax())
        (1.0, 100)
    """
    checks.check_scalar("width", width)
    if not isinstance(width, jax.core.Tracer) and not np.asarray(width) > 0:
        raise ValueError("width must be positive: it is the Gaussians' standard deviation.")
    grid = numerics.widen(grid)

    def add(total: jax.Array, node: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        value, weight = node
        return total + weight * jax.scipy.stats.norm.pdf(grid, value, width), None

    nodes = spectrum.eigenvalues.ravel(), spectrum.weights.ravel()
    zeros = jnp.zeros(grid.shape, jnp.result_type(grid, *nodes))
    return jax.lax.scan(add, zeros, nodes)[0] / len(spectrum.eigenvalues)
