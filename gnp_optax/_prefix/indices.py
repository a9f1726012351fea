"""Integers that are known while a loss is traced, and which layers they pick from a stack."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from gnp_optax._prefix import jaxprs, values
from gnp_optax._prefix.values import Value

# Larger arrays of integers are no indices of layers.
_MOST = 4096


def constant(x: Any) -> Value:
    """Return what is known of a constant of a program."""
    is_known = not isinstance(x, jax.core.Tracer) and _is_index(jax.typeof(x))
    return Value(x, False, None, (lambda: np.asarray(x)) if is_known else None)


def are_known(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> bool:
    """Whether the results are few integers, computed from what is known: no input is `None`."""
    known = all(x is not None for x in inputs) and not eqn.effects
    return known and all(_is_index(v.aval) for v in eqn.outvars)


def of_results(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value]
) -> list[Callable[[], Any] | None]:
    """Return how to compute the results, if they are few integers that are known by now."""
    inputs = [x.constant for x in given]
    if not are_known(eqn, inputs):
        return [None] * len(eqn.outvars)

    @functools.cache
    def compute() -> list[Any]:
        return jaxprs.run_now(jaxpr, eqn, [constant() for constant in inputs if constant])

    return [functools.partial(lambda i: compute()[i], i) for i in range(len(eqn.outvars))]


def _is_index(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    is_whole = isinstance(dtype, np.dtype) and dtype.kind in "iub"
    return is_whole and math.prod(aval.shape) <= _MOST


def picks_clean_layers(eqn: core.JaxprEqn, stack: Value, known: Sequence[Any]) -> bool:
    """Whether the equation reads only layers of a stack that do not depend.

    `known` has those of the operands that are known by now: indices.
    """
    if stack.layers is None:
        return False
    axis = stack.layers.axis
    depends = values.depending(stack, axis)
    if eqn.primitive.name == "dynamic_slice":
        start = known[1 + axis]
        length = eqn.params["slice_sizes"][axis]
    elif eqn.primitive.name == "gather":
        numbers = eqn.params["dimension_numbers"]
        if tuple(numbers.start_index_map) != (axis,) or numbers.operand_batching_dims:
            return False
        start = known[1]
        length = eqn.params["slice_sizes"][axis]
    else:
        return False
    if start is None:
        return False
    starts = np.clip(np.asarray(start).reshape(-1), 0, len(depends) - length)
    return not any(depends[i] for first in starts for i in range(first, first + length))
