"""Several runs at a time, each in a process of one CPU core: a small network gains by no more."""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import jax

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data.loading import load
from gnp_optax.experiments.methods import Method, memory, selection
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
    cores = cpu_cores()
    waiting = collections.deque(sorted(groups, key=lambda group: _place(config, group[0])))
    children: list[SpawnProcess] = []
    # One to each, not one for all: a child killed while it writes would leave others waiting.
    pipes: dict[Connection, int] = {}
    try:
        for number in range(processes):
            ours, theirs = spawning.Pipe()
            child = spawning.Process(
                target=_work, args=(config, theirs, cores[number % len(cores)])
            )
            child.start()
            theirs.close()  # the child has its own: when that ends, so does what can be read here
            children.append(child)
            pipes[ours] = number
        while pipes:
            ready = wait(pipes)
            for pipe in [pipe for pipe in pipes if pipe in ready]:
                try:
                    event = pipe.recv()
                except (EOFError, OSError):
                    raise ChildProcessError(
                        "a process that trained was killed, perhaps because memory ran out. What "
                        "is done is kept: start the same command again to go on."
                    ) from None
                if isinstance(event, Exception):
                    raise event
                if event is not None:
                    yield event
                elif waiting:
                    # From both ends: neighbours often share a program, which each child compiles.
                    group = waiting.pop() if pipes[pipe] % 2 else waiting.popleft()
                    with contextlib.suppress(BrokenPipeError):  # the next recv tells
                        pipe.send(group)
                else:
                    del pipes[pipe]
                    pipe.close()
    except BaseException:
        for child in children:
            child.terminate()
        raise
    finally:
        for child in children:
            child.join()


def _place(config: Config, method: Method) -> int:
    """Put methods that share a program next to each other, and the quickest in the middle."""
    if method.startswith("plain"):
        return 1
    selects = selection(method, config.layers, config.budget)
    return 0 if selects is None and memory(method) is None else 2


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


def _work(config: Config, pipe: Connection, core: int) -> None:
    """Ask for a group with None, tell its events, and so on until there is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the process that has started it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    try:
        trainer = Trainer(config, load(config, (0, 1)))
        while True:
            pipe.send(None)
            try:
                group = pipe.recv()
            except EOFError:
                return
            for event in in_turn(trainer, [group]):
                pipe.send(event)
    except Exception as error:
        error.add_note(f"In a process that trained:\n{traceback.format_exc()}")
        pipe.send(error)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
