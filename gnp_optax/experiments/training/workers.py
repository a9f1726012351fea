"""Several runs at a time, each in a process of one CPU core: a small network gains by no more."""

import collections
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data.loading import load
from gnp_optax.experiments.methods import Method
from gnp_optax.experiments.training.checkpoints import Checkpoint
from gnp_optax.experiments.training.devices import cpu_cores
from gnp_optax.experiments.training.records import Epoch
from gnp_optax.experiments.training.trainer import Trainer

Group = tuple[Method, list[int]]  # a method, and the seeds that are trained at once

# A process takes a CPU core for the ten seconds of its start, in which so many epochs are trained.
_EPOCHS = 50
_MOST = 8


def count(config: Config, groups: Sequence[Group]) -> int:
    """Return how many processes to train in: one for each core, if networks are small; or this."""
    is_small = config.seeds_together and not config.distributed
    if not is_small or jax.default_backend() != "cpu":
        return 1
    epochs = sum(config.own(method).epochs for method, _ in groups)
    return max(1, min(len(cpu_cores()), len(groups), epochs // _EPOCHS, _MOST))


def train(
    config: Config, groups: Sequence[Group], processes: int
) -> Generator[tuple[Group, Epoch | None], None, None]:
    """Train in so many processes, which end with this one, whatever ends it.

    Yields:
        A group and what was measured of an epoch, as it ends; None when its training begins.

    Raises:
        ChildProcessError: If one of them was killed.
    """
    spawning = multiprocessing.get_context("spawn")  # a fork would copy JAX's locks
    events, cores = spawning.SimpleQueue(), spawning.SimpleQueue()
    for core in cpu_cores():
        cores.put(core)
    waiting = collections.deque(groups)
    running: dict[int, Future[None]] = {}  # by process
    with contextlib.ExitStack() as stack:
        pools = [
            stack.enter_context(ProcessPoolExecutor(1, spawning, _begin, (cores, events)))
            for _ in range(processes)
        ]

        def give(process: int) -> None:
            # From both ends, as neighbours often share a program, which each process compiles.
            group = waiting.pop() if process % 2 else waiting.popleft()
            running[process] = pools[process].submit(_run, config, group)
            running[process].add_done_callback(lambda _: events.put(process))

        try:
            for process in range(processes):
                give(process)
            while running:
                event = events.get()
                if not isinstance(event, int):
                    yield event
                    continue
                running.pop(event).result()
                if waiting:
                    give(event)
        except BaseException as error:
            for child in multiprocessing.active_children():
                child.terminate()
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "a process that trained was killed, perhaps because memory ran out. What is "
                    "done is kept: start the same command again to go on."
                ) from None
            raise


def in_turn(
    trainer: Trainer, groups: Sequence[Group]
) -> Generator[tuple[Group, Epoch | None], None, None]:
    """Train in this process, one after the other; yield as `train` does."""
    for method, seeds in groups:
        yield (method, seeds), None
        # Of several processes, not all may see the folder.
        alone = jax.process_count() == 1
        checkpoint = Checkpoint(trainer.config, method, seeds) if alone else None
        for epoch in trainer.run(method, seeds, checkpoint):
            yield (method, seeds), epoch


# In a process that trains, where it tells what it has measured.
_events: Any


def _begin(cores: Any, events: Any) -> None:
    global _events
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the process that has started it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    _events = events


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


@functools.cache
def _trainer(config: Config) -> Trainer:
    return Trainer(config, load(config, (0, 1)))


def _run(config: Config, group: Group) -> None:
    for event in in_turn(_trainer(config), [group]):
        _events.put(event)
