"""Cut a loop over layers where the first perturbed one comes in."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gnp_optax._prefix import jaxprs, layerwise, values
from gnp_optax._prefix.values import Value

Run = Callable[[core.ClosedJaxpr, Sequence[Value]], list[Value]]


class _Loop(NamedTuple):
    """A `scan`: its body is a function of constants, of what is carried, and of a row of stacks."""

    body: core.ClosedJaxpr
    consts: list[Value]
    carry: list[Value]
    stacks: list[Value]
    length: int
    reverse: bool
    unroll: int


def in_two(eqn: core.JaxprEqn, given: list[Value], run: Run) -> list[Value]:
    """Write a scan as two, of which the first does not depend on a perturbed leaf.

    Its iterations use no stacked layer that depends, be it a row of a stack that is scanned over,
    or picked by an index from one that is constant or carried unchanged. An iteration that uses
    layers of both kinds is written out between the two, and so cut itself.

    Raises:
        jaxprs.Uncut: If the first iteration depends already.
    """
    loop = _loop(eqn, given)
    start, use = _first_that_depends(loop)
    carry = loop.carry
    pieces: list[list[Value]] = []  # of what each iteration returns, in the order of iterations
    if start > 0:
        clean = list(map(values.without_perturbed, [*loop.consts, *carry]))
        num_consts = len(loop.consts)
        found, rows = _scan(loop, clean[:num_consts], clean[num_consts:], 0, start)
        carry = [
            before if same else Value(x, False, None, constant)
            for x, before, same, constant in zip(
                found, carry, use.unchanged, use.constants, strict=True
            )
        ]
        pieces.append([Value(x, False) for x in rows])
    elif not use.is_divided:
        raise jaxprs.Uncut("its first iteration depends on a perturbed leaf")
    if use.is_divided:
        row = [values.squeezed(_row(loop, x, start), 0) for x in loop.stacks]
        results = run(loop.body, [*loop.consts, *carry, *row])
        carry = results[: len(carry)]
        pieces.append([values.expanded(x, 0) for x in results[len(carry) :]])
        start += 1
    if start < loop.length:
        consts = [x.array for x in loop.consts]
        found, rows = _scan(loop, consts, [x.array for x in carry], start, loop.length)
        carry = [
            before if same else Value(x, True)
            for x, before, same in zip(found, carry, use.unchanged, strict=True)
        ]
        pieces.append([Value(x, True) for x in rows])
    if loop.reverse:
        pieces.reverse()
    return [*carry, *(values.joined(of_one, 0) for of_one in zip(*pieces, strict=True))]


def _loop(eqn: core.JaxprEqn, given: list[Value]) -> _Loop:
    params = eqn.params
    num_consts, num_carry = _arity(eqn)
    return _Loop(
        params["jaxpr"],
        given[:num_consts],
        given[num_consts : num_consts + num_carry],
        given[num_consts + num_carry :],
        params["length"],
        params["reverse"],
        params["unroll"],
    )


def _arity(eqn: core.JaxprEqn) -> tuple[int, int]:
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


def _place(loop: _Loop, iteration: int) -> int:
    return loop.length - 1 - iteration if loop.reverse else iteration


def _row(loop: _Loop, stack: Value, iteration: int) -> Value:
    place = _place(loop, iteration)
    return values.rows(stack, 0, place, place + 1)


def _scan(
    loop: _Loop, consts: list[Any], carry: list[Any], start: int, stop: int
) -> tuple[list[Any], list[Any]]:
    """Run some of the iterations."""
    body = core.jaxpr_as_fun(loop.body)

    def step(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        out = body(*consts, *carry, *row)
        return out[: len(carry)], out[len(carry) :]

    places = sorted([_place(loop, start), _place(loop, stop - 1)])
    of_stacks = [values.rows(x, 0, places[0], places[1] + 1).array for x in loop.stacks]
    scan = functools.partial(jax.lax.scan, reverse=loop.reverse, unroll=loop.unroll)
    found: tuple[list[Any], list[Any]] = scan(step, carry, of_stacks, length=stop - start)
    return found


# What an iteration uses


class _Use(NamedTuple):
    """How an iteration uses what depends on a perturbed leaf.

    Attributes:
        unchanged: Which of the carried values depend and are handed on as they are.
        constants: Of the values carried to it, the integers that are known.
        is_divided: Whether it uses some of the layers that do not depend of a stack that does.
    """

    unchanged: list[bool]
    constants: list[Callable[[], Any] | None]
    is_divided: bool


class _Known(NamedTuple):
    """What is known of a value inside of an iteration.

    Attributes:
        depends: Whether it depends on a perturbed leaf.
        source: The value outside of the loop that it is, unchanged, if that depends.
        constant: Its elements, if they are integers that are known.
    """

    depends: bool
    source: Value | None = None
    constant: Any = None


def _first_that_depends(loop: _Loop) -> tuple[int, _Use]:
    """Return the first iteration that depends on a perturbed leaf, and what it uses of such."""
    consts, carry = ([_outside(x) for x in group] for group in (loop.consts, loop.carry))
    depending = [values.depending(x, 0) for x in loop.stacks]
    constants = [x.constant() if x.constant else [None] * loop.length for x in loop.stacks]
    for iteration in range(loop.length):
        place = _place(loop, iteration)
        row = [_Known(d[place], None, c[place]) for d, c in zip(depending, constants, strict=True)]
        picked: list[core.JaxprEqn] = []
        results = _followed(loop.body, [*consts, *carry, *row], picked)
        after = results[: len(carry)]
        unchanged = [
            x.source is not None and x.source is y.source for x, y in zip(after, carry, strict=True)
        ]
        if any(x.depends for x in row) or any(
            x.depends for x, same in zip(results, [*unchanged, *[False] * len(results)], strict=False) if not same
        ):
            break
        carry = after
    else:
        raise jaxprs.Uncut("nothing that it computes depends on a perturbed leaf")
    rows = [_row(loop, x, iteration) for x in loop.stacks]
    is_divided = bool(picked) or any(x.layers is not None for x in rows)
    if iteration == 0 and any(x.depends and not same for x, same in zip(carry, unchanged, strict=True)):
        is_divided = False  # it has no beginning that does not depend
    known = [None if x.constant is None else functools.partial(lambda c: c, x.constant) for x in carry]
    return iteration, _Use(unchanged, known, is_divided)


def _outside(x: Value) -> _Known:
    return _Known(x.depends, x if x.depends else None, x.constant() if x.constant else None)


def _followed(
    closed: core.ClosedJaxpr, inputs: Sequence[_Known], picked: list[core.JaxprEqn]
) -> list[_Known]:
    """Run an iteration, but only on what is known; note what picks layers that do not depend."""
    jaxpr = closed.jaxpr
    env = {v: _known(c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True)}
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def known(v: Any) -> _Known:
        return _known(v.val) if isinstance(v, core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        given = [known(v) for v in eqn.invars]
        constants = [x.constant for x in given]
        stack = given[0].source if given else None
        if eqn.primitive.name in jaxprs.JIT | jaxprs.CHECKPOINT:
            found = _followed(jaxprs.inner_program(eqn), given, picked)
        elif any(x.depends for x in given):
            others = any(x.depends for x in given[1:])
            clean = stack is not None and not others and layerwise.picks_clean_layers(eqn, stack, constants)
            picked.extend([eqn] * clean)
            found = [_Known(not clean)] * len(eqn.outvars)
        elif layerwise.are_indices(eqn.outvars) and all(c is not None for c in constants) and not eqn.effects:
            found = [_Known(False, None, x) for x in jaxprs.run_now(jaxpr, eqn, constants)]
        else:
            found = [_Known(False)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, found, strict=True))
    return [known(v) for v in jaxpr.outvars]


def _known(x: Any) -> _Known:
    return _Known(False, None, None if isinstance(x, jax.core.Tracer) else x)
