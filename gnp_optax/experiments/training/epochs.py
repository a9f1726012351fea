"""One epoch of training, on the devices from its first step to its last."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import gnp_optax as gnp
from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data.datasets import Split
from gnp_optax.experiments.training.devices import jit
from gnp_optax.experiments.training.evaluation import Lift, early_statistics
from gnp_optax.experiments.training.steps import Kind, Scheduled, State, Steps

# So many steps of an epoch have their statistics recorded.
_SAMPLES = 4
# Runs that are trained together take their steps at the same time.
TOGETHER = State._make([0, 0, None, 0, 0])


class Epochs:
    """The compiled steps of one configuration.

    The training set, of shape (device, example, ...), stays on the devices, and an epoch is one
    program.
    """

    def __init__(
        self,
        steps: Steps,
        config: Config,
        shape: tuple[int, int],
        steps_per_epoch: int,
        lift: Lift,
        replicated: Any,
    ) -> None:
        self.compiled: dict[Kind, Callable[..., Any]] = {}
        self._steps, self._config, self._shape = steps, config, shape
        self._steps_per_epoch = steps_per_epoch
        self._replicated = replicated
        self.stride = -(-steps_per_epoch // _SAMPLES)
        self._lift = lift
        self._shuffle = jit(lift(self._batches, (0,)))

    def train(
        self, state: State, train: Split, scheduled: Scheduled, kind: Kind
    ) -> tuple[State, np.ndarray, dict[str, np.ndarray], float]:
        """Return the next state, mean loss, early statistics, and the seconds that it took.

        `scheduled` has what holds at every step of the epoch; of its weights, those of a kind that
        has one of its own are not looked at.
        """
        batches, key = self._shuffle(state.key)
        given = jax.device_put(scheduled, self._replicated)
        inputs = (state._replace(key=key), train, batches, given)
        run = self._compile(inputs, kind)
        jax.block_until_ready(inputs)
        start = time.perf_counter()
        state, measured = run(*inputs)
        losses, early = jax.block_until_ready(measured)
        seconds = time.perf_counter() - start
        sampled = {name: np.asarray(x)[:: self.stride] for name, x in early.items()}
        return state, np.mean(np.asarray(losses), axis=0), sampled, seconds

    def _batches(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return which examples are in the batches, (step, device, example), and the next key."""
        shuffle_key, key = jax.random.split(key)
        devices, each = self._shape
        # One device draws from the key itself: the same order as ever.
        keys = shuffle_key[None] if devices == 1 else jax.random.split(shuffle_key, devices)
        order = jax.vmap(lambda key: jax.random.permutation(key, each))(keys)
        batches = order[:, : self._steps_per_epoch * self._config.batch_size // devices]
        return batches.reshape(devices, self._steps_per_epoch, -1).swapaxes(0, 1), key

    def _compile(self, inputs: tuple[Any, ...], kind: Kind) -> Callable[..., Any]:
        """Compile before the clock runs."""
        if kind not in self.compiled:
            self.compiled[kind] = self._program(kind).lower(*inputs).compile()
        return self.compiled[kind]

    def _program(self, kind: Kind) -> Any:
        """Return an epoch of that kind, jitted."""

        def of_run(
            state: State, train: Split, batches: jax.Array, at: Scheduled
        ) -> tuple[State, Any]:
            i = state.step % self._steps_per_epoch
            keys = jax.random.split(jax.random.fold_in(state.key, state.step))
            # Each device takes its own examples out of its own part.
            chosen = Split(*(joined(jax.vmap(lambda x, i: x[i])(x, batches[i])) for x in train))
            images = self._steps.network.data.augment(keys[0], chosen.images)
            batch = chosen._replace(images=images)
            loss, grads, state = self._steps.take(state, batch, keys[1], at, kind)
            optimizer = self._config.optimizer
            early = early_statistics(optimizer, at.is_sampled, grads, state.opt_state)
            return state, (loss, early)

        def step(
            state: State, train: Split, batches: jax.Array, scheduled: Scheduled
        ) -> tuple[State, Any]:
            at = Scheduled(*(x[state.step % self._steps_per_epoch] for x in scheduled))
            at = at if kind.alpha is None else at._replace(alpha=kind.alpha)
            run = functools.partial(of_run, at=at)
            lifted = self._lift(run, (TOGETHER, Split._make([None, 0]), 0), (TOGETHER, 0))
            next_state, measured = lifted(state, train, batches)
            return next_state, measured

        # Inside a loop, a CPU computes convolutions of any other form slowly.
        canonical = gnp.canonical_convolutions(step)

        def epoch(state: State, *inputs: Any) -> tuple[State, Any]:
            return jax.lax.scan(
                lambda state, _: canonical(state, *inputs), state, length=self._steps_per_epoch
            )

        return jit(epoch, out_shardings=self._replicated)


def joined(x: jax.Array) -> jax.Array:
    """Make one axis of examples out of those of devices and examples."""
    return x.reshape(-1, *x.shape[2:])
