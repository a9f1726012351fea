"""The arrays of a model as one vector, of which each device has its part."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gnp_optax._core import numerics
from gnp_optax.diagnostics import _layout

Arrays = list[Any]


class Embedding:
    """An isometry from lists of arrays to arrays of shape (*mesh, length), padded with zeros.

    To flatten a model into one vector would gather it on every device. Here each device flattens
    its own shard, and of an array that it has in common with others its own share. Complex arrays
    go to their real and imaginary parts. Without a mesh the shape is (length,). To compile what is
    drawn or summed once for one vector is ten times as quick as for each leaf.

    Args:
        arrays: Arrays such as those to embed.
        shardings: Their shardings, all of one mesh, or all None.
    """

    def __init__(self, arrays: Arrays, shardings: Sequence[NamedSharding | None]) -> None:
        self._shardings = shardings
        self._templates = [_template(x) for x in arrays]

    @numerics.promoting
    def embed(self, arrays: Arrays) -> jax.Array:
        """Return arrays as one; no device needs what another has."""
        return self._joined([_real_parts(x) for x in arrays])

    def restore(self, vector: jax.Array) -> Arrays:
        """Undo `embed`."""
        # Of an isometry the transpose is the inverse; JAX's is not conjugated.
        (arrays,) = jax.linear_transpose(self.embed, self._templates)(vector)
        return [
            _layout.place(jnp.conj(x), sharding)
            for x, sharding in zip(arrays, self._shardings, strict=True)
        ]

    @numerics.promoting
    def random(self, key: jax.Array, of_bits: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """Return a random vector, the same however the arrays are sharded; the padding is 0.

        Each element is drawn for itself, by its number. (Beyond 2^32 they come again.) `of_bits` is
        `normal` or `signs`.
        """
        numbers: list[Arrays] = []
        first = 1
        for template in self._templates:
            numbers.append([])
            for _ in range(2 if jnp.iscomplexobj(template) else 1):
                numbers[-1].append(_count(template.shape, first))
                first += template.size
        number = self._joined(numbers)
        dtype = jax.eval_shape(self.embed, self._templates).dtype

        key = _threefry(key)

        def bits(number: jax.Array) -> jax.Array:
            # What threefry derives is random itself; to draw from it would compile as long again.
            return jax.random.key_data(jax.random.fold_in(key, number))[..., 0]

        for _ in number.shape:
            bits = jax.vmap(bits)
        return jnp.where(number == 0, 0, of_bits(bits(number))).astype(dtype)

    def _joined(self, parts: list[Arrays]) -> jax.Array:
        """Return as one the real parts of every array."""
        pieces = [
            _on_devices(part, sharding)
            for of_array, sharding in zip(parts, self._shardings, strict=True)
            for part in of_array
        ]
        return jnp.concatenate(pieces, axis=-1)


def _threefry(key: jax.Array) -> jax.Array:
    """Return a key of which another is derived by a random function, as not by "unsafe_rbg"."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if jax.random.key_impl(key) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")


def normal(bits: jax.Array) -> jax.Array:
    """Return normally distributed numbers for random bits (uint32), of which it uses 23."""
    # Odd multiples of 2^-23 between -1 and 1, which float32 has exactly.
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1
    return jnp.float32(2**0.5) * jax.scipy.special.erfinv(uniform)


def signs(bits: jax.Array) -> jax.Array:
    """Return 1 or -1, each half of the time, for random bits (uint32)."""
    return jnp.where(bits >> 31 == 0, jnp.float32(1), jnp.float32(-1))


def _real_parts(x: Any) -> Arrays:
    return [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]


def _count(shape: tuple[int, ...], first: int) -> jax.Array:
    """Return the numbers from `first` on, in a shape."""
    numbers = jnp.arange(math.prod(shape), dtype=jnp.uint32) + jnp.uint32(first % 2**32)
    return numbers.reshape(shape)


def _template(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), numerics.wide(jnp.result_type(x)))


def _on_devices(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Return an array as (*mesh, length): what each device has, or its share of it."""
    if sharding is None:
        return x.ravel()
    mesh = sharding.mesh
    sizes = [mesh.shape[name] for name in mesh.axis_names]
    x, used = _shards(_layout.place(x, sharding), sharding)
    common = [name for name in mesh.axis_names if name not in used]
    length = x.shape[-1]
    shares = math.prod(mesh.shape[name] for name in common)
    x = jnp.pad(x, [(0, 0)] * len(used) + [(0, -length % shares)])
    x = x.reshape(*x.shape[:-1], *(mesh.shape[name] for name in common), -1)
    x = x.transpose(*((used + common).index(name) for name in mesh.axis_names), len(sizes))
    return _layout.place(x, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))


def _shards(x: jax.Array, sharding: NamedSharding) -> tuple[jax.Array, list[str]]:
    """Return an array as (*axes of the mesh that divide it, length), and these axes."""
    mesh = sharding.mesh
    entries = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    shape: list[int] = []
    names: list[str | None] = []
    for size, entry in zip(x.shape, entries, strict=True):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        parts = [mesh.shape[name] for name in axes]
        shape += [*parts, size // math.prod(parts)]
        names += [*axes, None]
    used = [name for name in mesh.axis_names if name in names]
    within = [i for i, name in enumerate(names) if name is None]
    x = x.reshape(shape).transpose(*(names.index(name) for name in used), *within)
    x = x.reshape(*(mesh.shape[name] for name in used), -1)
    return _layout.place(x, NamedSharding(mesh, PartitionSpec(*used))), used
