"""Traced arrays, and what is known of them: whether they depend on a perturbed leaf, or in part."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Value(NamedTuple):
    """A traced array, and whether it depends on a perturbed leaf.

    Attributes:
        array: The array.
        depends: Whether it depends on a perturbed leaf.
        layers: Of a stack of which some layers depend and others don't, its parts.
        constant: Of small integers that are known while the loss is traced, how to compute them.
    """

    array: Any
    depends: bool
    layers: "Layers | None" = None
    constant: Callable[[], Any] | None = None


class Layers(NamedTuple):
    """The parts of a stack along one of its axes; one that is one layer may have parts itself."""

    axis: int
    parts: tuple[Value, ...]


def leaves(value: Value) -> Iterator[tuple[Any, bool]]:
    """Yield the arrays of a value and of its parts, each with whether it depends."""
    yield value.array, value.depends
    for part in value.layers.parts if value.layers else ():
        yield from leaves(part)


def rebuilt(value: Value, arrays: Iterator[Any]) -> Value:
    """Put others in the place of the arrays that `leaves` yields."""
    array = next(arrays)
    if value.layers is None:
        return value._replace(array=array)
    axis, parts = value.layers
    return value._replace(
        array=array, layers=Layers(axis, tuple(rebuilt(p, arrays) for p in parts))
    )


def joined(values: Sequence[Value], axis: int, array: Any = None) -> Value:
    """Return the concatenation; `array`, if it has been computed already."""
    if len(values) == 1:
        return values[0]
    if array is not None and all(x.depends and x.layers is None for x in values):
        return Value(array, True)
    parts: list[Value] = []
    for x in values:
        nested = x.layers is not None and x.layers.axis == axis
        for part in x.layers.parts if nested and x.layers else (x,):
            last = parts[-1] if parts else None
            plain = last is not None and last.layers is None and part.layers is None
            if last is not None and plain and last.depends == part.depends:
                together = jax.lax.concatenate([last.array, part.array], axis)
                parts[-1] = Value(together, part.depends)
            else:
                parts.append(part)
    if len(parts) == 1:
        return parts[0]
    if array is None:
        array = jax.lax.concatenate([x.array for x in parts], axis)
    return Value(array, True, Layers(axis, tuple(parts)))


def bounds(value: Value) -> list[int]:
    """Return where the parts of a stack begin, and where the last one ends."""
    found = [0]
    if value.layers is not None:
        axis, parts = value.layers
        for part in parts:
            found.append(found[-1] + part.array.shape[axis])
    return found


def rows(value: Value, axis: int, start: int, stop: int) -> Value:
    """Return a slice along one axis."""
    if (start, stop) == (0, value.array.shape[axis]):
        return value
    array = jax.lax.slice_in_dim(value.array, start, stop, axis=axis)
    if value.layers is None:
        return Value(array, value.depends)
    at, parts = value.layers
    if at != axis:
        return joined([rows(part, axis, start, stop) for part in parts], at, array)
    found = []
    for low, part in zip(bounds(value), parts, strict=False):
        first, last = max(start - low, 0), min(stop - low, part.array.shape[axis])
        if first < last:
            found.append(rows(part, axis, first, last))
    return joined(found, axis, array)


def squeezed(value: Value, axis: int) -> Value:
    """Take away an axis of length 1."""
    return _reshaped(value, lambda x: jnp.squeeze(x, axis), lambda at: at - (axis < at))


def expanded(value: Value, axis: int) -> Value:
    """Add an axis of length 1."""
    return _reshaped(value, lambda x: jnp.expand_dims(x, axis), lambda at: at + (axis <= at))


def _reshaped(value: Value, reshape: Callable[[Any], Any], move: Callable[[int], int]) -> Value:
    layers = value.layers
    if layers is not None:
        parts = tuple(_reshaped(part, reshape, move) for part in layers.parts)
        layers = Layers(move(layers.axis), parts)
    return Value(reshape(value.array), value.depends, layers)


def without_perturbed(value: Value) -> Any:
    """Return the array with zeros in the place of what depends: for whoever does not read them."""
    if not value.depends:
        return value.array
    if value.layers is None:
        return jnp.zeros_like(value.array)
    axis, parts = value.layers
    return jax.lax.concatenate([without_perturbed(part) for part in parts], axis)


def depending(value: Value, axis: int) -> list[bool]:
    """Return which layers along an axis depend, at least in part."""
    if value.layers is None:
        return [value.depends] * value.array.shape[axis]
    at, parts = value.layers
    each = [depending(part, axis) for part in parts]
    if at == axis:
        return [flag for flags in each for flag in flags]
    return [any(flags) for flags in zip(*each, strict=True)]
