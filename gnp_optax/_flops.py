"""Count the floating-point operations of a program, from its trace.

XLA's own count of a compiled program takes the body of a loop once, however often it runs, and so
can't compare programs whose layers are stacked under `lax.scan`; and it takes a compilation.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from gnp_optax import _jaxprs


def flops(fun: Callable[..., Any], *args: Any) -> float:
    """Return the operations of one call.

    A product of matrices or a convolution counts two for each multiplication, everything else one
    for each element of its largest operand or result. A loop counts as often as it runs, a
    `while_loop` once, a branch as the dearest alternative. What does not serve the result is left
    out.
    """
    return _of_jaxpr(jax.make_jaxpr(fun)(*args).jaxpr)


def _of_jaxpr(jaxpr: core.Jaxpr) -> float:
    before, after, _ = _jaxprs.partition(jaxpr, ())
    return sum(map(_of_eqn, [*before, *after]))


def _of_eqn(eqn: core.JaxprEqn) -> float:
    operands: list[Any] = [v.aval for v in eqn.invars]
    results: list[Any] = [v.aval for v in eqn.outvars]
    inner = [_of_jaxpr(jaxpr) for jaxpr in _jaxprs.inner_jaxprs(eqn)]
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
    sizes = [getattr(x, "size", 0) for x in (*operands, *results)]
    return sum(inner) if inner else float(max(sizes, default=0))
