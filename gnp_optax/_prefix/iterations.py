"""Follow what depends on a perturbed leaf through the iterations of a loop, without running it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from gnp_optax._prefix import indices, jaxprs, values
from gnp_optax._prefix.values import Value


class Known(NamedTuple):
    """What is known of an array inside of a loop.

    Attributes:
        depends: Whether it depends on a perturbed leaf.
        source: The value outside of the loop that it is, unchanged, if that depends.
        constant: Its elements, if they are integers that are known.
    """

    depends: bool
    source: Value | None = None
    constant: np.ndarray | None = None


class Iteration(NamedTuple):
    """What is known of one iteration.

    Attributes:
        row: What it takes from the stacks that are scanned over.
        carry: What is carried to it.
        results: What is carried on, and what is stacked.
        unchanged: Which of the carried values depend and are handed on as they are.
        depends: Whether another result does, or an effect.
        picks: Whether it picks layers that do not depend from a stack that does.
    """

    row: list[Known]
    carry: list[Known]
    results: list[Known]
    unchanged: list[bool]
    depends: bool
    picks: bool


def outside(values: Sequence[Value]) -> list[Known]:
    """Return what is known of values before the loop."""
    constants = (None if x.constant is None else x.constant() for x in values)
    return [
        Known(x.depends, x if x.depends else None, constant)
        for x, constant in zip(values, constants, strict=True)
    ]


def iterations(eqn: core.JaxprEqn, given: Sequence[Known]) -> Iterator[Iteration]:
    """Yield what is known of the iterations of a scan, in their order."""
    num_consts, num_carry = arity(eqn)
    consts, carry = list(given[:num_consts]), list(given[num_consts : num_consts + num_carry])
    stacks = given[num_consts + num_carry :]
    length = eqn.params["length"]
    followed: list[Any] = []
    for i in reversed(range(length)) if eqn.params["reverse"] else range(length):
        row = [_row(x, i) for x in stacks]
        inputs = [*consts, *carry, *row]
        state = [(x.depends, id(x.source), _bytes(x.constant)) for x in inputs]
        if state != followed:
            seen, followed = _Seen(), state
            results = _followed(eqn.params["jaxpr"], inputs, seen)
        pairs = zip(results[:num_carry], carry, strict=True)
        unchanged = [a.source is not None and a.source is b.source for a, b in pairs]
        others = [*(not same for same in unchanged), *[True] * (len(results) - num_carry)]
        depends = seen.effect or any(x.depends for x, o in zip(results, others, strict=True) if o)
        yield Iteration(row, carry, results, unchanged, depends, seen.pick)
        carry = results[:num_carry]


def arity(eqn: core.JaxprEqn) -> tuple[int, int]:
    """Return the number of constants and of carried values of a scan.

    Told by the shapes, since versions of JAX differ in how they write it down: what is stacked
    loses its first axis inside the loop.
    """
    body = eqn.params["jaxpr"]

    def same(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    num_carry = same(eqn.outvars, body.jaxpr.outvars)
    return same(eqn.invars, body.jaxpr.invars) - num_carry, num_carry


def _row(x: Known, place: int) -> Known:
    depends = x.depends if x.source is None else values.depending(x.source, 0)[place]
    return Known(depends, None, None if x.constant is None else x.constant[place])


def _bytes(constant: np.ndarray | None) -> bytes | None:
    return None if constant is None else constant.tobytes()


class _Seen:
    """What an iteration does with what depends, beside computing results."""

    effect = False
    pick = False


def _followed(closed: core.ClosedJaxpr, inputs: Sequence[Known], seen: _Seen) -> list[Known]:
    jaxpr = closed.jaxpr
    consts = outside(list(map(indices.constant, closed.consts)))
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def known(atoms: Sequence[Any]) -> list[Known]:
        literals = [indices.constant(v.val) for v in atoms if isinstance(v, core.Literal)]
        found = iter(outside(literals))
        return [next(found) if isinstance(v, core.Literal) else env[v] for v in atoms]

    for eqn in jaxpr.eqns:
        results = _results(jaxpr, eqn, known(eqn.invars), seen)
        env.update(zip(eqn.outvars, results, strict=True))
    return known(jaxpr.outvars)


def _results(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, given: list[Known], seen: _Seen) -> list[Known]:
    if eqn.primitive.name in jaxprs.JIT | jaxprs.CHECKPOINT:
        return _followed(jaxprs.inner_program(eqn), given, seen)
    constants = [x.constant for x in given]
    if not any(x.depends for x in given):
        if indices.are_known(eqn, constants):
            return [Known(False, None, x) for x in jaxprs.run_now(jaxpr, eqn, constants)]
        return [Known(False)] * len(eqn.outvars)
    stack, others = given[0].source, given[1:]
    if stack is not None and not any(x.depends for x in others):
        is_clean = indices.picks_clean_layers(eqn, stack, constants)
        seen.pick |= is_clean
        if is_clean:
            return [Known(False)] * len(eqn.outvars)
    if eqn.primitive.name == "scan" and any(x.source is not None for x in given):
        return _of_inner_loop(eqn, given, seen)
    seen.effect |= bool(eqn.effects)
    return [Known(True)] * len(eqn.outvars)


def _of_inner_loop(eqn: core.JaxprEqn, given: list[Known], seen: _Seen) -> list[Known]:
    num_consts, num_carry = arity(eqn)
    carry = given[num_consts : num_consts + num_carry]
    stacked = [False] * (len(eqn.outvars) - num_carry)
    for found in iterations(eqn, given):
        seen.pick |= found.picks
        seen.effect |= bool(eqn.effects) and found.depends
        carry, rows = found.results[:num_carry], found.results[num_carry:]
        stacked = [before or x.depends for before, x in zip(stacked, rows, strict=True)]
    return [*carry, *map(Known, stacked)]
