"""A progress bar that a compiled loop drives."""

import contextlib
import itertools
from collections.abc import Iterator

import jax
import numpy as np
import tqdm

# A compiled program outlives its first call, so that it is told by a number which bar is its own.
_bars: dict[int, tqdm.tqdm] = {}
_numbers = itertools.count()


@contextlib.contextmanager
def bar(total: int, is_shown: bool) -> Iterator[np.ndarray | None]:
    """Show a bar of `total` steps while the body runs; yield its number, for `advance`."""
    if not is_shown:
        yield None
        return
    number = next(_numbers)
    with tqdm.tqdm(total=total, unit="batch") as shown:
        _bars[number] = shown
        try:
            yield np.asarray(number, np.int32)
        finally:
            jax.effects_barrier()
            del _bars[number]


def advance(number: jax.Array | None, after: jax.Array) -> None:
    """Advance a bar by one, in a compiled program, once `after` is computed."""
    if number is not None:
        jax.debug.callback(_step, number, after)


def _step(number: jax.Array, after: jax.Array) -> None:
    del after
    shown = _bars.get(int(number))
    if shown is not None:
        shown.update()
