"""Changes of view: equations that join layers, divide or pick them, or change no value at all."""

import itertools
import math
from typing import Any

import jax
import numpy as np
from jax.extend import core

from gnp_optax._prefix import indices, jaxprs, values
from gnp_optax._prefix.values import Value

Found = list[Value] | None


def of_results(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> Found:
    """Return what is known of the results of an equation that changes the view, if it is one."""
    name = eqn.primitive.name
    if name not in _RULES:
        return None
    # What takes several operands may find layers in their being several.
    if name not in _OF_SEVERAL and given[0].layers is None:
        return None
    return _RULES[name](jaxpr, eqn, given, results)


def _concatenated(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> Found:
    return [values.joined(given, eqn.params["dimension"], results[0])]


def _stacked(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> Found:
    axis = eqn.params["axis"]
    return [values.joined([values.expanded(x, axis) for x in given], axis, results[0])]


def _sliced(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]) -> Found:
    value, params = given[0], eqn.params
    if any(stride != 1 for stride in params["strides"] or ()):
        return None
    limits = zip(params["start_indices"], params["limit_indices"], strict=True)
    for axis, (start, stop) in enumerate(limits):
        value = values.rows(value, axis, start, stop)
    return [value]


def _split(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]) -> Found:
    edges = np.cumsum([0, *eqn.params["sizes"]]).tolist()
    pairs = itertools.pairwise(edges)
    return [values.rows(given[0], eqn.params["axis"], start, stop) for start, stop in pairs]


def _squeezed(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> Found:
    value = given[0]
    for axis in sorted(eqn.params["dimensions"], reverse=True):
        value = values.squeezed(value, axis)
    return [value]


def _reversed(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> Found:
    assert given[0].layers is not None
    axis, parts = given[0].layers
    if eqn.params["dimensions"] != (axis,) or any(part.layers for part in parts):
        return None
    found = [Value(jax.lax.rev(part.array, (axis,)), part.depends) for part in parts[::-1]]
    return [values.joined(found, axis, results[0])]


def _reshaped(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> Found:
    if eqn.params["dimensions"] is not None:
        return None
    found = _in_shape(given[0], results[0].shape)
    return None if found is None else [found]


def _in_shape(value: Value, shape: tuple[int, ...]) -> Value | None:
    """Return it in another shape, if that only divides the layers into groups, or undoes it."""
    if value.array.shape == shape:
        return value
    if value.layers is None:
        return Value(jax.lax.reshape(value.array, shape), value.depends)
    axis, old = value.layers.axis, value.array.shape
    before, after = old[:axis], old[axis + 1 :]
    if shape[:axis] != before:
        return None
    more = len(shape) - len(old)
    if more > 0 and shape[axis + 1 + more :] == after and shape[axis]:
        return _in_groups(value, axis, shape[axis : axis + 1 + more])
    merged = math.prod(old[axis : axis + 1 - more])
    if more < 0 and shape[axis:] == (merged, *after[-more:]):
        return _out_of_groups(value, axis, merged // old[axis], shape[axis + 1 :])
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
        pieces.append(_in_shape(piece, (*before, stop - start, *groups[1:], *after)))
    return _joined(pieces, axis)


def _out_of_groups(value: Value, axis: int, length: int, after: tuple[int, ...]) -> Value | None:
    pieces: list[Value | None] = []
    for part in value.layers.parts if value.layers else ():
        before, size = part.array.shape[:axis], part.array.shape[axis]
        if part.layers is not None:
            if size != 1:
                return None
            part = values.squeezed(part, axis)
        pieces.append(_in_shape(part, (*before, size * length, *after)))
    return _joined(pieces, axis)


def _joined(pieces: list[Value | None], axis: int) -> Value | None:
    found = [x for x in pieces if x is not None]
    return values.joined(found, axis) if len(found) == len(pieces) else None


def _picked(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]) -> Found:
    known = [None if x.constant is None else x.constant() for x in given]
    if not indices.picks_clean_layers(eqn, given[0], known):
        return None
    arrays = [values.without_perturbed(given[0]), *(x.array for x in given[1:])]
    return [Value(x, False) for x in jaxprs.run(jaxpr, eqn, arrays)]


def _behind_barriers(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> Found:
    """What does not depend on a perturbed leaf must not wait for what does."""
    arrays = [leaf for x in given for leaf in values.leaves(x)]
    found: dict[int, Any] = {}
    for kind in (False, True):
        places = [i for i, (_, depends) in enumerate(arrays) if depends == kind]
        if places:
            together = eqn.primitive.bind(*(arrays[i][0] for i in places), **eqn.params)
            found.update(zip(places, together, strict=True))
    in_order = iter([found[i] for i in range(len(arrays))])
    return [values.rebuilt(x._replace(constant=None), in_order) for x in given]


def _constrained(
    jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Value], results: list[Any]
) -> Found:
    # `jax.vmap` leaves its axis unconstrained, and so would not write such an equation.
    sharding = eqn.params["sharding"]

    def constrain(x: Any) -> Any:
        try:
            sharding.shard_shape(x.shape)
        except ValueError:  # the layers are divided among the devices, and these not evenly
            return x
        return eqn.primitive.bind(x, **eqn.params)

    arrays = (constrain(x) for x, _ in values.leaves(given[0]))
    return [values.rebuilt(given[0], arrays)]


_OF_SEVERAL = {
    "concatenate": _concatenated,
    "stack": _stacked,
    "optimization_barrier": _behind_barriers,
}
_RULES = {
    **_OF_SEVERAL,
    "slice": _sliced,
    "split": _split,
    "squeeze": _squeezed,
    "rev": _reversed,
    "reshape": _reshaped,
    "dynamic_slice": _picked,
    "gather": _picked,
    "sharding_constraint": _constrained,
}
