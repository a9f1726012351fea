"""The operations of a program, counted in its trace as XLA counts those of a compiled one.

With one difference: of a loop XLA takes the body once, however often it runs, and so can't compare
programs whose layers are stacked under `lax.scan`. And it takes a compilation.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from gnp_optax._prefix import jaxprs

# Of these XLA counts nothing: they move data, or are transcendental, which it counts apart.
_FREE = frozenset(
    [
        *("bitcast_convert_type", "broadcast_in_dim", "concatenate", "copy", "device_put"),
        *("dynamic_slice", "dynamic_update_slice", "expand_dims", "gather", "iota", "name", "pad"),
        *("optimization_barrier", "pvary", "random_unwrap", "random_wrap", "reshape", "reshard"),
        *("rev", "scatter", "sharding_constraint", "slice", "split", "squeeze", "stack"),
        *("stop_gradient", "top_k", "transpose", "unstack"),
        *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "cos", "cosh"),
        *("digamma", "erf", "erfc", "exp", "exp2", "expm1", "lgamma", "log", "log1p", "pow"),
        *("rsqrt", "sin", "sinh", "sqrt", "tan", "tanh"),
    ]
)
# For each element of the result, measured; everything else takes one. Random bits are those of
# Threefry, which 20 rounds make.
_PER_RESULT = {"erf_inv": 37, "logistic": 3, "random_bits": 47, "random_split": 50}
# For each element that is read.
_PER_OPERAND = {
    **dict.fromkeys(("argmax", "argmin"), 9),
    **dict.fromkeys(("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"), 16),
    **dict.fromkeys(("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod"), 1),
    **dict.fromkeys(("reduce_sum", "reduce_xor"), 1),
}
_CALLS = jaxprs.JIT | {
    *("checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_lin", "custom_vjp_call"),
    *("custom_vjp_call_jaxpr", "remat", "remat2"),
}


def flops(fun: Callable[..., Any], *args: Any) -> float:
    """Return the operations of one call.

    A product of matrices or a convolution counts two for each multiplication, arithmetic one for
    each element; to move data, and transcendental functions, nothing. A loop counts as often as it
    runs, a `while_loop` once, a branch as the dearest alternative. What does not serve the result
    is left out; what is computed twice from the same operands, such as the bits of a random key,
    counts once; and arithmetic on arrays that have one value in all places, once for all of them.
    """

    def arrays(*args: Any) -> list[jax.Array]:
        # A traced function returns nothing else; aux may.
        return [x for x in jax.tree.leaves(fun(*args)) if isinstance(x, jax.Array)]

    closed = jax.make_jaxpr(arrays)(*args)
    return _of_jaxpr(closed.jaxpr, closed.consts)


def _of_jaxpr(jaxpr: core.Jaxpr, consts: Sequence[Any] = ()) -> float:
    program = _Program()
    return program.needed(program.run(jaxpr, consts, [program.new() for _ in jaxpr.invars]))


class _Step(NamedTuple):
    cost: float
    reads: list[int]
    writes: list[int]
    has_effects: bool


class _Program:
    """A program as a compiler sees it: without calls, and each value computed once.

    A value is a number.
    """

    def __init__(self) -> None:
        self._numbers: Iterator[int] = itertools.count()
        self._steps: list[_Step] = []
        self._found: dict[Hashable, list[int]] = {}
        self._uniform: set[int] = set()  # the same in all places, such as zeros

    def new(self) -> int:
        return next(self._numbers)

    def run(self, jaxpr: core.Jaxpr, consts: Sequence[Any], given: Sequence[int]) -> list[int]:
        """Add the steps of a jaxpr, and return its results."""
        # Known where the jaxpr is that of a call; elsewhere, any values do.
        held = [self._same("constant", id(c)) for c in consts] or map(self._any, jaxpr.constvars)
        env: dict[Any, int] = dict(zip(jaxpr.constvars, held, strict=True))
        env.update(zip(jaxpr.invars, given, strict=True))

        def read(v: Any) -> int:
            if isinstance(v, core.Literal):
                return self._same(str(v.aval), repr(v.val))
            return env[v]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            env.update(zip(eqn.outvars, self._apply(eqn, operands), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def needed(self, results: Sequence[int]) -> float:
        """Return the operations that the results need."""
        needed, total = set(results), 0.0
        for step in reversed(self._steps):
            if step.has_effects or not needed.isdisjoint(step.writes):
                needed.update(step.reads)
                total += step.cost
        return total

    def _any(self, variable: Any) -> int:
        del variable
        return self.new()

    def _same(self, *key: Hashable) -> int:
        """Return the number of a constant."""
        (number,) = self._found.setdefault(key, [self.new()])
        return number

    def _apply(self, eqn: core.JaxprEqn, operands: list[int]) -> list[int]:
        inner = jaxprs.inner_jaxprs(eqn)
        if eqn.primitive.name in _CALLS and len(inner) == 1:
            consts = [c for x in eqn.params.values() for c in getattr(x, "consts", ())]
            return self.run(inner[0], consts, operands)
        key = _key(eqn, operands)
        if key in self._found:
            return self._found[key]
        results = [self.new() for _ in eqn.outvars]
        pairs = zip(eqn.invars, operands, strict=True)
        is_uniform = _keeps_uniform(eqn) and all(
            number in self._uniform or math.prod(_shape(v)) == 1 for v, number in pairs
        )
        if is_uniform:
            self._uniform.update(results)
        cost = min(1.0, _of_eqn(eqn)) if is_uniform else _of_eqn(eqn)
        self._steps.append(_Step(cost, operands, results, bool(jaxprs.effects(eqn))))
        if key is not None:
            self._found[key] = results
        return results


def _key(eqn: core.JaxprEqn, operands: Sequence[int]) -> Hashable | None:
    """Return what two equations have in common that compute the same, if that can be told."""
    if jaxprs.inner_jaxprs(eqn) or eqn.effects:
        return None
    key = (eqn.primitive.name, tuple(sorted(eqn.params.items())), tuple(operands))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _keeps_uniform(eqn: core.JaxprEqn) -> bool:
    """Whether of operands that have one value in all places the result has, too."""
    name = eqn.primitive.name
    if name in ("broadcast_in_dim", "reshape", "slice", "squeeze", "transpose"):
        return True
    if name.startswith("reduce_"):
        return True
    return (
        bool(eqn.invars and eqn.outvars)
        and not jaxprs.inner_jaxprs(eqn)
        and not jaxprs.has_product(eqn)
        and not name.startswith(("cum", "random"))
        and all(_shape(v) in ((), _shape(eqn.outvars[0])) for v in eqn.invars)
    )


def _of_eqn(eqn: core.JaxprEqn) -> float:
    name, params = eqn.primitive.name, eqn.params
    inner = [_of_jaxpr(jaxpr) for jaxpr in jaxprs.inner_jaxprs(eqn)]
    read = float(max((math.prod(_shape(v)) for v in eqn.invars), default=0))
    made = float(max((math.prod(_shape(v)) for v in eqn.outvars), default=0))
    match name:
        case "scan":
            return float(params["length"] * sum(inner))
        case "cond":
            return max(inner)
        case "shard_map":
            return float(params["mesh"].size * sum(inner))
        case "dot_general":
            contracted, _ = params["dimension_numbers"][0]
            left = _shape(eqn.invars[0])
            return 2.0 * made * math.prod(left[i] for i in contracted)
        case "conv_general_dilated":
            return _of_convolution(eqn)
        case "ragged_dot" | "ragged_dot_general":
            return _of_ragged_dot(eqn)
        case "convert_element_type":
            before, after = (getattr(v.aval, "dtype", None) for v in (*eqn.invars, *eqn.outvars))
            return made * (before != after)
        case "integer_pow":
            return made * _multiplications(params["y"])
        case "sort":
            return 2 * read * math.log2(max(2, _shape(eqn.invars[0])[params["dimension"]]))
    if name.startswith("scatter") and name not in _FREE:
        return float(math.prod(_shape(eqn.invars[2])))
    if name.startswith("reduce_window"):
        return made * math.prod(params["window_dimensions"])
    if name in _FREE:
        return 0.0
    if name in _PER_OPERAND:
        return read * _PER_OPERAND[name]
    if name in _PER_RESULT:
        return made * _PER_RESULT[name]
    if _is_elementwise(eqn):
        return max(read, made) * max(1.0, sum(inner))
    return sum(inner) if inner else max(read, made)


def _of_convolution(eqn: core.JaxprEqn) -> float:
    """Count without the places that are padding, or holes of a dilation."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    images, kernel, result = (_shape(v) for v in (*eqn.invars, *eqn.outvars))
    pairs = 1  # of a place in the result and one in the kernel
    for i, (before, _) in enumerate(params["padding"]):
        places, offsets, length = (
            shape[spec[2 + i]]
            for shape, spec in (
                (result, numbers.out_spec),
                (kernel, numbers.rhs_spec),
                (images, numbers.lhs_spec),
            )
        )
        holes = params["lhs_dilation"][i]
        read = np.add.outer(
            np.arange(places) * params["window_strides"][i] - before,
            np.arange(offsets) * params["rhs_dilation"][i],
        )
        pairs *= np.sum((read >= 0) & (read <= (length - 1) * holes) & (read % holes == 0))
    inputs = kernel[numbers.rhs_spec[1]]  # those of a group
    outputs = result[numbers.out_spec[1]]
    examples = images[numbers.lhs_spec[0]] // params["batch_group_count"]
    return 2.0 * float(pairs) * inputs * outputs * examples


def _of_ragged_dot(eqn: core.JaxprEqn) -> float:
    dimensions = eqn.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = dimensions.dot_dimension_numbers
    left, groups = _shape(eqn.invars[0]), _shape(eqn.invars[2])
    products = 2.0 * math.prod(_shape(eqn.outvars[0])) * math.prod(left[i] for i in contracted)
    # Where the groups are contracted, each result sums over its own group only.
    if not set(contracted).isdisjoint(dimensions.lhs_ragged_dimensions):
        products /= groups[-1]
    # But on a TPU, JAX has every group multiply all rows, those of the others as zeros.
    return products if jax.default_backend() == "tpu" else products * groups[-1]


def _multiplications(power: int) -> int:
    bits = abs(power)
    return max(0, bits.bit_length() - 1 + bits.bit_count() - 1) + (power < 0)


def _is_elementwise(eqn: core.JaxprEqn) -> bool:
    """Whether the function that an equation calls is one of scalars: to reduce, to scatter."""
    inner = [v for jaxpr in jaxprs.inner_jaxprs(eqn) for v in jaxpr.invars]
    return bool(inner) and not any(map(_shape, inner)) and any(map(_shape, eqn.invars))


def _shape(variable: Any) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())
