"""Cut a loss where it first uses a perturbed leaf.

What a loss computes without the perturbed leaves, the prefix, is the same at theta and at
theta + eps. The rest, the suffix, is a loss of its own: of the perturbed leaves and of the
boundary, the values that the prefix hands over. A gradient of the suffix with respect to both,
pulled back once through the prefix, is a gradient of the whole.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from gnp_optax._core import losses, numerics
from gnp_optax._core.perturbation import Loss
from gnp_optax._prefix import jaxprs, opening, refusals
from gnp_optax._prefix.refusals import NotCut

Arrays = list[Any]
_logger = logging.getLogger("gnp_optax")


class Cut(NamedTuple):
    """A loss in two parts: `loss(p, u) == suffix(p, *prefix(u))`.

    `prefix(unperturbed)` returns the boundary, through which the loss depends on the unperturbed
    leaves, and a list of further values, which need no gradient: what comes from data or random
    keys alone, integers, what is only compared or only returned. `suffix(perturbed, boundary,
    values)` returns the loss and aux. Where it `asks`, a custom derivative in it is told which of
    its arguments are differentiated: JAX fails where that is not the same each time that one
    program is differentiated. `begins` is where its first matrix product stands that depends on a
    perturbed leaf, and `not_cut` what was left whole.
    """

    prefix: Callable[[Arrays], tuple[Arrays, Arrays]]
    suffix: Callable[[Arrays, Arrays, Arrays], tuple[jax.Array, Any]]
    asks: bool = False
    begins: str = ""
    not_cut: tuple[NotCut, ...] = ()


def uncut(loss: Loss) -> Cut:
    """Share nothing: the suffix is the whole loss, and the boundary the unperturbed leaves."""
    return Cut(lambda unperturbed: (unperturbed, []), lambda p, boundary, _: loss(p, boundary))


def cut(loss: Loss, perturbed: Arrays, unperturbed: Arrays) -> Cut:
    """Cut the loss for leaves such as these.

    Cut by dependence, not by position: each equation that depends on a perturbed leaf belongs to
    the suffix. Calls of jitted functions are opened, checkpoints and loops are cut; other
    equations with functions inside (a branch, a custom derivative) are left whole. Where
    there is nothing to share, or the loss can't be traced before it is differentiated, or has
    mutable state, the prefix is empty.
    """
    whole = uncut(loss)
    # To differentiate integers is an error, which JAX explains.
    if not unperturbed or not all(map(numerics.is_inexact, unperturbed)):
        return whole
    with refusals.recorded() as not_cut:
        try:
            found = _trace(loss, perturbed, unperturbed)
        except Exception as error:
            # Outside `jit`, a loss may use the value of an array in Python, and everywhere, a
            # custom derivative may hold an array of the loss. An error of the loss itself is raised
            # again.
            found = whole
            message, *_ = str(error).splitlines() or [""]
            why = f"it can't be traced beforehand, {type(error).__name__}: {message}"
            not_cut.append(NotCut("the loss", "", why))
    for refusal in not_cut:
        _logger.debug("Not cut, so that both passes compute it whole: %s", refusal)
    return found._replace(not_cut=tuple(not_cut))


def _trace(loss: Loss, perturbed: Arrays, unperturbed: Arrays) -> Cut:
    aux: Callable[[Iterable[Any]], Any]

    def flat(perturbed: Arrays, unperturbed: Arrays) -> tuple[jax.Array, Arrays]:
        nonlocal aux
        value, returned = loss(perturbed, unperturbed)
        computed, aux = losses.split(returned)
        return value, computed

    closed = jax.make_jaxpr(flat)(perturbed, unperturbed)
    depends = [True] * len(perturbed) + [False] * len(unperturbed)
    program = opening.opened(closed, [*perturbed, *unperturbed], depends)
    jaxpr = program.jaxpr
    if jaxprs.has_state(jaxpr):
        raise ValueError("It reads or writes mutable arrays, which has to happen in each pass.")
    if isinstance(jaxpr.outvars[0], core.Literal):
        raise ValueError("It is a constant.")

    perturbed_vars = jaxpr.invars[: len(perturbed)]
    unperturbed_vars = jaxpr.invars[len(perturbed) :]
    before, after, differentiable = jaxprs.partition(jaxpr, perturbed_vars)
    own = set(perturbed_vars).union(*(eqn.outvars for eqn in after))
    # The loss itself is handed over if it ignores the perturbed leaves.
    used = [*jaxpr.outvars[:1], *(v for eqn in after for v in eqn.invars)]
    outside = jaxprs.unique(v for v in jaxprs.variables(used) if v not in own)
    returned = [v for v in jaxprs.variables(jaxpr.outvars) if v not in own]
    consts = [jnp.asarray(c) for c in program.consts]
    known = dict(zip(jaxpr.constvars, consts, strict=True))

    def handing_over(boundary: list[jaxprs.Var]) -> Cut:
        values = jaxprs.unique(v for v in [*outside, *returned] if v not in set(boundary))

        def prefix(unperturbed: Arrays) -> tuple[Arrays, Arrays]:
            env = {**known, **dict(zip(unperturbed_vars, unperturbed, strict=True))}
            env.update(jaxprs.evaluate(jaxpr, before, env))
            return [env[v] for v in boundary], [env[v] for v in values]

        def suffix(perturbed: Arrays, given: Arrays, others: Arrays) -> tuple[jax.Array, Any]:
            inputs = [*perturbed_vars, *boundary, *values]
            env = dict(zip(inputs, [*perturbed, *given, *others], strict=True))
            env.update(jaxprs.evaluate(jaxpr, after, env))
            found = (
                jnp.asarray(v.val) if isinstance(v, core.Literal) else env[v] for v in jaxpr.outvars
            )
            return next(found), aux(found)

        return Cut(prefix, suffix)

    boundary = [v for v in outside if v in differentiable]
    gradient, reached = _gradient(handing_over(boundary), perturbed, unperturbed)
    held = _held(gradient) - set(map(id, consts))
    # What a custom derivative holds may be of a trace around the loss, and so still be there.
    if held and not held <= _held(_gradient_of(lambda p, u: loss(p, u)[0], perturbed, unperturbed)):
        raise ValueError("A custom derivative holds a value of the loss as it was traced.")
    products = (e for e in after if jaxprs.has_product(e) and not own.isdisjoint(jaxprs.read(e)))
    begins = next(map(refusals.where, products), "")
    asks = any(map(jaxprs.asks_what_is_differentiated, after))
    passed = [v for i, v in enumerate(boundary) if i in reached]
    return handing_over(passed)._replace(asks=asks, begins=begins)


def _held(closed: core.ClosedJaxpr) -> set[int]:
    """Return the identities of the traced values that a program closes over."""
    return {id(c) for c in jaxprs.constants(closed) if isinstance(c, jax.core.Tracer)}


def _gradient_of(
    loss: Callable[[Arrays, Arrays], jax.Array], perturbed: Arrays, unperturbed: Arrays
) -> core.ClosedJaxpr:
    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(perturbed, unperturbed)


def _gradient(
    cut: Cut, perturbed: Arrays, unperturbed: Arrays
) -> tuple[core.ClosedJaxpr, set[int]]:
    """Return the gradient, traced, and through which values of the boundary it passes.

    To pull back a cotangent that JAX knows to be zero would be wrong: it might meet an infinite
    derivative, or a loop that has none.
    """
    reached: set[int] = set()

    def loss(perturbed: Arrays, unperturbed: Arrays) -> jax.Array:
        boundary, values = cut.prefix(unperturbed)
        boundary = [
            jaxprs.watched(x, functools.partial(reached.add, i)) for i, x in enumerate(boundary)
        ]
        return cut.suffix(perturbed, boundary, values)[0]

    return _gradient_of(loss, perturbed, unperturbed), reached
