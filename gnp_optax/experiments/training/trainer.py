"""Train one model with one method and seed, an epoch at a time."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gnp_optax as gnp
from gnp_optax.experiments import methods
from gnp_optax.experiments.config import Config, option
from gnp_optax.experiments.data.datasets import Data, Split
from gnp_optax.experiments.methods import Method
from gnp_optax.experiments.models.network import Network, Params, model
from gnp_optax.experiments.training import checkpoints, optimizers
from gnp_optax.experiments.training.checkpoints import Checkpoint
from gnp_optax.experiments.training.devices import Devices, is_first
from gnp_optax.experiments.training.epochs import Epochs, joined
from gnp_optax.experiments.training.evaluation import UNTESTED, Evaluation
from gnp_optax.experiments.training.records import Metrics
from gnp_optax.experiments.training.steps import State, Steps


class Trainer:
    """The compiled functions of one configuration, shared by all its runs.

    A method is its radius and weight at every step, and a mask. The radius is an input of what is
    compiled, and so is a weight that changes; a weight that does not, and a mask, are constants.
    """

    def __init__(self, config: Config, data: Data) -> None:
        self.config = config
        self.data = data
        devices = self.devices = Devices(config.distributed)
        for name in ("batch_size", "probe_examples"):
            if getattr(config, name) % devices.count:
                raise ValueError(
                    f"{option(name)} must be a multiple of the {devices.count} devices."
                )
        # Of shape (device, example, ...), as a batch is of (device, example, ...).
        self.train = devices.divide(data.train)
        each = self.train.labels.shape[1]
        self.steps_per_epoch = devices.count * each // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"--batch-size exceeds the {devices.count * each} examples.")
        steps = config.epochs * self.steps_per_epoch
        self.warmup_steps = config.warmup_epochs * self.steps_per_epoch
        self.model = model(config, data)
        self.network = Network(self.model, data)
        schedule = optimizers.learning_rate(config, steps, self.warmup_steps)
        self.optimizer = optimizers.optimizer(config, schedule)
        self.steps = Steps(self.network, self.optimizer, config.m)
        self.epochs = Epochs(
            self.steps, config, self.train, self.steps_per_epoch, devices.replicated
        )
        probe = config.probe_examples // devices.count
        self.probe = jax.jit(lambda train: Split(*(joined(x[:, :probe]) for x in train)))(
            self.train
        )
        self.evaluation = Evaluation(self.network, config.r, data.test, devices.replicated)
        self._init = jax.jit(self._initial_state, out_shardings=devices.replicated)
        self._cost_of: Callable[[Any], float] = functools.cache(self._count_cost)

    def run(
        self, method: Method, seed: int, checkpoint: Checkpoint | None = None
    ) -> Iterator[Metrics]:
        """Train from scratch, or from the checkpoint if there is one; yield each epoch's metrics.

        Those of the epochs before the checkpoint come first.
        """
        fresh: State = self._init(seed)
        if self.config.pretrained:
            fresh = checkpoints.pretrained(self.config.pretrained, fresh)
        start, done = checkpoint.load(fresh) if checkpoint else (fresh, [])
        yield from done
        for metrics, state in self._epochs(method, start, done):
            # Before anything is kept: a run that has diverged is never a finished one.
            if not np.isfinite(metrics["train_loss"]):
                raise FloatingPointError(f"{method}, seed {seed}: the loss is not finite.")
            done = [*done, {"method": method, "seed": seed, **metrics}]
            if checkpoint:
                checkpoint.keep(state, done)
            is_last = len(done) == self.config.epochs
            if self.config.keep_parameters and is_last and is_first():
                checkpoints.keep_parameters(self.config, (method, seed), state)
            yield done[-1]

    def _epochs(
        self, method: Method, state: State, done: list[Metrics]
    ) -> Iterator[tuple[Metrics, State]]:
        """Go on after the epochs that are done; yield metrics and state of each further epoch."""
        config = self.config
        steps = config.epochs * self.steps_per_epoch
        schedule = np.asarray(
            methods.regularization(method, config.r, config.alpha, steps, self.warmup_steps)
        )
        selects = methods.selection(method, config.layers, config.budget)
        masks: list[Any] = []  # those of this run, the latest last
        for finished in done:
            if finished["perturbed_layers"]:
                _put_last(gnp.masks.layers(*finished["perturbed_layers"]), masks)
        grads, _ = self.evaluation.probe(state, self.probe)
        for epoch in range(len(done), config.epochs):
            mask = None if selects is None else self._select(grads, selects, masks)
            first = epoch * self.steps_per_epoch
            scheduled = schedule[first : first + self.steps_per_epoch]
            state, train_loss, early, seconds = self.epochs.train(
                state, scheduled, mask, is_split=method == "gr-plain-statistics"
            )
            is_tested = (epoch + 1) % config.test_every == 0 or epoch + 1 == config.epochs
            grads, metrics = self.evaluation.probe(state, self.probe)
            yield (
                {
                    "epoch": epoch + 1,
                    "train_loss": train_loss,
                    **metrics,
                    **(self.evaluation.test(state) if is_tested else UNTESTED),
                    "gradients_per_step": 1
                    + (self._cost_of(mask) - 1 if mask else 1)
                    * float((scheduled[:, 1] != 0).mean()),
                    "seconds_per_step": seconds / self.steps_per_epoch,
                    "perturbed_layers": list(mask.paths) if mask else None,
                    "early": early,
                },
                state,
            )

    def _initial_state(self, seed: jax.Array) -> State:
        init_key, key = jax.random.split(jax.random.key(seed))
        example = Split(*(x[:1] for x in self.data.test))
        params, statistics = self.network.init(init_key, example)
        step = jnp.zeros([], jnp.int32)
        return State(params, self.optimizer.init(params), step, key, statistics)

    def _select(self, grads: Params, selects: methods.Selection, masks: list[Any]) -> Any:
        """Return the mask of the next epoch, and put it last in the list of the run's masks."""
        mask: Any = gnp.masks.top_k_layers(
            grads,
            selects.layers,
            budget=selects.budget,
            cost=None if selects.budget is None else self._cost_of,
        )
        if mask not in masks and len(masks) == self.config.selections:
            return masks[-1]
        _put_last(mask, masks)
        return mask

    def _count_cost(self, mask: Any) -> float:
        key = jax.eval_shape(lambda: jax.random.key(0))
        images, labels = (
            jax.ShapeDtypeStruct((self.config.batch_size, *x.shape[1:]), x.dtype)
            for x in self.data.test
        )
        images = jax.eval_shape(self.data.augment, key, images)
        state = jax.eval_shape(self._init, 0)
        return gnp.masks.cost(
            self.network.loss,
            state.params,
            mask,
            images,
            labels,
            state.statistics,
            key,
            scope="masked",
            has_aux=True,
        )


def _put_last(mask: Any, masks: list[Any]) -> None:
    if mask in masks:
        masks.remove(mask)
    masks.append(mask)
