"""Open what hides a cut: jitted functions, checkpoints, and loops over stacked layers."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from gnp_optax._prefix import jaxprs, refusals

_CHECKPOINT = frozenset({"checkpoint", "remat", "remat2"})
# On a stack of layers these work on each layer alone, and have no shape among their parameters.
_LAYERWISE = frozenset({"add", "convert_element_type", "copy", "div", "mul", "neg", "sub"})


class _Value(NamedTuple):
    """A traced array, and whether it depends on a perturbed leaf.

    Of a stack whose first layers do not depend on one, `layers` holds those and the rest.
    """

    array: Any
    depends: bool
    layers: tuple[Any, Any] | None = None


def opened(
    closed: core.ClosedJaxpr, args: Sequence[Any], depends: Sequence[bool]
) -> core.ClosedJaxpr:
    """Write a program anew so that it can be cut finely; `depends` tells the perturbed `args`.

    Of what depends on a perturbed leaf, a jitted function is replaced by its equations; a
    checkpoint with matrix products before the first use of such a leaf becomes two; and so does a
    scan over stacked layers of which the first do not depend: it must run forwards, start from a
    carry that does not depend, and its stacks must be concatenations along the first axis.
    """

    def run(*args: Any) -> list[Any]:
        inputs = [_Value(a, d) for a, d in zip(args, depends, strict=True)]
        return [value.array for value in _run(closed, inputs)]

    return jax.make_jaxpr(run)(*args)


def _run(closed: core.ClosedJaxpr, inputs: Sequence[_Value]) -> list[_Value]:
    jaxpr = closed.jaxpr
    env = dict(zip(jaxpr.constvars, (_Value(c, False) for c in closed.consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def value(v: Any) -> _Value:
        return _Value(v.val, False) if isinstance(v, core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        given = [value(v) for v in eqn.invars]
        with source_info_util.user_context(eqn.source_info.traceback):  # the user's line, not ours
            found = _rewritten(eqn, given) if any(x.depends for x in given) else None
        if found is None:
            depends = any(x.depends for x in given)
            if depends:
                refusals.add(eqn)
            arrays = {v: env[v].array for v in jaxprs.read(eqn)}
            results = jaxprs.evaluate(jaxpr, [eqn], arrays)
            found = [_Value(results[v], depends) for v in eqn.outvars]
            if depends and len(found) == 1:
                found = [found[0]._replace(layers=_layers(jaxpr, eqn, given))]
        env.update(zip(eqn.outvars, found, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _rewritten(eqn: core.JaxprEqn, given: list[_Value]) -> list[_Value] | None:
    name = eqn.primitive.name
    if name in jaxprs.JIT and not _has_shardings(eqn):
        return _run(eqn.params["jaxpr"], given)
    if name in _CHECKPOINT:
        return _two_checkpoints(eqn, given)
    if name == "scan":
        return _two_scans(eqn, given)
    if name == "slice":
        return _slice_of_first_layers(eqn, given[0])
    return None


def _has_shardings(eqn: core.JaxprEqn) -> bool:
    # Without the call, the shardings that it asks for would be lost.
    asked = [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]
    return any(isinstance(s, jax.sharding.Sharding) for s in asked)


def _layers(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[_Value]) -> tuple[Any, Any] | None:
    """Return the first layers of the result, which do not depend, and the rest, if known."""
    name = eqn.primitive.name
    if name == "concatenate" and eqn.params["dimension"] == 0:
        first = next(i for i, x in enumerate(given) if x.depends)
        if first == 0:
            return None
        return _joined([x.array for x in given[:first]]), _joined([x.array for x in given[first:]])
    stacks = [x for x in given if x.layers is not None]
    others = [x for x in given if x.layers is None]
    scalars = all(jnp.ndim(x.array) == 0 and not x.depends for x in others)
    if name not in _LAYERWISE or len(stacks) != 1 or not scalars:
        return None
    variable = next(v for v, x in zip(eqn.invars, given, strict=True) if x is stacks[0])
    arrays = {
        v: x.array
        for v, x in zip(eqn.invars, given, strict=True)
        if not isinstance(v, core.Literal)
    }
    assert stacks[0].layers is not None
    first, rest = (
        jaxprs.evaluate(jaxpr, [eqn], {**arrays, variable: part})[eqn.outvars[0]]
        for part in stacks[0].layers
    )
    return first, rest


def _slice_of_first_layers(eqn: core.JaxprEqn, stack: _Value) -> list[_Value] | None:
    if stack.layers is None or eqn.params["limit_indices"][0] > len(stack.layers[0]):
        return None
    return [_Value(jax.lax.slice(stack.layers[0], **eqn.params), False)]


def _two_scans(eqn: core.JaxprEqn, given: list[_Value]) -> list[_Value] | None:
    params = eqn.params
    num_consts, num_carry = _scan_arity(eqn)
    consts, carry = given[:num_consts], given[num_consts : num_consts + num_carry]
    stacks = given[num_consts + num_carry :]
    starts = [x.layers[0].shape[0] for x in stacks if x.layers is not None]
    known = [x.layers is not None or not x.depends for x in stacks]
    if params["reverse"] or not starts or not all(known):
        return None
    if any(x.depends for x in [*consts, *carry]):
        return None
    start = min(starts)

    body = core.jaxpr_as_fun(params["jaxpr"])

    def step(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        out = body(*(x.array for x in consts), *carry, *xs)
        return out[:num_carry], out[num_carry:]

    scan = functools.partial(jax.lax.scan, step, unroll=params["unroll"])
    cut = [_cut_at(x, start) for x in stacks]
    middle, first = scan([x.array for x in carry], [x for x, _ in cut], length=start)
    last, second = scan(middle, [x for _, x in cut], length=params["length"] - start)
    collected = [_Value(_joined([a, b]), True, (a, b)) for a, b in zip(first, second, strict=True)]
    return [*(_Value(x, True) for x in last), *collected]


def _scan_arity(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Return the number of constants and of carried values.

    Told by the shapes, since versions of JAX differ in how they write it down: what is stacked
    loses its first axis inside the loop.
    """
    body = eqn.params["jaxpr"]

    def same(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    num_carry = same(eqn.outvars, body.jaxpr.outvars)
    return same(eqn.invars, body.jaxpr.invars) - num_carry, num_carry


def _cut_at(stack: _Value, start: int) -> tuple[Any, Any]:
    if stack.layers is None:
        return stack.array[:start], stack.array[start:]
    first, rest = stack.layers
    return (first, rest) if len(first) == start else (first[:start], _joined([first[start:], rest]))


def _joined(arrays: list[Any]) -> Any:
    return arrays[0] if len(arrays) == 1 else jax.lax.concatenate(arrays, 0)


def _two_checkpoints(eqn: core.JaxprEqn, given: list[_Value]) -> list[_Value] | None:
    inner = core.ClosedJaxpr(eqn.params["jaxpr"], ())
    arrays = [x.array for x in given]
    program = opened(inner, arrays, [x.depends for x in given])
    jaxpr = program.jaxpr
    perturbed = [v for v, x in zip(jaxpr.invars, given, strict=True) if x.depends]
    before, after, _ = jaxprs.partition(jaxpr, perturbed)
    if jaxprs.has_state(jaxpr) or not any(map(jaxprs.has_product, before)):
        return None
    env = {
        **dict(zip(jaxpr.constvars, program.consts, strict=True)),
        **dict(zip(jaxpr.invars, arrays, strict=True)),
    }
    policy = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    for part in (before, after):
        made = jaxprs.unique(v for e in part for v in e.outvars)
        needed = set(jaxprs.variables(jaxpr.outvars))
        if part is before:
            needed.update(v for e in after for v in jaxprs.read(e))
        own = set(made)
        inputs = jaxprs.unique(v for e in part for v in jaxprs.read(e) if v not in own)
        outputs = [v for v in made if v in needed]
        run = functools.partial(_run_part, jaxpr, part, inputs, outputs)
        results = jax.checkpoint(run, **policy)(*(env[v] for v in inputs))
        env.update(zip(outputs, results, strict=True))
    depends = set(perturbed).union(*(e.outvars for e in after))
    return [
        _Value(v.val, False) if isinstance(v, core.Literal) else _Value(env[v], v in depends)
        for v in jaxpr.outvars
    ]


def _run_part(
    jaxpr: core.Jaxpr,
    eqns: Sequence[core.JaxprEqn],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *args: Any,
) -> list[Any]:
    results = jaxprs.evaluate(jaxpr, eqns, dict(zip(inputs, args, strict=True)))
    return [results[v] for v in outputs]
