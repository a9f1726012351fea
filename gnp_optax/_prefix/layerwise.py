"""Which layers of a result depend on a perturbed leaf.

Known for two kinds of equations. One works on each layer alone: it is what `jax.vmap` makes of an
equation on one layer. The other changes the view of the layers: it joins, divides, or picks them.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from gnp_optax._prefix import jaxprs, values
from gnp_optax._prefix.values import Value

# Larger arrays of integers are no indices of layers.
_MOST_CONSTANTS = 4096


def evaluated(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value]) -> list[Value]:
    """Run an equation; return what is known of its results."""
    name = eqn.primitive.name
    if name in _SAME and any(x.depends for x in given):
        return _SAME[name](jaxpr, eqn, given)
    results = jaxprs.run(jaxpr, eqn, [x.array for x in given])
    if not any(x.depends for x in given):
        constants = _constants(jaxpr, eqn, given)
        return [Value(x, False, None, c) for x, c in zip(results, constants, strict=True)]
    found = None
    if name in _JOINS:
        found = [_JOINS[name](eqn, given, results[0])]
    elif any(x.layers for x in given):
        if name in _VIEWS and given[0].layers:
            found = _VIEWS[name](jaxpr, eqn, given, results)
        if found is None:
            found = _by_layer(jaxpr, eqn, given, results)
    return [Value(x, True) for x in results] if found is None else found


def _constants(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value]
) -> list[Callable[[], Any] | None]:
    """Return how to compute the results, if they are small integers that are known by now."""
    inputs = [x.constant for x in given]
    if not are_known_indices(eqn, inputs):
        return [None] * len(eqn.outvars)

    @functools.cache
    def compute() -> list[Any]:
        return jaxprs.run_now(jaxpr, eqn, [constant() for constant in inputs if constant])

    return [functools.partial(lambda i: compute()[i], i) for i in range(len(eqn.outvars))]


def are_known_indices(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> bool:
    """Whether the results are few integers, computed from what is known: no input is `None`."""
    known = all(x is not None for x in inputs) and not eqn.effects
    return known and all(_is_index(v.aval) for v in eqn.outvars)


def constant(x: Any) -> Value:
    """Return what is known of a constant of a program."""
    is_known = not isinstance(x, jax.core.Tracer) and _is_index(jax.typeof(x))
    return Value(x, False, None, (lambda: np.asarray(x)) if is_known else None)


def _is_index(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    is_whole = isinstance(dtype, np.dtype) and dtype.kind in "iub"
    return is_whole and math.prod(aval.shape) <= _MOST_CONSTANTS


# Each layer alone


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
    choices: list[tuple[int | None, ...]] = []
    for x in given:
        shape = np.shape(x.array)
        may_stack = len(shape) > axis and shape[axis] == size
        # What depends as a whole leaves no layer alone, unless it has layers, too.
        choices.append((axis,) if x.depends else (axis, None) if may_stack else (None,))
        if x.depends and not may_stack:
            return None
    types = [_type_of(v.aval) for v in eqn.invars]
    ranks = {np.ndim(x) for x in results}
    if len(ranks) != 1:
        return None
    (rank,) = ranks
    # An equation that moves the axis to the front is written by `vmap`; to elsewhere, by none.
    for in_axes, out_axis in itertools.product(itertools.product(*choices), {axis: 0, 0: 0}):
        if out_axis >= rank:
            continue
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


# Changes of view


def _concatenated(eqn: core.JaxprEqn, given: list[Value], result: Any) -> Value:
    return values.joined(given, eqn.params["dimension"], result)


def _stacked(eqn: core.JaxprEqn, given: list[Value], result: Any) -> Value:
    axis = eqn.params["axis"]
    return values.joined([values.expanded(x, axis) for x in given], axis, result)


_JOINS = {"concatenate": _concatenated, "stack": _stacked}


def _sliced(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> list[Value] | None:
    value, params = given[0], eqn.params
    if any(stride != 1 for stride in params["strides"] or ()):
        return None
    limits = zip(params["start_indices"], params["limit_indices"], strict=True)
    for axis, (start, stop) in enumerate(limits):
        value = values.rows(value, axis, start, stop)
    return [value]


def _split(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> list[Value]:
    edges = np.cumsum([0, *eqn.params["sizes"]]).tolist()
    pairs = itertools.pairwise(edges)
    return [values.rows(given[0], eqn.params["axis"], start, stop) for start, stop in pairs]


def _squeezed(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> list[Value]:
    value = given[0]
    for axis in sorted(eqn.params["dimensions"], reverse=True):
        value = values.squeezed(value, axis)
    return [value]


def _reversed(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> list[Value] | None:
    assert given[0].layers is not None
    axis, parts = given[0].layers
    if eqn.params["dimensions"] != (axis,) or any(part.layers for part in parts):
        return None
    found = [Value(jax.lax.rev(part.array, (axis,)), part.depends) for part in parts[::-1]]
    return [values.joined(found, axis, results[0])]


def _reshaped(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> list[Value] | None:
    if eqn.params["dimensions"] is not None:
        return None
    found = _in_shape(given[0], results[0].shape)
    return None if found is None else [found]


def _in_shape(value: Value, shape: tuple[int, ...]) -> Value | None:
    """Divide the layers into groups, or undo that."""
    if value.array.shape == shape:
        return value
    if value.layers is None:
        return Value(jax.lax.reshape(value.array, shape), value.depends)
    axis, parts = value.layers
    old = value.array.shape
    before, size, after = old[:axis], old[axis], old[axis + 1 :]
    if shape[:axis] != before:
        return None
    groups = shape[axis : len(shape) - len(after)]
    if len(groups) > 1 and shape[len(shape) - len(after) :] == after and groups[0]:
        return _in_groups(value, axis, groups)
    inner = len(old) - len(shape)
    if (
        inner > 0
        and shape[axis] == size * math.prod(after[:inner])
        and shape[axis + 1 :] == (after[inner:])
    ):
        pieces = []
        for part in parts:
            if part.layers is not None and part.array.shape[axis] != 1:
                return None
            rows = part.array.shape[axis] * math.prod(after[:inner])
            piece = values.squeezed(part, axis) if part.layers else part
            found = _in_shape(piece, (*before, rows, *shape[axis + 1 :]))
            if found is None:
                return None
            pieces.append(found)
        return values.joined(pieces, axis)
    return None


def _in_groups(value: Value, axis: int, groups: tuple[int, ...]) -> Value | None:
    length = math.prod(groups[1:])
    edges = sorted({e for b in values.bounds(value) for e in (b // length, -(-b // length))})
    pieces = []
    for start, stop in itertools.pairwise(edges):
        piece = values.rows(value, axis, start * length, stop * length)
        before, after = piece.array.shape[:axis], piece.array.shape[axis + 1 :]
        if piece.layers is not None:  # one group, of which some layers depend
            piece = values.expanded(piece, axis)
            before = (*before, 1)
            shape = (*before, *groups[1:], *after)
        else:
            shape = (*before, stop - start, *groups[1:], *after)
        found = _in_shape(piece, shape)
        if found is None:
            return None
        pieces.append(found)
    return values.joined(pieces, axis)


def _picked(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> list[Value] | None:
    known = [None if x.constant is None else x.constant() for x in given]
    if not picks_clean_layers(eqn, given[0], known):
        return None
    arrays = [values.without_perturbed(given[0]), *(x.array for x in given[1:])]
    return [Value(x, False) for x in jaxprs.run(jaxpr, eqn, arrays)]


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


_VIEWS = {
    "slice": _sliced,
    "split": _split,
    "squeeze": _squeezed,
    "rev": _reversed,
    "reshape": _reshaped,
    "dynamic_slice": _picked,
    "gather": _picked,
}


# What changes no value, but is no equation on each layer alone


def _behind_barriers(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value]) -> list[Value]:
    """What does not depend on a perturbed leaf must not wait for what does."""
    arrays = [leaf for x in given for leaf in values.leaves(x)]
    found: dict[int, Any] = {}
    for kind in (False, True):
        places = [i for i, (_, depends) in enumerate(arrays) if depends == kind]
        if places:
            together = eqn.primitive.bind(*(arrays[i][0] for i in places), **eqn.params)
            found.update(zip(places, together, strict=True))
    results = iter([found[i] for i in range(len(arrays))])
    return [values.rebuilt(x._replace(constant=None), results) for x in given]


def _constrained(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value]) -> list[Value]:
    sharding = eqn.params["sharding"]

    def constrain(x: Any) -> Any:
        try:
            sharding.shard_shape(x.shape)
        except ValueError:  # the layers are divided among the devices, and these not evenly
            return x
        return eqn.primitive.bind(x, **eqn.params)

    arrays = (constrain(x) for x, _ in values.leaves(given[0]))
    return [values.rebuilt(given[0], arrays)]


_SAME = {"optimization_barrier": _behind_barriers, "sharding_constraint": _constrained}
