"""Train one model with one method and seed, an epoch at a time."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gnp_optax as gnp
from gnp_optax.experiments.config import Config, Method, option, regularization
from gnp_optax.experiments.data import Data, Split
from gnp_optax.experiments.devices import Devices
from gnp_optax.experiments.model import ViT
from gnp_optax.experiments.records import Metrics

Params = Any


class State(NamedTuple):
    """What a step needs of the step before it."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array


class Trainer:
    """The compiled functions of one configuration, shared by all its runs.

    A method is its radius and weight at every step, and a mask. The first two are inputs of the
    compiled epoch, so that plain GR, its warmups and SAM share one compilation; a mask is static.
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
        side = data.train.images.shape[1]
        if side % config.patch_size:
            raise ValueError(f"--patch-size must divide the side of the images, {side} pixels.")
        steps = config.epochs * self.steps_per_epoch
        self.warmup_steps = config.warmup_epochs * self.steps_per_epoch
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, self.warmup_steps, steps
        )
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.adamw(schedule, weight_decay=config.weight_decay),
        )
        self.model = ViT(
            classes=10,
            patch=config.patch_size,
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            dropout=config.dropout,
        )
        self.test: Any = jax.tree.map(np.asarray, data.test)
        jit = functools.partial(jax.jit, out_shardings=devices.replicated)
        probe = config.probe_examples // devices.count
        self.probe = jax.jit(lambda train: Split(*(_joined(x[:, :probe]) for x in train)))(
            self.train
        )
        self._init = jit(self._initial_state)
        self._evaluate = jit(self._metrics)
        self._probe_gradient = jit(jax.grad(self._probe_loss))
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._cost_of: Callable[[Any], float] = functools.cache(self._count_cost)

    def run(self, method: Method, seed: int) -> Iterator[Metrics]:
        """Train from scratch; yield the metrics of each epoch."""
        config = self.config
        schedule = regularization(
            config, method, config.epochs * self.steps_per_epoch, self.warmup_steps
        )
        state = self._init(seed)
        masks: list[Any] = []  # those of this run, the latest last
        for epoch in range(config.epochs):
            mask = self._select(state.params, masks) if method == "layerwise" else None
            first = epoch * self.steps_per_epoch
            scheduled = np.asarray(schedule[first : first + self.steps_per_epoch])
            inputs = (state, self.train, None if method == "plain" else scheduled)
            train_epoch = self._compile(inputs, mask)
            start = time.perf_counter()
            state, train_loss = jax.block_until_ready(train_epoch(*inputs))
            seconds = time.perf_counter() - start
            yield {
                "method": method,
                "seed": seed,
                "epoch": epoch + 1,
                "train_loss": float(train_loss),
                **{name: float(x) for name, x in self._evaluate(state.params, self.probe).items()},
                "gradients_per_step": 1
                + (self._cost_of(mask) - 1 if mask else 1) * float((scheduled[:, 1] != 0).mean()),
                "seconds_per_step": seconds / self.steps_per_epoch,
                "perturbed_layers": list(mask.paths) if mask else None,
            }
            if not jnp.isfinite(train_loss):
                raise FloatingPointError(f"{method}, seed {seed}: the loss is {train_loss}.")

    def _initial_state(self, seed: jax.Array) -> State:
        init_key, key = jax.random.split(jax.random.key(seed))
        images = self.data.normalize(self.test.images[:1])
        params: Params = self.model.init(init_key, images)["params"]
        return State(params, self.optimizer.init(params), jnp.zeros([], jnp.int32), key)

    def _loss(self, params: Params, images: jax.Array, labels: jax.Array, key: Any) -> jax.Array:
        """Mean cross-entropy; with a key in training mode, without one in evaluation mode."""
        rngs = None if key is None else {"dropout": key}
        images = self.data.normalize(images)
        train = key is not None
        logits: Any = self.model.apply({"params": params}, images, train=train, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def _probe_loss(self, params: Params, probe: Split) -> jax.Array:
        return self._loss(params, *probe, None)

    def _train_epoch(
        self, state: State, train: Split, scheduled: jax.Array | None, mask: Any
    ) -> tuple[State, jax.Array]:
        shuffle_key, key = jax.random.split(state.key)
        devices, each = train.labels.shape
        # One device draws from the key itself: the same order as ever.
        keys = shuffle_key[None] if devices == 1 else jax.random.split(shuffle_key, devices)
        order = jax.vmap(lambda key: jax.random.permutation(key, each))(keys)
        batches = order[:, : self.steps_per_epoch * self.config.batch_size // devices]
        batches = batches.reshape(devices, self.steps_per_epoch, -1).swapaxes(0, 1)

        def step(
            state: State, inputs: tuple[jax.Array, jax.Array | None]
        ) -> tuple[State, jax.Array]:
            batch, r_alpha = inputs
            augment_key, dropout_key = jax.random.split(jax.random.fold_in(state.key, state.step))
            # Each device takes its own examples out of its own part.
            images, labels = (_joined(jax.vmap(lambda x, i: x[i])(x, batch)) for x in train)
            images = self.data.augment(augment_key, images)
            r, alpha = (0.0, 0.0) if r_alpha is None else r_alpha
            loss, grads = gnp.value_and_grad(
                self._loss, r, alpha, mask=mask, scope="all" if mask is None else "masked"
            )(state.params, images, labels, dropout_key)
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return State(params, opt_state, state.step + 1, state.key), loss

        state, losses = jax.lax.scan(step, state._replace(key=key), (batches, scheduled))
        return state, losses.mean()

    def _compile(self, inputs: tuple[Any, ...], mask: Any) -> Callable[..., Any]:
        """Compile ahead of time, so that the clock of an epoch never runs during compilation."""
        key = (mask, inputs[-1] is None)
        if key not in self._compiled:
            epoch = jax.jit(
                functools.partial(self._train_epoch, mask=mask),
                out_shardings=self.devices.replicated,
            )
            self._compiled[key] = epoch.lower(*inputs).compile()
        return self._compiled[key]

    def _select(self, params: Params, masks: list[Any]) -> Any:
        """Return the mask of the next epoch, and put it last in the list of the run's masks."""
        config = self.config
        mask: Any = gnp.masks.top_k_layers(
            self._probe_gradient(params, self.probe),
            config.layers,
            budget=config.budget,
            cost=None if config.budget is None else self._cost_of,
        )
        if mask in masks:
            masks.remove(mask)
        elif len(masks) == config.selections:
            mask = masks.pop()
        masks.append(mask)
        return mask

    def _count_cost(self, mask: Any) -> float:
        key = jax.eval_shape(lambda: jax.random.key(0))
        images, labels = (
            jax.ShapeDtypeStruct((self.config.batch_size, *x.shape[1:]), x.dtype)
            for x in self.data.test
        )
        images = jax.eval_shape(self.data.augment, key, images)
        params = jax.eval_shape(self._init, 0).params
        return gnp.masks.cost(self._loss, params, mask, images, labels, key, scope="masked")

    def _metrics(self, params: Params, probe: Split) -> dict[str, jax.Array]:
        """Test error in percent, and on the probe `||g||` and `L(theta + r g/||g||) - L`."""

        def loss(params: Params) -> jax.Array:
            return self._probe_loss(params, probe)

        value, grads = jax.value_and_grad(loss)(params)
        ascent = gnp.sam(self.config.r)
        seen: Any
        _, seen = ascent.update(grads, ascent.init(params), params, value_fn=loss)
        return {
            "test_error": self._test_error(params),
            "gradient_norm": seen.grad_norm,
            "sharpness": seen.perturbed_loss - value,
        }

    def _test_error(self, params: Params) -> jax.Array:
        def is_wrong(example: tuple[jax.Array, jax.Array]) -> jax.Array:
            image, label = example
            images = self.data.normalize(image[None])
            return self.model.apply({"params": params}, images)[0].argmax() != label

        test = tuple(map(jnp.asarray, self.test))
        return 100 * jax.lax.map(is_wrong, test, batch_size=512).mean()


def _joined(x: jax.Array) -> jax.Array:
    """Make one axis of examples out of those of devices and examples."""
    return x.reshape(-1, *x.shape[2:])
