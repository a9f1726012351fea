"""`python -m gnp_optax.experiments cost`: measure what each method costs."""

import dataclasses
import functools
import importlib.metadata
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import tqdm
import tyro

from gnp_optax.experiments.config import option
from gnp_optax.experiments.measure import cost_report
from gnp_optax.experiments.measure.methods import PLAIN, Scope, Step, layerwise, methods
from gnp_optax.experiments.measure.programs import Program, Programs, per_round
from gnp_optax.experiments.measure.workload import Batch, Model, Params, Workload, workload
from gnp_optax.experiments.training.records import environment


@dataclasses.dataclass(frozen=True)
class CostConfig:
    """Measure what each method costs, relative to the plain gradient, in one process.

    Prints a table of FLOPs, wall-clock, memory and compilation, and writes it, the raw numbers, and
    a figure of cost against the depth of the earliest perturbed layer under --out. Inputs are
    random: no data set is needed.
    """

    model: Model = "vit-ti"
    """ViT with 4x4 patches, ResNet and WideResNet are for 32x32 images; GPT-2 is for text."""
    batch_size: int = 32
    """Examples per gradient."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the model computes in. Parameters are float32."""
    sequence_length: int | None = None
    """Tokens per example, for gpt2-small alone, at most 1024. Without it: 256."""
    steps: int = 10
    """Rounds of timing; every method is timed once a round, in shuffled order."""
    compilations: int = 3
    """Rounds of compiling every method from empty caches, in shuffled order, to time it."""
    time: bool = True
    """Whether to run the methods, too. With --no-time they are only compiled, for which the largest
    model needs no memory, and the table shows no times."""
    only: str = ""
    """Measure only the methods whose name this regular expression finds, beside the plain one."""
    depths: tuple[int, ...] | None = None
    """Blocks at which the perturbed part begins in the figure; the number of blocks stands for the
    head alone. Without it: five of the blocks, and the head. --depths with nothing after it: no
    figure."""
    out: Path | None = None
    """Folder for the results. Without it: results/cost-MODEL-BATCH_SIZE-DTYPE."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("batch_size", "steps", "compilations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{option(name)} must be positive, got {getattr(self, name)}.")
        try:
            re.compile(self.only)
        except re.error as error:
            raise ValueError(f"--only {self.only!r} is no regular expression: {error}.") from error
        length = self.sequence_length
        if length is not None and self.model != "gpt2-small":
            raise ValueError(f"--sequence-length is for --model gpt2-small, not {self.model}.")
        if length is not None and not 1 <= length <= 1024:
            raise ValueError(f"--sequence-length must lie in 1 to 1024, got {length}.")

    @property
    def folder(self) -> Path:
        """Where the results go."""
        length = f"x{self.length}" if self.model == "gpt2-small" else ""
        name = f"cost-{self.model}-{self.batch_size}{length}-{self.dtype}"
        return self.out or Path("results") / name

    @property
    def length(self) -> int:
        """Tokens per example."""
        return self.sequence_length or 256


def run(args: Sequence[str]) -> None:
    """Read the options, measure, print the table and write the results."""
    config = parse(args)
    # A compilation that is found on disk takes no time.
    jax.config.update("jax_enable_compilation_cache", False)
    chosen = workload(config.model, config.batch_size, config.dtype, config.length)
    rounds = config.steps if config.time else 0
    found = measure(chosen, config.depths, rounds, config.compilations, config.only)
    command = shlex.join(["python", "-m", "gnp_optax.experiments", "cost", *args])
    print(write(found, config, command), end="")
    print(f"\nWrote the results to {config.folder}.")


def parse(args: Sequence[str]) -> CostConfig:
    """Read the options."""
    return tyro.cli(CostConfig, prog="python -m gnp_optax.experiments cost", args=args)


def write(found: dict[str, Any], config: CostConfig, command: str) -> str:
    """Write the tables, the raw numbers and the figure, and return the table of the methods."""
    options = {name: value for name, value in dataclasses.asdict(config).items() if name != "out"}
    record: dict[str, Any] = {"command": command, "options": options, **environment()}
    record["versions"]["jaxlib"] = importlib.metadata.version("jaxlib")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    length = f" of {config.length} tokens" if config.model == "gpt2-small" else ""
    title = f"Cost on {config.model}, batches of {config.batch_size}{length}, {config.dtype}"
    table = cost_report.table(found)
    parts = [f"# {title}", f"{record['device']}; {versions}.", f"`{command}`", table]
    if found["depths"]:
        parts += ["By the depth of the earliest perturbed layer:", cost_report.depth_table(found)]
    parts.append(cost_report.CAPTION)

    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "cost.md").write_text("\n\n".join(part.rstrip() for part in parts) + "\n")
    (config.folder / "cost.json").write_text(json.dumps({**record, **found}, indent=1) + "\n")
    picture = config.folder / "cost.png"
    picture.unlink(missing_ok=True)  # of an earlier measurement
    if found["depths"]:
        cost_report.figure(found, title, picture)
    return table


def measure(
    chosen: Workload,
    depths: Sequence[int] | None,
    rounds: int,
    compilations: int,
    only: str = "",
) -> dict[str, Any]:
    """Measure every method, and the regularized gradient from each of the `depths` on.

    Args:
        chosen: The model and the shapes of its inputs.
        depths: Blocks at which the perturbed part begins; None for five of them and the head.
        rounds: How often to time everything; 0 only compiles.
        compilations: How often to time the compilation of every method.
        only: Which methods, as in `CostConfig`.

    Returns:
        The costs of every method by name (`rows`), and of every depth by scope (`depths`), ready
        for JSON.

    Raises:
        ValueError: If there is no such block.
    """
    blocks = _blocks(chosen.depth, depths)
    rows = [row for row in methods(chosen) if row.name == PLAIN or re.search(only, row.name)]
    swept = [(block, scope) for block in blocks for scope in get_args(Scope)]
    steps = [row.step for row in rows] + [layerwise(chosen, *at) for at in swept]
    counted = [row.counted for row in rows if row.counted is not None]

    arguments = chosen.abstract()

    def compile_seconds(step: Step) -> float:
        return Programs().cost(step, *arguments).compile_seconds

    # First of all, so that what JAX and XLA do once in a process is not counted.
    programs = Programs()
    # Without duplicates: some depths are rows of the table, too.
    every = tqdm.tqdm(dict.fromkeys([*steps, *counted]), desc="counting", unit="method")
    costs = {step: programs.cost(step, *arguments) for step in every}
    compiling = {row.step: functools.partial(compile_seconds, row.step) for row in rows}
    compiled = per_round(compiling, compilations, "compiling")
    seconds: dict[Step, list[float]] = {}
    if rounds:
        inputs = chosen.concrete()
        running = {step: functools.partial(programs.seconds, step, *inputs) for step in steps}
        for run in running.values():
            run()  # the first takes longer
        seconds = per_round(running, rounds, "timing")

    def entry(step: Step, counted: Step | None = None) -> dict[str, Any]:
        return {
            "flops": costs[counted or step].flops,
            "memory": costs[step].memory,
            "seconds": seconds.get(step),
        }

    return {
        "blocks": chosen.depth,
        "rows": [
            {
                "name": row.name,
                **entry(row.step, row.counted),
                "compile_seconds": compiled[row.step],
            }
            for row in rows
        ],
        "depths": [
            {"block": block, "scope": scope, **entry(layerwise(chosen, block, scope))}
            for block, scope in swept
        ],
        "suffixes": [{"block": block, "flops": suffix_flops(chosen, block)} for block in blocks],
    }


def _blocks(depth: int, asked: Sequence[int] | None) -> list[int]:
    if asked is None:
        return sorted({*np.linspace(0, depth - 1, 5).round().astype(int).tolist(), depth})
    wrong = [block for block in asked if not 0 <= block <= depth]
    if wrong:
        raise ValueError(
            f"--depths: there is no block {wrong[0]}. The model has the blocks 0 to {depth - 1}; "
            f"{depth} stands for the head."
        )
    return sorted(set(asked))


def suffix_flops(chosen: Workload, block: int) -> float | None:
    """Count the gradient of what follows a boundary, for its parameters and the boundary."""
    params, batch = chosen.abstract()

    def suffix(params: Params, boundary: jax.Array, batch: Batch) -> Any:
        return chosen.suffix_loss(params, boundary, batch, block)

    def gradient(params: Params, boundary: jax.Array, batch: Batch) -> Any:
        return jax.value_and_grad(suffix, argnums=(0, 1), has_aux=True)(params, boundary, batch)

    return Program.compile(gradient, params, chosen.boundary(params, batch, block), batch).flops
