"""What a step costs: FLOPs, memory and compilation by the compiler, time by the clock."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import tqdm

from gnp_optax.experiments.measure.methods import Step
from gnp_optax.experiments.measure.workload import Batch, Params

Function = Callable[..., Any]
Key = TypeVar("Key")


class Cost(NamedTuple):
    """What one step costs; None is what the compiler does not tell.

    Attributes:
        flops: Floating-point operations of the compiled programs.
        memory: The largest, over the programs of the step, of temporary plus output bytes, plus
            the outputs of the programs before it.
        compile_seconds: To trace and compile each program once.
    """

    flops: float | None
    memory: int | None
    compile_seconds: float


class Program(NamedTuple):
    """A compiled function; None is what the compiler does not tell."""

    run: Function
    result: Any  # shapes and types
    flops: float | None
    temporary: int | None
    output: int | None
    seconds: float

    @classmethod
    def compile(cls, function: Function, *args: Any) -> "Program":
        """Trace and compile a function of such arguments, arrays or their shapes and types."""
        # What another program left in JAX's caches would be traced for nothing.
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*args)
        compiled = lowered.compile()
        seconds = time.perf_counter() - start
        costs, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        return cls(
            compiled,
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info),
            costs.get("flops"),
            memory.temp_size_in_bytes if memory else None,
            memory.output_size_in_bytes if memory else None,
            seconds,
        )


class Programs:
    """Compiled functions, each compiled once, from empty caches, for arguments of one shape."""

    def __init__(self) -> None:
        self._programs: dict[Function, Program] = {}

    def cost(self, step: Step, params: Params, batch: Batch) -> Cost:
        """Compile the programs of a step without running them: shapes and types are enough."""
        called: list[Function] = []

        def call(function: Function, *args: Any) -> Any:
            if function not in self._programs:
                self._programs[function] = Program.compile(function, *args)
            called.append(function)
            return self._programs[function].result

        step(call, params, batch)
        programs = [self._programs[function] for function in called]
        seconds = sum(self._programs[function].seconds for function in set(called))
        return Cost(_sum([p.flops for p in programs]), _peak(programs), seconds)

    def seconds(self, step: Step, params: Params, batch: Batch) -> float:
        """Run a step that `cost` has seen until its result is there, and say how long it took."""

        def call(function: Function, *args: Any) -> Any:
            return self._programs[function].run(*args)

        start = time.perf_counter()
        jax.block_until_ready(step(call, params, batch))
        return time.perf_counter() - start


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _peak(programs: list[Program]) -> int | None:
    peak = kept = 0
    for program in programs:
        if program.temporary is None or program.output is None:
            return None
        peak = max(peak, kept + program.temporary + program.output)
        kept += program.output
    return peak


def per_round(
    measurements: Mapping[Key, Callable[[], float]], rounds: int, doing: str
) -> dict[Key, list[float]]:
    """Take every measurement once a round, in shuffled order.

    So what slows the machine down for a while slows down all of a round.
    """
    order, shuffle = list(measurements), random.Random(0).shuffle
    found: dict[Key, list[float]] = {key: [] for key in order}
    for _ in tqdm.trange(rounds, desc=doing, unit="round"):
        shuffle(order)
        for key in order:
            found[key].append(measurements[key]())
    return found
