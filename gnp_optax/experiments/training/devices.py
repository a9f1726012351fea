"""The devices that share a batch: one, or all of all processes."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data.datasets import Split

AXIS = "data"
_LEVEL = "xla_backend_optimization_level"


def connect(config: Config) -> None:
    """Join the processes of a distributed run; before anything else is done with JAX."""
    if not config.distributed:
        return
    try:
        jax.distributed.initialize(
            config.coordinator, num_processes=config.processes, process_id=config.process_id
        )
    except ValueError:
        if config.coordinator is not None:
            raise
        print("No cluster was found: this is the only process.")


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def agreed(flags: list[bool] | None, count: int) -> list[bool]:
    """Return the flags of the first process, in every process."""
    own = np.zeros(count, bool) if flags is None else np.asarray(flags)
    return [bool(flag) for flag in multihost_utils.broadcast_one_to_all(own)]


def cpu_cores() -> list[int]:
    """Return those that this process may use, by whose number JAX splits its work, and rounds."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return sorted(os.sched_getaffinity(0))
    return [*range(os.cpu_count() or 1)]


def jit(fun: Callable[..., Any], **options: Any) -> Any:
    """Compile a function. For a CPU it takes XLA half of the time at level 2, to the same speed."""
    is_asked_for = _LEVEL in os.environ.get("XLA_FLAGS", "")
    level = {_LEVEL: 2} if jax.default_backend() == "cpu" and not is_asked_for else None
    return jax.jit(fun, compiler_options=level, **options)


class Devices:
    """A row of devices, each with a part of the training set: device d has every d-th example.

    A batch takes the same number of examples from every part, so that no example moves.
    """

    def __init__(self, distributed: bool) -> None:
        devices = jax.devices() if distributed else jax.local_devices()[:1]
        self.count = len(devices)
        self._processes = len({device.process_index for device in devices})
        # Process p has every p-th example, so its devices have the places p, p + processes, ...
        own = {p: [d for d in devices if d.process_index == p] for p in range(self._processes)}
        turns = zip(*own.values(), strict=True) if distributed else [devices]
        mesh = Mesh(np.array([device for turn in turns for device in turn]), (AXIS,))
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._divided = NamedSharding(mesh, PartitionSpec(AXIS))

    def divide(self, split: Split) -> Split:
        """Lay the examples of this process out as (device, example, ...), sharded by device.

        All devices get the same number of examples; a few may be left over.
        """
        local = self.count // self._processes
        each = len(split.labels) // local
        if self._processes > 1:
            each = int(np.min(multihost_utils.process_allgather(np.array(each))))

        def laid_out(x: jax.Array) -> jax.Array:
            rows = np.asarray(x)[: each * local].reshape(each, local, *x.shape[1:])

            def of_device(index: Any) -> np.ndarray:
                place = index[0].start or 0
                return rows[None, :, place // self._processes]

            shape = (self.count, each, *x.shape[1:])
            return jax.make_array_from_callback(shape, self._divided, of_device)

        return Split(*map(laid_out, split))

    def numbers(self, each: int) -> jax.Array:
        """Return the numbers in the training set of the examples that `divide` lays out."""
        numbers = np.arange(self.count * each).reshape(each, self.count).T
        return jax.make_array_from_callback(
            numbers.shape, self._divided, lambda index: numbers[index]
        )
