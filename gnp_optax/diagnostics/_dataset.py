"""A loss, its gradient and its Hessian, as means over all examples, one batch after the other."""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from gnp_optax._core import checks, losses, numerics, pieces, selection
from gnp_optax.diagnostics import _layout

PyTree = Any
Arrays = list[Any]


class Objective(NamedTuple):
    """What is measured. Hashable, so that for an equal one nothing is compiled anew."""

    fun: Callable[..., Any]
    has_aux: bool
    batch_size: int | None
    layout: _layout.Layout


class Losses:
    """The loss of the arrays that are selected, `perturbed`, given all others and the examples."""

    def __init__(
        self, objective: Objective, bar: jax.Array | None, params: PyTree, args: PyTree
    ) -> None:
        self.parts = _layout.divided(objective.layout, params)
        perturbed, self.others = self.parts.divide(params)
        # Not weakly typed: once it is moved, no array is, and the loss might change its type.
        self.perturbed = [jnp.asarray(w, jnp.result_type(w)) for w in perturbed]
        self.shardings = _layout.shardings_of(objective.layout, self.parts)
        self._fun = losses.with_aux(objective.fun, objective.has_aux)
        self._batch_size = objective.batch_size
        self._bar, self._args = bar, args
        if isinstance(bar, jax.core.Tracer):
            _tell_that_it_compiles()

    def value(self, perturbed: Arrays) -> jax.Array:
        """Return the mean loss."""
        found: jax.Array = self._mean(lambda batch: self._of_batch(perturbed, batch))
        return found

    def value_and_grad(self, perturbed: Arrays) -> tuple[jax.Array, Arrays]:
        """Return the mean loss and its gradient, in float32 or wider."""
        gradient = jax.value_and_grad(self._of_batch)
        found: tuple[jax.Array, Arrays] = self._mean(lambda batch: gradient(perturbed, batch))
        return found

    def hessian_product(self, tangents: Arrays) -> Arrays:
        """Return the Hessian at `perturbed` times a vector, in float32 or wider.

        In the real coordinates of complex parameters, hence the conjugate.
        """
        tangents = [t.astype(w.dtype) for t, w in zip(tangents, self.perturbed, strict=True)]

        def of_batch(batch: Any) -> Arrays:
            at = lambda perturbed: jax.grad(self._of_batch)(perturbed, batch)  # noqa: E731
            return jax.jvp(at, (self.perturbed,), (tangents,))[1]

        return [jnp.conj(h) for h in self._mean(of_batch)]

    def filled(self, perturbed: Arrays) -> PyTree:
        """Return a tree like the parameters, with zeros for what is not selected."""
        return self.parts.unite(perturbed, [jnp.zeros_like(w) for w in self.others])

    def _of_batch(self, perturbed: Arrays, batch: Any) -> jax.Array:
        return self._fun(self.parts.unite(perturbed, self.others), *batch)[0]

    @numerics.promoting
    def _advanced(self, found: PyTree) -> PyTree:
        found = jax.tree.map(numerics.widen, found)
        advance(self._bar, jax.tree.leaves(found)[0].ravel()[:1])
        return found

    def _mean(self, of_batch: Callable[[Any], PyTree]) -> PyTree:
        """Return the mean over the examples of what is a mean over a batch."""
        size = self._batch_size
        if size is None:
            return self._advanced(of_batch(self._args))
        examples = jax.tree.leaves(self._args)[0].shape[0]
        whole, left = divmod(examples, size)
        # Batch i has the examples i, i + whole, ...: examples that are sharded over the devices
        # stay where they are.
        batches = jax.tree.map(
            lambda x: x[: whole * size].reshape(size, whole, *x.shape[1:]), self._args
        )

        def add(total: PyTree, i: jax.Array) -> tuple[PyTree, None]:
            found = self._advanced(of_batch(pieces.part(batches, i)))
            return jax.tree.map(lambda t, x: t + size * x, total, found), None

        shapes = jax.eval_shape(of_batch, jax.tree.map(lambda x: x[:size], self._args))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, numerics.wide(x.dtype)), shapes)
        total, _ = jax.lax.scan(add, zeros, jnp.arange(whole))
        if left:
            last = self._advanced(of_batch(jax.tree.map(lambda x: x[whole * size :], self._args)))
            total = jax.tree.map(lambda t, x: t + left * x, total, last)
        return jax.tree.map(lambda t: t / examples, total)


def measure(
    name: str,
    compiled: Callable[..., Any],
    fun: Callable[..., Any],
    params: PyTree,
    args: tuple[Any, ...],
    operands: PyTree = (),
    *,
    mask: selection.Mask,
    batch_size: int | None,
    has_aux: bool,
    progress: bool,
    passes: int,
) -> Any:
    """Return `compiled(objective, bar, params, args, *operands)`, having checked what is given.

    Args:
        name: The public function that is called.
        compiled: A jitted function, whose first argument is static.
        fun: The user's loss.
        params: The parameters.
        args: The positional arguments of `fun` after them.
        operands: What else `compiled` takes.
        mask: What is selected.
        batch_size: Number of examples that are computed at a time.
        has_aux: Whether `fun` returns a pair.
        progress: Whether to show a bar.
        passes: How often it goes over all examples.
    """
    _check_fun(name, fun)
    checks.check_parameters(params)
    if progress and _layout.is_traced((params, args)):
        raise ValueError(
            f"progress=True needs numbers, but gnp.diagnostics.{name} was called with traced "
            f"arrays. Call it outside jit (it compiles itself), or leave the bar out."
        )
    batches = 1
    if batch_size is not None:
        checks.check_integer("batch_size", batch_size, at_least=1)
        examples = pieces.batch_size(f"diagnostics.{name}", args, None)
        batch_size = min(int(batch_size), examples)
        batches = -(-examples // batch_size)
        batch_size = batch_size if batches > 1 else None
    with _layout.automatic_axes((params, args, operands)) as (given, meshes):
        params, args, operands = given
        objective = Objective(fun, has_aux, batch_size, _layout.layout_of(mask, params))
        with progress_bar(passes * batches, progress) as bar:
            found = compiled(objective, bar, params, args, *operands)
            found = jax.block_until_ready(found) if progress else found
    return _layout.moved(found, meshes)


def _check_fun(name: str, fun: Callable[..., Any]) -> None:
    if not callable(fun):
        raise TypeError(
            f"gnp.diagnostics.{name} takes the loss function first: {name}(loss_fn, params, x, y); "
            f"got {fun!r}."
        )
    try:
        hash(fun)
    except TypeError as error:
        raise TypeError(
            f"The loss function {fun!r} is not hashable, and could not be recognized when it is "
            f"measured again. Wrap it: def loss_fn(params, x, y): ..."
        ) from error


# A compiled program outlives its first call, so that it is told by a number which bar is its own.
_bars: dict[int, tqdm.tqdm] = {}
_numbers = itertools.count()
# The bar that this thread shows.
_shown: contextvars.ContextVar[tqdm.tqdm | None] = contextvars.ContextVar("shown", default=None)


@contextlib.contextmanager
def progress_bar(total: int, is_shown: bool) -> Iterator[np.ndarray | None]:
    """Show a bar of `total` steps while the body runs; yield its number, for `advance`."""
    if not is_shown:
        yield None
        return
    number = next(_numbers)
    with tqdm.tqdm(total=total, unit="batch") as shown:
        _bars[number] = shown
        token = _shown.set(shown)
        try:
            yield np.asarray(number, np.int32)
        finally:
            jax.effects_barrier()
            _shown.reset(token)
            del _bars[number]


def _tell_that_it_compiles() -> None:
    """Say so on the bar; called when a measurement is traced, which it is when it is compiled."""
    shown = _shown.get()
    if shown is not None:
        shown.set_description("compiling")


def advance(number: jax.Array | None, after: jax.Array) -> None:
    """Advance a bar by one, in a compiled program, once `after` is computed."""
    if number is not None:
        jax.debug.callback(_step, number, after)


def _step(number: jax.Array, after: jax.Array) -> None:
    del after
    shown = _bars.get(int(number))
    if shown is not None:
        if shown.n == 0:
            shown.set_description(refresh=False)
        shown.update()
