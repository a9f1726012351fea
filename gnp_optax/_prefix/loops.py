"""Cut a loop over layers where the first perturbed one comes in."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from gnp_optax._prefix import iterations, jaxprs, partly, values
from gnp_optax._prefix.values import Value

Arrays = list[Any]
Run = Callable[[core.ClosedJaxpr, Sequence[Value]], list[Value]]


def in_two(eqn: core.JaxprEqn, given: list[Value], run: Run) -> list[Value]:
    """Write a scan as two, of which the first does not depend on a perturbed leaf.

    Its iterations use no stacked layer that depends, be it a row of a stack that is scanned over,
    or picked by an index from one that is constant or carried unchanged. An iteration that uses
    layers of both kinds is written out between the two by `run`, and so cut itself. Of the second
    loop, or of one whose first iteration depends already, what does not depend is a loop of its
    own.

    Raises:
        jaxprs.Uncut: If the first iteration depends already, and none of its products is saved.
    """
    loop = _loop(eqn, given)
    start, first, is_divided = _first_that_depends(eqn, loop)
    carry = loop.carry
    pieces: list[list[Value]] = []  # of what is stacked, in the order of iterations
    if start > 0:
        consts, before = (list(map(values.without_perturbed, x)) for x in (loop.consts, carry))
        found, rows = _scan(loop, consts, before, 0, start)
        known = first.carry if start < loop.length else first.results[: len(carry)]
        carry = [
            old if same else Value(x, False, None, _known(constant))
            for old, same, x, (_, _, constant) in zip(
                carry, first.unchanged, found, known, strict=True
            )
        ]
        pieces.append([Value(x, False) for x in rows])
    if is_divided:
        row = [
            values.squeezed(_rows(loop, x, start, start + 1), 0)._replace(constant=_known(constant))
            for x, (_, _, constant) in zip(loop.stacks, first.row, strict=True)
        ]
        results = run(loop.body, [*loop.consts, *carry, *row])
        carry = results[: len(carry)]
        pieces.append([values.expanded(x, 0) for x in results[len(carry) :]])
        start += 1
    if start < loop.length:
        try:
            last, rows = _rest_in_two(loop, carry, start, run)
        except jaxprs.Uncut:
            if start == 0:
                raise
            last, rows = _whole_rest(loop, carry, start)
        of_carry = zip(carry, first.unchanged, last, strict=True)
        carry = [old if same else x for old, same, x in of_carry]
        pieces.append(rows)
    if loop.reverse:
        pieces.reverse()
    return [*carry, *(values.joined(of_one, 0) for of_one in zip(*pieces, strict=True))]


class _Loop(NamedTuple):
    """A scan: its body is a function of constants, of what is carried, and of a row of stacks."""

    body: core.ClosedJaxpr
    consts: list[Value]
    carry: list[Value]
    stacks: list[Value]
    length: int
    reverse: bool
    unroll: int


def _loop(eqn: core.JaxprEqn, given: list[Value]) -> _Loop:
    params = eqn.params
    consts, carry = iterations.arity(eqn)
    return _Loop(
        params["jaxpr"],
        given[:consts],
        given[consts : consts + carry],
        given[consts + carry :],
        params["length"],
        params["reverse"],
        params["unroll"],
    )


def _first_that_depends(eqn: core.JaxprEqn, loop: _Loop) -> tuple[int, iterations.Iteration, bool]:
    """Return which iteration depends on a perturbed leaf, and whether only in part.

    If none does, it is one behind the last, and what is known is of the last.
    """
    given = iterations.outside([*loop.consts, *loop.carry, *loop.stacks])
    found = None
    for i, found in enumerate(iterations.iterations(eqn, given)):
        if found.depends:
            mixed = any(_rows(loop, x, i, i + 1).layers for x in loop.stacks)
            # What starts from a carry that depends has no beginning that does not.
            known = all(
                s or not x.depends for x, s in zip(found.carry, found.unchanged, strict=True)
            )
            return i, found, known and (found.picks or mixed)
    if found is None:
        raise jaxprs.Uncut("the loop has no iterations")
    return loop.length, found, False


def _known(constant: Any) -> Callable[[], Any] | None:
    return None if constant is None else lambda: constant


def _rows(loop: _Loop, stack: Value, start: int, stop: int) -> Value:
    """Return what some iterations take of a stack."""
    if loop.reverse:
        start, stop = loop.length - stop, loop.length - start
    return values.rows(stack, 0, start, stop)


def _scan(
    loop: _Loop, consts: Arrays, carry: Arrays, start: int, stop: int
) -> tuple[Arrays, Arrays]:
    """Run some of the iterations."""
    body = core.jaxpr_as_fun(loop.body)

    def step(carry: Arrays, row: Arrays) -> tuple[Arrays, Arrays]:
        out = body(*consts, *carry, *row)
        return out[: len(carry)], out[len(carry) :]

    stacks = [_rows(loop, x, start, stop).array for x in loop.stacks]
    scan = functools.partial(jax.lax.scan, reverse=loop.reverse, unroll=loop.unroll)
    found: tuple[Arrays, Arrays] = scan(step, carry, stacks, length=stop - start)
    return found


def _rest_in_two(
    loop: _Loop, carry: list[Value], start: int, run: Run
) -> tuple[list[Value], list[Value]]:
    """Run the last iterations as two loops, of which the first does not depend."""
    stacks = [_rows(loop, x, start, loop.length) for x in loop.stacks]
    scan = functools.partial(
        jax.lax.scan, length=loop.length - start, reverse=loop.reverse, unroll=loop.unroll
    )
    return partly.in_two(loop.body, loop.consts, carry, stacks, scan, run)


def _whole_rest(loop: _Loop, carry: list[Value], start: int) -> tuple[list[Value], list[Value]]:
    """Run the last iterations as they are."""
    arrays = [x.array for x in loop.consts], [x.array for x in carry]
    last, rows = _scan(loop, *arrays, start, loop.length)
    return [Value(x, True) for x in last], [Value(x, True) for x in rows]
