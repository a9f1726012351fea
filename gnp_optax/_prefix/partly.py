"""Divide a loop of whose body only a part depends on a perturbed leaf."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from gnp_optax._prefix import jaxprs, refusals
from gnp_optax._prefix.values import Value

Arrays = list[Any]
Variables = list[jaxprs.Var]
Run = Callable[[core.ClosedJaxpr, Sequence[Value]], list[Value]]


def in_two(
    body: core.ClosedJaxpr,
    consts: list[Value],
    carry: list[Value],
    stacks: list[Value],
    scan: Callable[..., Any],
    run: Run,
) -> tuple[list[Value], list[Value]]:
    """Write a scan as two, of which the first computes all that does not depend.

    It stacks what the second one reads of that. What is the same in every iteration is computed
    once, before both.

    Args:
        body: A function of constants, of what is carried, and of a row of stacks.
        consts: The constants.
        carry: What is carried to the first iteration.
        stacks: What is scanned over.
        scan: `jax.lax.scan`, with its options.
        run: Evaluates a program, and opens it.

    Returns:
        What the last iteration carries on, and what is stacked.

    Raises:
        jaxprs.Uncut: If that saves no matrix product, or the loop calls the host.
    """
    rows = [jax.lax.index_in_dim(x.array, 0, keepdims=False) for x in stacks]
    arrays = [*(x.array for x in (*consts, *carry)), *rows]
    kinds = [x.depends for x in (*consts, *carry, *stacks)]
    parts = _parts(body, arrays, kinds, len(consts), len(carry), run)
    jaxpr, depends, results = parts.jaxpr, parts.depends, parts.jaxpr.outvars
    inside = jaxpr.invars[len(consts) :]
    of_carry, of_rows = inside[: len(carry)], inside[len(carry) :]
    # What is carried unchanged is a constant.
    changed = [i for i, v in enumerate(of_carry) if v is not results[i]]
    varying = {of_carry[i] for i in changed}.union(of_rows)
    once, repeated = [], []
    for eqn in parts.before:
        if varying.isdisjoint(jaxprs.read(eqn)):
            once.append(eqn)
        else:
            repeated.append(eqn)
            varying.update(eqn.outvars)
    env = {v: x for v, x in parts.env(arrays).items() if v not in varying}
    env.update(jaxprs.evaluate(jaxpr, once, env))

    computed = {v for eqn in parts.before for v in eqn.outvars}.union(of_carry)
    read = jaxprs.unique(v for eqn in parts.after for v in jaxprs.read(eqn))
    handed = [v for v in read if v in computed and v not in depends]
    stopped = set(handed) - _reached(parts, handed, arrays)
    held = {v: jax.lax.stop_gradient(env[v]) for v in stopped - varying}
    handed = [v for v in handed if v in varying]
    stacked = dict(zip(of_rows, (x.array for x in stacks), strict=True))
    found: dict[int, Any] = {}  # by the place of the result

    def run_scan(
        eqns: Sequence[core.JaxprEqn], kind: bool, env: jaxprs.Env, handing: Variables
    ) -> Arrays:
        """Run a part of the body in every iteration; return what it hands over."""
        own = [i for i in changed if _is_in(of_carry[i], depends) == kind]
        others = range(len(carry), len(results))
        made = [i for i in others if _is_in(results[i], depends) == kind]
        used = {v for eqn in eqns for v in jaxprs.read(eqn)}.union(handing)
        used.update(jaxprs.variables(results[i] for i in (*own, *made)))
        given = [v for v in stacked if v in used]

        def step(carry: Arrays, rows: Arrays) -> tuple[Arrays, tuple[Arrays, Arrays]]:
            now = {**env, **dict(zip((of_carry[i] for i in own), carry, strict=True))}
            now.update(zip(given, rows, strict=True))
            now.update(jaxprs.evaluate(jaxpr, eqns, now))
            to_hand = [jax.lax.stop_gradient(now[v]) if v in stopped else now[v] for v in handing]
            return _values(now, results, own), (_values(now, results, made), to_hand)

        start = [carry[i].array for i in own]
        last, (of_each, to_hand) = scan(step, start, [stacked[v] for v in given])
        found.update(zip([*own, *made], [*last, *of_each], strict=True))
        return to_hand

    stacked.update(zip(handed, run_scan(repeated, False, env, handed), strict=True))
    run_scan(parts.after, True, {**env, **held}, [])
    for refusal in parts.not_cut:
        refusals.add_again(refusal)
    values = [
        Value(found[i], _is_in(v, depends)) if i in found else carry[i]
        for i, v in enumerate(results)
    ]
    return values[: len(carry)], values[len(carry) :]


class _Parts(NamedTuple):
    """The body of a loop, opened, in two parts.

    Attributes:
        program: The body.
        depends: Its variables that depend on a perturbed leaf in some iteration.
        before: The equations of what does not.
        after: The others.
        not_cut: What of the body was left whole.
    """

    program: core.ClosedJaxpr
    depends: set[jaxprs.Var]
    before: list[core.JaxprEqn]
    after: list[core.JaxprEqn]
    not_cut: list[refusals.NotCut]

    @property
    def jaxpr(self) -> core.Jaxpr:
        return self.program.jaxpr

    def env(self, arrays: Arrays) -> jaxprs.Env:
        """Return the values of its inputs, and of what it closes over."""
        known = zip(self.jaxpr.constvars, self.program.consts, strict=True)
        return {**dict(known), **dict(zip(self.jaxpr.invars, arrays, strict=True))}


def _parts(
    body: core.ClosedJaxpr,
    arrays: Arrays,
    kinds: list[bool],
    num_consts: int,
    num_carry: int,
    run: Run,
) -> _Parts:
    """Divide the body, for inputs such as `arrays`; `kinds` tells which depend in the first."""
    while True:
        given = list(kinds)

        def opened(*arrays: Any, given: list[bool] = given) -> Arrays:
            inputs = [Value(x, kind) for x, kind in zip(arrays, given, strict=True)]
            return [x.array for x in run(body, inputs)]

        with refusals.recorded() as not_cut:
            program = jax.make_jaxpr(opened)(*arrays)
        jaxpr = program.jaxpr
        perturbed = [v for v, kind in zip(jaxpr.invars, given, strict=True) if kind]
        depends = jaxprs.depending(jaxpr, perturbed)
        for i, v in enumerate(jaxpr.outvars[:num_carry], num_consts):
            kinds[i] |= _is_in(v, depends)
        if kinds == given:
            break
    known = [v for v in jaxprs.variables(jaxpr.outvars) if v not in depends]
    before, after, _ = jaxprs.partition(jaxpr, perturbed, needed_before=known)
    if not any(map(jaxprs.has_product, before)):
        raise jaxprs.Uncut("its first iteration uses a perturbed leaf")
    if any(map(jaxprs.effects, jaxpr.eqns)):
        raise jaxprs.Uncut("its first iteration uses a perturbed leaf, and it calls the host")
    return _Parts(program, depends, before, after, not_cut)


def _reached(parts: _Parts, handed: Variables, arrays: Arrays) -> set[jaxprs.Var]:
    """Return through which of the variables a gradient passes that comes from the second part.

    From a loop come gradients of zeros, too. They must not be pulled back to where none would have
    come: the derivative may be infinite there.
    """
    jaxpr, depends = parts.jaxpr, parts.depends
    places = [i for i, v in enumerate(jaxpr.invars) if jaxprs.is_inexact(v)]
    results = [v for v in jaxpr.outvars if _is_in(v, depends) and jaxprs.is_inexact(v)]
    reached: set[jaxprs.Var] = set()

    def total(inexact: Arrays) -> jax.Array:
        env = parts.env(arrays)
        env.update(zip((jaxpr.invars[i] for i in places), inexact, strict=True))
        env.update(jaxprs.evaluate(jaxpr, parts.before, env))
        for v in filter(jaxprs.is_inexact, handed):
            env[v] = jaxprs.watched(env[v], functools.partial(reached.add, v))
        env.update(jaxprs.evaluate(jaxpr, parts.after, env))
        sums = (jnp.sum(jnp.real(env[v]).astype(jnp.float32)) for v in results)
        return sum(sums, jnp.zeros((), jnp.float32))

    try:
        jax.make_jaxpr(jax.grad(total))([arrays[i] for i in places])
    except Exception as error:
        message, *_ = str(error).splitlines() or [""]
        why = f"an iteration can't be differentiated, {type(error).__name__}: {message}"
        raise jaxprs.Uncut(f"its first iteration uses a perturbed leaf, and {why}") from error
    return reached


def _is_in(v: Any, variables: set[jaxprs.Var]) -> bool:
    return not isinstance(v, core.Literal) and v in variables


def _values(env: jaxprs.Env, atoms: Sequence[Any], places: Sequence[int]) -> Arrays:
    found = (atoms[i] for i in places)
    return [v.val if isinstance(v, core.Literal) else env[v] for v in found]
