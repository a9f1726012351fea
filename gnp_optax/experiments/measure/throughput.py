"""`python -m gnp_optax.experiments throughput`: does the device wait for the comparison?"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro

import gnp_optax as gnp
from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data.datasets import Split
from gnp_optax.experiments.data.loading import load
from gnp_optax.experiments.measure.cost_report import relative_times
from gnp_optax.experiments.measure.programs import per_round
from gnp_optax.experiments.methods import Method
from gnp_optax.experiments.models.network import Params, Statistics
from gnp_optax.experiments.recipes import named
from gnp_optax.experiments.report.table import STYLES, markdown
from gnp_optax.experiments.training import optimizers
from gnp_optax.experiments.training.trainer import Trainer

METHODS: tuple[Method, ...] = ("plain", "gr")

# Seconds per step in every round, of an epoch of the comparison and of the bare loop.
Times = Mapping[tuple[Method, str], Sequence[float]]


@dataclasses.dataclass(frozen=True)
class ThroughputConfig:
    """Time the training of a comparison beside a bare jitted loop, in turn, in one process.

    An epoch of the comparison takes its batches out of the data set, augments them, and records
    statistics and losses. The bare loop calls a jitted step, gradient and optimizer on one and the
    same batch, as many times. Both are timed from the first step to the last; evaluation, which
    comes between the epochs, is not.
    """

    recipe: str = "digits-vit"
    """A named setting of the comparison, such as vit-ti or resnet20."""
    data_dir: Path | None = None
    """Folder with the data set, as in the comparison."""
    rounds: int = 7
    """How often everything is timed."""

    def __post_init__(self) -> None:
        """Check the values."""
        named(self.recipe)
        if self.rounds < 1:
            raise ValueError(f"--rounds must be positive, got {self.rounds}.")

    @property
    def comparison(self) -> Config:
        """The options of the comparison: an epoch for every round, one before and one after."""
        epochs = self.rounds + 2
        return dataclasses.replace(
            named(self.recipe).of_epochs(epochs),
            data_dir=self.data_dir,
            test_every=epochs,
        )


def run(args: Sequence[str]) -> None:
    """Read the options, measure, and print the table."""
    config = tyro.cli(
        ThroughputConfig, prog="python -m gnp_optax.experiments throughput", args=args
    )
    comparison = config.comparison
    trainer = Trainer(comparison, load(comparison, (0, 1)))
    print(table(measure(trainer, config.rounds)), end="")


def measure(trainer: Trainer, rounds: int) -> Times:
    """Time an epoch of each method and a bare loop of as many steps, in every round."""
    running: dict[tuple[Method, str], Callable[[], float]] = {}
    for method in METHODS:
        running[method, "comparison"] = _epochs(trainer, method)
        running[method, "bare loop"] = _loop(trainer, method)
    for run in running.values():
        run()  # the first takes longer
    return per_round(running, rounds, "timing")


def _epochs(trainer: Trainer, method: Method) -> Callable[[], float]:
    run = trainer.run(method, [0])
    return lambda: float(next(run)[0]["seconds_per_step"])


def _loop(trainer: Trainer, method: Method) -> Callable[[], float]:
    step, state, inputs = bare(trainer, method)

    def run() -> float:
        reached = state
        start = time.perf_counter()
        for _ in range(trainer.steps_per_epoch):
            reached = step(*reached, *inputs)
        jax.block_until_ready(reached)
        return (time.perf_counter() - start) / trainer.steps_per_epoch

    return run


def bare(
    trainer: Trainer, method: Method
) -> tuple[Callable[..., Any], tuple[Params, Any, Statistics], tuple[Split, jax.Array]]:
    """Return a jitted step, the state that it begins with, and its batch and key of dropout."""
    network, config = trainer.network, trainer.config
    steps, warmup = (n * trainer.steps_per_epoch for n in (config.epochs, config.warmup_epochs))
    schedule = optimizers.learning_rate(config, steps, warmup)
    optimizer = optimizers.optimizer(config, schedule, config.weight_decay)
    batch = Split(*(jax.device_put(x[: config.batch_size]) for x in trainer.data.train))
    key = jax.random.key(0)
    # Jitted, for the initialisation would compile every operation by itself.
    params, statistics = jax.jit(network.init)(key, batch)

    def loss(params: Params, statistics: Statistics, batch: Split, key: jax.Array) -> Any:
        return network.loss(params, *batch, statistics, key)

    gradient: Callable[..., Any] = jax.value_and_grad(loss, has_aux=True)
    if method != "plain":
        gradient = gnp.value_and_grad(loss, config.r, config.alpha, has_aux=True)

    @jax.jit
    def step(params: Params, opt_state: Any, statistics: Statistics, *inputs: Any) -> Any:
        (_, statistics), grads = gradient(params, statistics, *inputs)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, statistics

    return step, (params, optimizer.init(params), statistics), (batch, key)


def table(times: Times) -> str:
    """Write medians over the rounds; of the ratio, the quartiles as well."""
    rows = [("method", "comparison, ms / step", "bare loop, ms / step", "comparison / bare loop")]
    for method in METHODS:
        runner, loop = (times[method, name] for name in ("comparison", "bare loop"))
        rows.append(
            (
                STYLES[method][0],
                f"{1e3 * np.median(runner):.2f}",
                f"{1e3 * np.median(loop):.2f}",
                relative_times(runner, loop),
            )
        )
    return markdown(rows)
