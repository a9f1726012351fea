"""Train with one method, for one seed or for several together, an epoch at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gnp_optax as gnp
from gnp_optax._core import paths
from gnp_optax._core.options import Scope
from gnp_optax.experiments import methods
from gnp_optax.experiments.config import Config, option
from gnp_optax.experiments.data.datasets import Data, Split, noisy
from gnp_optax.experiments.methods import Method
from gnp_optax.experiments.models import BEFORE_BLOCKS
from gnp_optax.experiments.models.network import Network, Params, model
from gnp_optax.experiments.training import checkpoints, optimizers
from gnp_optax.experiments.training.checkpoints import Checkpoint
from gnp_optax.experiments.training.devices import Devices, is_first, jit
from gnp_optax.experiments.training.epochs import Epochs, joined
from gnp_optax.experiments.training.evaluation import UNTESTED, Evaluation, rounded
from gnp_optax.experiments.training.records import Epoch, Metrics
from gnp_optax.experiments.training.steps import (
    Kind,
    Memory,
    Scheduled,
    State,
    Steps,
    scope,
)


class Trainer:
    """The compiled functions of one configuration, shared by all its runs.

    A method is what holds at every step, and a mask. Radius, learning rate and weight decay are
    inputs of what is compiled, and so is a weight that changes; one that does not (of a network of
    some size), and a mask, are constants.
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
        self.model = model(config, data)
        self.network = Network(self.model, data)
        self.steps = Steps(self.network, config)
        self.epochs = Epochs(
            self.steps,
            config,
            (devices.count, each),
            self.steps_per_epoch,
            self._lift,
            devices.replicated,
        )
        self._of_probe = jit(
            self._lift(self._probe_of, (Split._make([None, 0]),), Split._make([None, 0]))
        )
        self._labels = jit(self._lift(self._noisy, (0, None, None)))
        self._numbers = devices.numbers(each)
        self.evaluation = Evaluation(self.network, config.r, data, self._lift, devices.replicated)
        # Once for all methods: it draws random numbers, which takes seconds to compile.
        self._initialize = jit(
            self._lift(self._of_seed, (0,), (0, None, 0, 0)), out_shardings=devices.replicated
        )
        self._empty = functools.cache(self._compiled_empty)
        self._cost_of: Callable[[Any, Scope], float] = functools.cache(self._count_cost)

    def run(
        self,
        method: Method,
        seeds: Sequence[int],
        checkpoint: Checkpoint | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Iterator[Epoch]:
        """Train from scratch, or from the checkpoint if there is one; yield each epoch's metrics.

        Those of the epochs before the checkpoint come first. `settings` are options in place of the
        method's.
        """
        config = dataclasses.replace(self.config.own(method), **(settings or {}))
        kind = self._kind(config, method)
        fresh, train = self._start(config, kind, seeds)
        start, done = checkpoint.load(fresh) if checkpoint else (fresh, [])
        if len(done) == config.epochs:  # it ended before it could keep them
            self._keep_parameters(method, seeds, start)
        yield from done
        for metrics, state in self._epochs(config, method, kind, start, train, done):
            # Before anything is kept: a run that has diverged is never a finished one.
            if not np.isfinite(metrics["train_loss"]).all():
                named = ", ".join(map(str, seeds))
                raise FloatingPointError(f"{method}, seed {named}: the loss is not finite.")
            each = [
                {"method": method, "seed": seed, **_of_seed(metrics, i)}
                for i, seed in enumerate(seeds)
            ]
            done = [*done, each]
            if checkpoint:
                checkpoint.keep(state, done)
            if len(done) == config.epochs:
                self._keep_parameters(method, seeds, state)
            yield each

    def _start(self, config: Config, kind: Kind, seeds: Sequence[int]) -> tuple[State, Split]:
        """Return the state that runs of these seeds begin with, and their training examples."""
        numbers = jnp.asarray(seeds if self.config.seeds_together else seeds[0])
        fresh = self._fresh(numbers, kind.memory)
        if config.pretrained:
            fresh = checkpoints.pretrained(config.pretrained, fresh)
        train = self.train
        if config.label_noise:
            labels = self._labels(numbers, train.labels, self._numbers)
            train = train._replace(labels=labels)
        elif self.config.seeds_together:
            labels = jnp.broadcast_to(train.labels, (len(seeds), *train.labels.shape))
            train = train._replace(labels=labels)
        return fresh, train

    def _keep_parameters(self, method: Method, seeds: Sequence[int], state: State) -> None:
        if self.config.keep_parameters and is_first():
            checkpoints.keep_parameters(self.config, (method, seeds[0]), state)

    def _kind(self, config: Config, method: Method) -> Kind:
        """Return what a step of the method is compiled for, as far as that does not change."""
        selects = methods.selection(method, config.layers, config.budget)
        decay = methods.memory(method)
        mask = None
        if selects is not None and selects.order != "norm":
            mask = self._blocks(selects, "masked" if decay is None else "all")
        memory = None if decay is None else Memory(None if mask is None else ~mask)
        return Kind(mask, memory=memory, is_split=method == "gr-plain-statistics")

    def _epochs(
        self,
        config: Config,
        method: Method,
        kind: Kind,
        state: State,
        train: Split,
        done: list[Epoch],
    ) -> Iterator[tuple[Metrics, State]]:
        """Go on after the epochs that are done; yield metrics and state of each further epoch."""
        schedule = self._schedule(config, method)
        selects = methods.selection(method, config.layers, config.budget)
        changes = selects is not None and selects.order == "norm"
        shows_layers = method == "plain" or changes
        masks: list[Any] = []  # those of this run, the latest last
        for finished in done:
            if finished[0]["perturbed_layers"]:
                _put_last(gnp.masks.layers(*finished[0]["perturbed_layers"]), masks)
        probe = self._of_probe(train)
        grads, metrics = self.evaluation.probe(state, probe)
        for epoch in range(len(done), config.epochs):
            is_last = epoch + 1 == config.epochs
            is_tested = is_last or (epoch + 1) % config.test_every == 0
            if selects is not None and changes:
                mask = self._select(grads, metrics["layer_norms"], selects, masks)
                kind = kind._replace(mask=mask)
            first = epoch * self.steps_per_epoch
            scheduled = Scheduled(*(x[first : first + self.steps_per_epoch] for x in schedule))
            kind = kind._replace(alpha=self._constant_weight(schedule, scheduled))
            state, train_loss, early, seconds = self.epochs.train(state, train, scheduled, kind)
            grads, metrics = self.evaluation.probe(state, probe)
            yield (
                {
                    "epoch": epoch + 1,
                    "train_loss": train_loss,
                    **metrics,
                    **(self.evaluation.test(state, is_last) if is_tested else UNTESTED),
                    "gradients_per_step": 1
                    + (self._cost_of(kind.mask, scope(kind)) - 1 if kind.mask else 1)
                    * float((scheduled.alpha != 0).mean()),
                    "seconds_per_step": seconds / self.steps_per_epoch,
                    "perturbed_layers": list(kind.mask.paths) if kind.mask else None,
                    **({} if shows_layers else {"layer_norms": {}}),
                    "early": early if scheduled.is_sampled.any() else {},
                },
                state,
            )

    def _schedule(self, config: Config, method: Method) -> Scheduled:
        steps, warmup = (n * self.steps_per_epoch for n in (config.epochs, config.warmup_epochs))
        pairs = methods.regularization(method, config.r, config.alpha, steps, warmup)
        rate = jax.vmap(optimizers.learning_rate(config, steps, warmup))(jnp.arange(steps))
        held = [np.full(steps, x) for x in (config.weight_decay, config.label_smoothing)]
        decay = np.full(steps, methods.memory(method) or 0.0, np.float32)
        every = (*np.asarray(pairs).T, np.asarray(rate), *held)
        # For the warmup and as long again.
        sampled = np.arange(steps) % self.steps_per_epoch % self.epochs.stride == 0
        sampled &= np.arange(steps) < max(2 * warmup, self.steps_per_epoch)
        return Scheduled._make([*(np.asarray(x, np.float32) for x in every), sampled, decay])

    def _constant_weight(self, of_run: Scheduled, of_epoch: Scheduled) -> float | None:
        """Return the weight that is a constant of what is compiled, if there is one.

        Small networks, which are trained together, take longer to compile than all that a constant
        saves: there all methods with a weight share a program.
        """
        if self.config.seeds_together:
            return None if of_run.alpha.any() else 0.0
        weights = set(of_epoch.alpha.tolist())
        return weights.pop() if len(weights) == 1 else None

    def _lift(self, fun: Callable[..., Any], axes: Any, out: Any = 0) -> Callable[..., Any]:
        """Return the function of all runs that are trained together."""
        return jax.vmap(fun, axes, out) if self.config.seeds_together else fun

    def _probe_of(self, train: Split) -> Split:
        each = self.config.probe_examples // self.devices.count
        return Split(*(joined(x[:, :each]) for x in train))

    def _noisy(self, seed: jax.Array, labels: jax.Array, numbers: jax.Array) -> jax.Array:
        return noisy(labels, numbers, seed, self.config.label_noise, self.data.classes)

    def _fresh(self, numbers: jax.Array, memory: Memory | None) -> State:
        params, step, key, statistics = self._initialize(numbers)
        return State(params, self._empty(memory)(params), step, key, statistics)

    def _of_seed(self, seed: jax.Array) -> tuple[Params, jax.Array, jax.Array, Any]:
        init_key, key = jax.random.split(jax.random.key(seed))
        params, statistics = self._initial(init_key)
        return params, jnp.zeros([], jnp.int32), key, statistics

    def _compiled_empty(self, memory: Memory | None) -> Callable[[Params], Any]:
        """Return the function from parameters to a fresh state of the optimizer."""
        nothing = Scheduled._make([0.0] * len(Scheduled._fields))
        init = self._lift(self.steps.optimizer(nothing, memory).init, (0,))
        return jit(init, out_shardings=self.devices.replicated)

    def _initial(self, key: jax.Array) -> tuple[Params, Any]:
        return self.network.init(key, Split(*(x[:1] for x in self.data.test)))

    @functools.cached_property
    def _shapes(self) -> tuple[Params, Any]:
        """Of parameters and statistics."""
        return jax.eval_shape(self._initial, jax.eval_shape(lambda: jax.random.key(0)))

    def _select(
        self, grads: Params, norms: dict[str, float], selects: methods.Selection, masks: list[Any]
    ) -> Any:
        """Return the mask of the next epoch, and put it last in the list of the run's masks."""
        if self.config.seeds_together:  # of which there is one gradient each
            grads = {name: {"norm": jnp.asarray(norm)} for name, norm in norms.items()}
        mask: Any = gnp.masks.top_k_layers(
            grads,
            selects.layers,
            budget=selects.budget,
            cost=None if selects.budget is None else self._cost_of_layers,
        )
        if mask not in masks and len(masks) == self.config.selections:
            return masks[-1]
        _put_last(mask, masks)
        return mask

    def _cost_of_layers(self, mask: Any) -> float:
        return self._cost_of(mask, "masked")

    def _blocks(self, selects: methods.Selection, scope: Scope) -> Any:
        """Return the mask of blocks from one end of the network on."""
        depth = self.model.depth
        layers = paths.layers_of(self._shapes[0])
        places = {layer: _place(layer, depth) for layer in layers}

        def mask(count: int) -> Any:
            first, end = (-1, count) if selects.order == "first" else (depth - count, depth + 1)
            return gnp.masks.layers(*(x for x in layers if first <= places[x] < end))

        if selects.layers is not None:
            return mask(selects.layers)
        costs = [self._cost_of(mask(n), scope) for n in range(depth + 1)]
        fitting = [n for n, cost in enumerate(costs) if cost <= (selects.budget or 2)]
        if not fitting:
            raise ValueError(f"Not even the head fits into --budget {selects.budget}.")
        return mask(max(fitting))

    def _count_cost(self, mask: Any, scope: Scope) -> float:
        key = jax.eval_shape(lambda: jax.random.key(0))
        images, labels = (
            jax.ShapeDtypeStruct((self.config.batch_size, *x.shape[1:]), x.dtype)
            for x in self.data.test
        )
        images = jax.eval_shape(self.data.augment, key, images)
        params, statistics = self._shapes
        return gnp.masks.cost(
            self.network.loss,
            params,
            mask,
            images,
            labels,
            statistics,
            key,
            scope=scope,
            has_aux=True,
        )


def _place(layer: str, depth: int) -> int:
    """Return the number of the block that a layer is in; -1 before the first, depth after all."""
    part = layer.partition("/")[0]
    kind, _, number = part.rpartition("_")
    if kind == "block":
        return int(number)
    return -1 if part in BEFORE_BLOCKS else depth


def _of_seed(metrics: Metrics, i: int) -> Metrics:
    """Return what a run of several has of metrics, in Python's own numbers."""

    def pick(value: Any) -> Any:
        if not isinstance(value, (np.ndarray, np.generic, float)):
            return value
        each: Any = np.asarray(value)
        return float(f"{each[i] if each.ndim else each:.7g}")

    early = {name: rounded(x[:, i] if x.ndim > 1 else x) for name, x in metrics["early"].items()}
    return {**{name: pick(value) for name, value in metrics.items()}, "early": early}


def _put_last(mask: Any, masks: list[Any]) -> None:
    if mask in masks:
        masks.remove(mask)
    masks.append(mask)
