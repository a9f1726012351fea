"""What a mask costs."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from gnp_optax import _functional
from gnp_optax._core import checks, selection
from gnp_optax._core.options import Curvature, Scope
from gnp_optax.masks import _flops

PyTree = Any


def cost(
    fun: Callable[..., Any],
    params: PyTree,
    mask: selection.Mask,
    *args: Any,
    scope: Scope = "all",
    curvature: Curvature = "finite_difference",
    surrogate_gap: float | None = None,
    has_aux: bool = False,
    **kwargs: Any,
) -> float:
    """Return what a regularized gradient will cost, in ordinary gradients.

    The ratio of the floating-point operations of `gnp.value_and_grad(fun, ..., mask=mask)` and of
    `jax.value_and_grad(fun)`, counted in their traces as XLA counts those of compiled programs:
    nothing is compiled or run. It is about `1 + q`, where q is the share of what follows the first
    use of a perturbed leaf. Why it is not less, `gnp.masks.explain` tells.

    Args:
        fun: Loss `fun(params, *args, **kwargs)`, or `(loss, aux)` with `has_aux`.
        params: The parameters; arrays or `jax.ShapeDtypeStruct`.
        mask: Which leaves are perturbed; `None` for all.
        *args: Further arguments of `fun`; arrays or `jax.ShapeDtypeStruct`.
        scope: As in `gnp.value_and_grad`.
        curvature: As in `gnp.value_and_grad`.
        surrogate_gap: As in `gnp.value_and_grad`.
        has_aux: Whether `fun` returns `(loss, aux)`.
        **kwargs: Keyword arguments of `fun`, taken as constants.

    Returns:
        The ratio. A loop counts as often as it runs, a `while_loop` as if it ran once, `lax.cond`
        as its dearest branch.

    Raises:
        TypeError, ValueError: As `gnp.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gnp_optax.masks import by_path
        >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["body"]) @ p["head"])
        >>> params = {"body": jnp.zeros((64, 64)), "head": jnp.zeros((64, 8))}
        >>> x = jnp.zeros((256, 64))
        >>> [round(cost(loss, params, mask, x), 1) for mask in (None, by_path("^head"))]
        [2.0, 1.1]
    """
    checks.check_parameters(params)
    options = _functional.resolve(None, mask, scope, curvature, None, has_aux, surrogate_gap)
    regularized = _functional.regularized(fun, 0.1, 0.5, options)
    plain = jax.value_and_grad(fun, has_aux=has_aux)
    counts = [
        _flops.flops(functools.partial(gradient, **kwargs), params, *args)
        for gradient in (regularized, plain)
    ]
    return counts[0] / counts[1]
