"""What was not cut, and why: told by the logger at DEBUG, and by `gnp.masks.explain`."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

from jax.extend import core, source_info_util

from gnp_optax._prefix import jaxprs


class NotCut(NamedTuple):
    """A part of the loss that both passes compute as a whole.

    Attributes:
        what: The kind of it, such as "a scan of 12 iterations".
        where: The line that calls it, and the names of the modules around it, as JAX knows them.
        why: Why it was not cut.
    """

    what: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}{self.where and ' at ' + self.where}: {self.why}"


_WHOLE = "it is on one side of the cut as a whole, and uses a perturbed leaf"
_KINDS = {
    **dict.fromkeys(jaxprs.CHECKPOINT, ("a checkpoint (jax.checkpoint)", _WHOLE)),
    "cond": ("a branch (lax.cond or lax.switch)", _WHOLE),
    "while": ("a while_loop", f"{_WHOLE}; how often it runs is not known beforehand"),
    "custom_jvp_call": ("a function with a derivative of its own (jax.custom_jvp)", _WHOLE),
    "custom_vjp_call": ("a function with a derivative of its own (jax.custom_vjp)", _WHOLE),
    "custom_vjp_call_jaxpr": ("a function with a derivative of its own (jax.custom_vjp)", _WHOLE),
    "shard_map": ("a shard_map", _WHOLE),
}
_found: contextvars.ContextVar[list[NotCut] | None] = contextvars.ContextVar("found", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[NotCut]]:
    """Yield the list to which all is added that is not cut meanwhile."""
    found: list[NotCut] = []
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def add(eqn: core.JaxprEqn, why: str | None = None) -> None:
    """Record that an equation which depends on a perturbed leaf was not cut.

    What computes no matrix product is too cheap to be named.
    """
    found = _found.get()
    if found is None or not jaxprs.inner_jaxprs(eqn) or not jaxprs.has_product(eqn):
        return
    what, reason = _KINDS.get(eqn.primitive.name, (f"a {eqn.primitive.name}", _WHOLE))
    if eqn.primitive.name == "scan":
        what = f"a scan of {eqn.params['length']} iterations"
    if eqn.primitive.name in jaxprs.JIT:
        what = f"the jitted function {eqn.params['name']}"
    add_again(NotCut(what, where(eqn), why or reason))


def add_again(refusal: NotCut) -> None:
    """Record what was recorded elsewhere."""
    found = _found.get()
    if found is not None and refusal not in found:
        found.append(refusal)


def where(eqn: core.JaxprEqn) -> str:
    """Return the line that an equation comes from, and the modules around it, as JAX knows them."""
    line, modules = source_info_util.summarize(eqn.source_info), str(eqn.source_info.name_stack)
    return f"{line}, in {modules}" if modules else line
