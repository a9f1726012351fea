"""What a mask costs: the floating-point operations of a program, counted in its trace.

XLA's own count of a compiled program takes the body of a loop once, however often it runs, and so
can't compare programs whose layers are stacked under `lax.scan`; and it takes a compilation.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from gnp_optax import _functional
from gnp_optax._core import checks, selection
from gnp_optax._core.options import Curvature, Scope
from gnp_optax._prefix import jaxprs

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
    `jax.value_and_grad(fun)`, counted in their traces: nothing is compiled or run. It is about
    `1 + q`, where q is the share of what follows the first use of a perturbed leaf.

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
        The ratio. A `while_loop` counts as if it ran once, `lax.cond` as its dearest branch.

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
        flops(functools.partial(gradient, **kwargs), params, *args)
        for gradient in (regularized, plain)
    ]
    return counts[0] / counts[1]


def flops(fun: Callable[..., Any], *args: Any) -> float:
    """Return the operations of one call.

    A product of matrices or a convolution counts two for each multiplication, everything else one
    for each element of its largest operand or result. A loop counts as often as it runs, a
    `while_loop` once, a branch as the dearest alternative. What does not serve the result is left
    out.
    """

    def arrays(*args: Any) -> list[jax.Array]:
        # A traced function returns nothing else; aux may.
        return [x for x in jax.tree.leaves(fun(*args)) if isinstance(x, jax.Array)]

    return _of_jaxpr(jax.make_jaxpr(arrays)(*args).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> float:
    before, after, _ = jaxprs.partition(jaxpr, ())
    return sum(map(_of_eqn, [*before, *after]))


def _of_eqn(eqn: core.JaxprEqn) -> float:
    operands: list[Any] = [v.aval for v in eqn.invars]
    results: list[Any] = [v.aval for v in eqn.outvars]
    inner = [_of_jaxpr(jaxpr) for jaxpr in jaxprs.inner_jaxprs(eqn)]
    sizes = [getattr(x, "size", 0) for x in (*operands, *results)]
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"] * sum(inner)
        case "cond":
            return max(inner)
        case "shard_map":
            return eqn.params["mesh"].size * sum(inner)
        case "dot_general":
            contracted, _ = eqn.params["dimension_numbers"][0]
            shape = operands[0].shape
            return 2.0 * results[0].size * math.prod(shape[i] for i in contracted)
        case "conv_general_dilated":
            kernel = operands[1]
            outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            return 2.0 * results[0].size * kernel.size / outputs
        case "ragged_dot" | "ragged_dot_general":
            return _of_ragged_dot(eqn)
    largest = float(max(sizes, default=0))
    if _is_elementwise(eqn):
        return largest * max(1.0, sum(inner))
    return sum(inner) if inner else largest


def _of_ragged_dot(eqn: core.JaxprEqn) -> float:
    dimensions = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = dimensions.dot_dimension_numbers
    left, _, groups = _shapes(eqn.invars[:3])
    (result,) = _shapes(eqn.outvars)
    products = 2.0 * math.prod(result) * math.prod(left[i] for i in contracted)
    # Where the groups are contracted, each result sums over its own group only.
    within = set(contracted).isdisjoint(dimensions.lhs_ragged_dimensions)
    return products if within else products / groups[-1]


def _is_elementwise(eqn: core.JaxprEqn) -> bool:
    """Whether the function that an equation calls is one of scalars: to reduce, to scatter."""
    inner = [v for jaxpr in jaxprs.inner_jaxprs(eqn) for v in jaxpr.invars]
    return bool(inner) and not any(_shapes(inner)) and any(_shapes(eqn.invars))


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
    return [getattr(v.aval, "shape", ()) for v in variables]
