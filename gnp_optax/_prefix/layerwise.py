"""Which layers of a result depend on a perturbed leaf.

Known for two kinds of equations. One works on each layer alone: it is what `jax.vmap` writes for
an equation on one layer. The other changes the view of the layers.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from gnp_optax._prefix import indices, jaxprs, values, views
from gnp_optax._prefix.values import Value

# Of an equation with more parameters than that, as a convolution, the search would take seconds.
_MOST_CHOICES = 64


def evaluated(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value]) -> list[Value]:
    """Run an equation; return what is known of its results."""
    results = jaxprs.run(jaxpr, eqn, [x.array for x in given])
    if not any(x.depends for x in given):
        known = indices.of_results(jaxpr, eqn, given)
        return [Value(x, False, None, c) for x, c in zip(results, known, strict=True)]
    found = views.of_results(jaxpr, eqn, given, results)
    if found is None and any(x.layers for x in given) and not jaxprs.inner_jaxprs(eqn):
        found = _by_layer(jaxpr, eqn, given, results)
    return [Value(x, True) for x in results] if found is None else found


def _by_layer(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> list[Value] | None:
    stacks = [x for x in given if x.layers is not None]
    axes = {x.layers.axis for x in stacks if x.layers is not None}
    if len(axes) != 1:
        return None
    (axis,) = axes
    size = stacks[0].array.shape[axis]
    if any(x.array.shape[axis] != size for x in stacks):
        return None
    mapped = _mapped(eqn, given, axis, size, results)
    if mapped is None:
        return None
    of_layers, in_axes, out_axis = mapped
    runs = []
    edges = sorted({edge for x in stacks for edge in values.bounds(x)})
    for start, stop in itertools.pairwise(edges):
        pairs = list(zip(given, in_axes, strict=True))
        part = [x if a is None else values.rows(x, a, start, stop) for x, a in pairs]
        arrays = [x.array for x in part]
        if any(x.layers for x in part):
            nested = jax.make_jaxpr(of_layers)(*arrays).jaxpr
            runs.append(evaluated(nested, nested.eqns[0], part))
        else:
            depends = any(x.depends for x in part)
            runs.append([Value(x, depends) for x in of_layers(*arrays)])
    return [
        values.joined([run[i] for run in runs], out_axis, array) for i, array in enumerate(results)
    ]


def _mapped(
    eqn: core.JaxprEqn, given: list[Value], axis: int, size: int, results: list[Any]
) -> tuple[Callable[..., Any], tuple[int | None, ...], int] | None:
    """Return the equation as a function of any number of layers, if it works on each alone.

    It does if it is the very equation that `jax.vmap` writes for one of a single layer. Such an
    equation is looked for among those that have lost the axis in some of their parameters.
    """
    may_stack = [axis < np.ndim(x.array) and np.shape(x.array)[axis] == size for x in given]
    # What depends as a whole leaves no layer alone, unless it has layers, too.
    if any(x.depends and not stacks for x, stacks in zip(given, may_stack, strict=True)):
        return None
    # Of the others, those that may have layers have them all, or none has.
    most = tuple(axis if stacks else None for stacks in may_stack)
    least = tuple(axis if x.depends else None for x in given)
    types = [_type_of(v.aval) for v in eqn.invars]
    ranks = {np.ndim(x) for x in results}
    if len(ranks) != 1:
        return None
    (rank,) = ranks
    # An equation that moves the axis to the front is written by `vmap`; to elsewhere, by none.
    for in_axes, out_axis in itertools.product((most, least), range(min(axis + 1, rank))):
        for params in _parameters_of_one(eqn, axis, out_axis):

            def one(*arrays: Any, params: Any = params) -> list[Any]:
                found = eqn.primitive.bind(*arrays, **params)
                return found if eqn.primitive.multiple_results else [found]

            over = jax.vmap(one, in_axes, out_axis)
            try:
                if _is_written_as(eqn, jax.make_jaxpr(over)(*types).jaxpr):
                    return over, in_axes, out_axis
            except Exception:  # no equation has such parameters
                continue
    return None


def _type_of(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _is_written_as(eqn: core.JaxprEqn, jaxpr: core.Jaxpr) -> bool:
    if len(jaxpr.eqns) != 1:
        return False
    (found,) = jaxpr.eqns
    return bool(
        found.primitive is eqn.primitive
        and found.params == eqn.params
        and list(found.invars) == list(jaxpr.invars)
        and list(found.outvars) == list(jaxpr.outvars)
        and _shapes(found) == _shapes(eqn)
    )


def _shapes(eqn: core.JaxprEqn) -> list[Any]:
    return [getattr(v.aval, "shape", None) for v in eqn.outvars]


def _parameters_of_one(eqn: core.JaxprEqn, axis: int, out_axis: int) -> Iterator[dict[str, Any]]:
    names = list(eqn.params)
    choices = []
    for value in eqn.params.values():
        candidates = [value, _without_axis(value, axis), *_without_size(value, {axis, out_axis})]
        choices.append([x for i, x in enumerate(candidates) if _is_new(x, candidates[:i])])
    if math.prod(map(len, choices)) > _MOST_CHOICES:
        return
    for params in itertools.product(*choices):
        yield dict(zip(names, params, strict=True))


def _is_new(x: Any, others: list[Any]) -> bool:
    return not any(x is other for other in others) and (
        not isinstance(x, (int, tuple)) or x not in others
    )


def _without_axis(value: Any, axis: int) -> Any:
    """Of a parameter that names axes, what is left of them."""
    if isinstance(value, tuple):
        return tuple(_without_axis(x, axis) for x in value if x is True or x != axis)
    is_axis = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return value - 1 if is_axis and value > axis else value


def _without_size(value: Any, axes: set[int]) -> Iterator[Any]:
    """Of a parameter that has an entry for each axis, the others."""
    if isinstance(value, tuple):
        for axis in axes:
            yield value[:axis] + value[axis + 1 :]
