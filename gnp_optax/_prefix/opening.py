"""Open what hides a cut: jitted functions, checkpoints, and loops over stacked layers."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util

from gnp_optax._prefix import indices, jaxprs, layerwise, loops, refusals, values
from gnp_optax._prefix.values import Value


def opened(
    closed: core.ClosedJaxpr, args: Sequence[Any], depends: Sequence[bool]
) -> core.ClosedJaxpr:
    """Write a program anew so that it can be cut finely; `depends` tells the perturbed `args`.

    Of what depends on a perturbed leaf, a jitted function is replaced by its equations; a
    checkpoint with matrix products before the first use of such a leaf becomes two; and so does a
    scan over layers of which the first do not depend, or of whose body a part does not.
    """

    def run(*args: Any) -> list[Any]:
        inputs = [Value(a, d) for a, d in zip(args, depends, strict=True)]
        return [value.array for value in _run(closed, inputs)]

    return jax.make_jaxpr(run)(*args)


def _run(closed: core.ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
    jaxpr = closed.jaxpr
    env = {v: indices.constant(c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def value(v: Any) -> Value:
        return indices.constant(v.val) if isinstance(v, core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        given = [value(v) for v in eqn.invars]
        with source_info_util.user_context(eqn.source_info.traceback):  # the user's line, not ours
            found = _rewritten(eqn, given) if any(x.depends for x in given) else None
            if found is None:
                found = layerwise.evaluated(jaxpr, eqn, given)
        env.update(zip(eqn.outvars, found, strict=True))
    return [value(v) for v in jaxpr.outvars]


def _rewritten(eqn: core.JaxprEqn, given: list[Value]) -> list[Value] | None:
    """Return the results of an equation that could be opened or cut."""
    name = eqn.primitive.name
    try:
        if name in jaxprs.JIT:
            return _inlined(eqn, given)
        if name in jaxprs.CHECKPOINT:
            return _two_checkpoints(eqn, given)
        if name == "scan":
            return loops.in_two(eqn, given, _run)
    except jaxprs.Uncut as why:
        refusals.add(eqn, str(why))
        return None
    refusals.add(eqn)
    return None


def _inlined(eqn: core.JaxprEqn, given: list[Value]) -> list[Value]:
    asked = [*eqn.params["in_shardings"], *eqn.params["out_shardings"]]
    if any(isinstance(s, jax.sharding.Sharding) for s in asked):
        raise jaxprs.Uncut("without the call, the shardings that it asks for would be lost")
    return _run(jaxprs.inner_program(eqn), given)


def _two_checkpoints(eqn: core.JaxprEqn, given: list[Value]) -> list[Value]:
    results: list[Value] = []
    flat = [leaf for x in given for leaf in values.leaves(x)]
    arrays = [array for array, _ in flat]

    def run(*arrays: Any) -> list[Any]:
        left = iter(arrays)
        results[:] = _run(jaxprs.inner_program(eqn), [values.rebuilt(x, left) for x in given])
        return [array for x in results for array, _ in values.leaves(x)]

    program = jax.make_jaxpr(run)(*arrays)
    jaxpr = program.jaxpr
    perturbed = [v for v, (_, depends) in zip(jaxpr.invars, flat, strict=True) if depends]
    before, after, _ = jaxprs.partition(jaxpr, perturbed)
    if jaxprs.has_state(jaxpr):
        raise jaxprs.Uncut("it has mutable state")
    if not any(map(jaxprs.has_product, before)):
        raise jaxprs.Uncut("it computes no matrix product before it uses a perturbed leaf")
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
        run_part = functools.partial(_run_part, jaxpr, part, inputs, outputs)
        found = jax.checkpoint(run_part, **policy)(*(env[v] for v in inputs))
        env.update(zip(outputs, found, strict=True))
    made_again = iter(v.val if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars)
    return [values.rebuilt(x, made_again) for x in results]


def _run_part(
    jaxpr: core.Jaxpr,
    eqns: Sequence[core.JaxprEqn],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    *args: Any,
) -> list[Any]:
    results = jaxprs.evaluate(jaxpr, eqns, dict(zip(inputs, args, strict=True)))
    return [results[v] for v in outputs]
