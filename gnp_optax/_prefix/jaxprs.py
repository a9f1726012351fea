"""What prefix sharing needs of JAX's intermediate representation, by its public interface."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

Var = Any  # `core.Var`, which is not generic enough for a type checker in every version
Env = dict[Var, Any]

JIT = frozenset({"jit", "pjit"})
CHECKPOINT = frozenset({"checkpoint", "remat", "remat2"})

# An effect that names an axis only says which mapped axes a collective is over.
_HARMLESS = frozenset({"NamedAxisEffect"})
# These call the host. Any other kind (reading and writing a mutable array, say) is state.
_CALLS = frozenset({"DebugEffect", "OrderedDebugEffect", "IOEffect", "OrderedIOEffect"})
# Cheaper to compute again than to keep in memory, as long as the inputs are at hand: constants,
# masks, one-hot labels, random bits.
_CHEAP = frozenset(
    [
        "add",
        "and",
        "bitcast_convert_type",
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "div",
        "eq",
        "erf_inv",
        "exp",
        "expand_dims",
        "ge",
        "gt",
        "iota",
        "le",
        "log",
        "lt",
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "or",
        "random_bits",
        "random_fold_in",
        "random_seed",
        "random_split",
        "random_unwrap",
        "random_wrap",
        "reshape",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "slice",
        "sqrt",
        "squeeze",
        "sub",
        "threefry2x32",
        "transpose",
        "xor",
    ]
)

_PRODUCTS = frozenset({"conv_general_dilated", "dot_general", "ragged_dot", "ragged_dot_general"})


class Uncut(Exception):  # noqa: N818
    """Why a loop, a checkpoint or a call was not cut."""


def variables(atoms: Iterable[Any]) -> list[Var]:
    """Leave out the literals."""
    return [v for v in atoms if not isinstance(v, core.Literal)]


def read(eqn: core.JaxprEqn) -> list[Var]:
    """Return the variables that an equation reads."""
    return variables(eqn.invars)


def unique(variables: Iterable[Var]) -> list[Var]:
    """Drop repetitions, keep the order."""
    return list(dict.fromkeys(variables))


def is_inexact(variable: Var) -> bool:
    """Whether the variable is a floating-point or complex array."""
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def effects(eqn: core.JaxprEqn) -> set[str]:
    """Return the kinds of an equation's effects."""
    return {type(effect).__name__ for effect in eqn.effects} - _HARMLESS


def has_state(jaxpr: core.Jaxpr) -> bool:
    """Whether running an equation once is another thing than running it twice."""
    return any(not effects(eqn) <= _CALLS for eqn in jaxpr.eqns)


def is_cheap(eqn: core.JaxprEqn) -> bool:
    """Whether to compute the equation again rather than to keep its result."""
    if eqn.primitive.name in JIT:
        if any(eqn.params["donated_invars"]):  # a second run would find its input gone
            return False
        return all(map(is_cheap, eqn.params["jaxpr"].jaxpr.eqns))
    return eqn.primitive.name in _CHEAP


def inner_jaxprs(eqn: core.JaxprEqn) -> list[core.Jaxpr]:
    """Return the jaxprs of the functions that an equation calls."""
    # Closed or not: newer versions of JAX make no difference.
    inner = (getattr(x, "jaxpr", x) for x in _parameters(eqn))
    return [jaxpr for jaxpr in inner if isinstance(jaxpr, core.Jaxpr)]


def _parameters(eqn: core.JaxprEqn) -> Iterator[Any]:
    for param in eqn.params.values():
        yield from param if isinstance(param, (tuple, list)) else (param,)


def constants(closed: core.ClosedJaxpr) -> list[Any]:
    """Return the values that a program closes over, in the functions that it calls, too."""
    found = list(closed.consts)
    left = [closed.jaxpr]
    while left:
        for eqn in left.pop().eqns:
            found.extend(v.val for v in eqn.invars if isinstance(v, core.Literal))
            for param in _parameters(eqn):
                found.extend(getattr(param, "consts", ()))
            left.extend(inner_jaxprs(eqn))
    return found


def has_product(eqn: core.JaxprEqn) -> bool:
    """Whether the equation computes a matrix product or a convolution."""
    return eqn.primitive.name in _PRODUCTS or any(
        has_product(e) for inner in inner_jaxprs(eqn) for e in inner.eqns
    )


def asks_what_is_differentiated(eqn: core.JaxprEqn) -> bool:
    """Whether a custom derivative in the equation is told for which arguments it is taken."""
    return bool(eqn.params.get("symbolic_zeros")) or any(
        asks_what_is_differentiated(e) for inner in inner_jaxprs(eqn) for e in inner.eqns
    )


def evaluate(jaxpr: core.Jaxpr, eqns: Sequence[core.JaxprEqn], env: Env) -> Env:
    """Run some equations of a jaxpr; return their results."""
    results = unique(v for eqn in eqns for v in eqn.outvars)
    made = set(results)
    given = unique(v for eqn in eqns for v in read(eqn) if v not in made)
    names = jaxpr.debug_info._replace(
        arg_names=("",) * len(given), result_paths=("",) * len(results)
    )
    part = jaxpr.replace(
        constvars=(), invars=given, outvars=results, eqns=list(eqns), debug_info=names
    )
    values = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))(*(env[v] for v in given))
    return dict(zip(results, values, strict=True))


def run(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, arrays: Sequence[Any]) -> list[Any]:
    """Run one equation of a jaxpr on other operands; those in the place of literals are ignored."""
    pairs = zip(eqn.invars, arrays, strict=True)
    results = evaluate(jaxpr, [eqn], {v: x for v, x in pairs if not isinstance(v, core.Literal)})
    return [results[v] for v in eqn.outvars]


def run_now(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, arrays: Sequence[Any]) -> list[np.ndarray]:
    """Run one equation while others are traced."""
    pairs = zip(arrays, eqn.invars, strict=True)
    given = [np.asarray(x, getattr(v.aval, "dtype", None)) for x, v in pairs]
    with jax.ensure_compile_time_eval():
        if inner_jaxprs(eqn):
            return [np.asarray(x) for x in run(jaxpr, eqn, given)]
        found = eqn.primitive.bind(*given, **eqn.params)  # much faster, and there are many
        return [np.asarray(x) for x in (found if eqn.primitive.multiple_results else [found])]


def inner_program(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    """Return what a call of a jitted function or of a checkpoint runs."""
    inner = eqn.params["jaxpr"]
    return inner if eqn.primitive.name in JIT else core.ClosedJaxpr(inner, ())


def depending(jaxpr: core.Jaxpr, perturbed: Sequence[Var]) -> set[Var]:
    """Return the variables that depend on perturbed ones, with these."""
    found = set(perturbed)
    for eqn in jaxpr.eqns:
        if not found.isdisjoint(read(eqn)):
            found.update(eqn.outvars)
    return found


def watched(x: Any, reach: Callable[[], Any]) -> Any:
    """Return the array; call `reach` when a gradient that passes through it is traced.

    One that JAX knows to be zero does not.
    """

    def forward(x: Any) -> tuple[Any, None]:
        return x.value, None

    def backward(_: None, cotangent: Any) -> tuple[Any]:
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            return (None,)
        reach()
        return (cotangent,)

    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(forward, backward, symbolic_zeros=True)
    return identity(x)


def partition(
    jaxpr: core.Jaxpr, perturbed: Sequence[Var], needed_before: Iterable[Var] = ()
) -> tuple[list[core.JaxprEqn], list[core.JaxprEqn], set[Var]]:
    """Split the equations into those before the perturbation and those after it.

    After it is what depends on a perturbed variable, and what is only needed there, cheap, and
    depends on no other input. Equations whose results nobody needs are dropped. Effects keep their
    order: behind one that depends on a perturbed variable, the others come after it, too.

    Args:
        jaxpr: The program.
        perturbed: Some of its variables.
        needed_before: Variables that the first part computes whether or not they are cheap.

    Returns:
        The equations before, the equations after, and the variables of the first part through
        which a gradient can flow to the jaxpr's other inputs.
    """
    depends = set(perturbed)
    flows = {v for v in jaxpr.invars if v not in depends and is_inexact(v)}
    effects_depend = False
    is_after: list[bool] = []
    for eqn in jaxpr.eqns:
        inputs = read(eqn)
        has_effects = bool(effects(eqn))
        is_after.append(not depends.isdisjoint(inputs) or (has_effects and effects_depend))
        if is_after[-1]:
            depends.update(eqn.outvars)
            effects_depend |= has_effects
        elif eqn.primitive.name != "stop_gradient" and not flows.isdisjoint(inputs):
            flows.update(v for v in eqn.outvars if is_inexact(v))

    needed = set(variables(jaxpr.outvars))
    needed_before = set(needed_before)
    before: list[core.JaxprEqn] = []
    after: list[core.JaxprEqn] = []
    for eqn, late in zip(reversed(jaxpr.eqns), reversed(is_after), strict=True):
        results = eqn.outvars
        if needed.isdisjoint(results) and not effects(eqn):
            continue
        needed.update(read(eqn))
        only_after = flows.isdisjoint(results) and needed_before.isdisjoint(results)
        if late or (only_after and is_cheap(eqn)):
            after.append(eqn)
        else:
            before.append(eqn)
            needed_before.update(read(eqn))
    return before[::-1], after[::-1], flows
