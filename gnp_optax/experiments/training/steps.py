"""One step of training."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import gnp_optax as gnp
from gnp_optax._core.options import Scope
from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data.datasets import Split
from gnp_optax.experiments.models.network import Network, Params, Statistics
from gnp_optax.experiments.training.optimizers import optimizer
from gnp_optax.experiments.training.plain_statistics import plain_statistics

# The loss, the gradient that the optimizer was given, and the next state.
Outcome = tuple[jax.Array, Params, "State"]


class State(NamedTuple):
    """What a step needs of the step before it."""

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array
    statistics: Statistics


class Scheduled(NamedTuple):
    """What may differ between methods and between steps without being compiled anew."""

    r: Any
    alpha: Any
    learning_rate: Any
    weight_decay: Any
    label_smoothing: Any
    is_sampled: Any  # whether the statistics of the optimizer are recorded
    decay: Any = 0.0  # share that is kept of the gradients that are remembered


class Memory(NamedTuple):
    """That gradients are remembered, and which leaves are perturbed along them."""

    mask: Any


class Kind(NamedTuple):
    """What a step is compiled for.

    Attributes:
        mask: Which leaves are perturbed along the fresh gradient.
        alpha: The weight of the gradient there; `None` if it changes from step to step.
        memory: What is perturbed along gradients of before, if anything.
        is_split: Whether the regularizer is kept out of the optimizer's second moments.
    """

    mask: Any = None
    alpha: float | None = None
    memory: Memory | None = None
    is_split: bool = False


@dataclasses.dataclass(frozen=True)
class Steps:
    """A step of each kind, with r and alpha for radius and weight."""

    network: Network
    config: Config

    def optimizer(
        self, at: Scheduled, memory: Memory | None
    ) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer that a step hands its gradient to."""
        rule = optimizer(self.config, at.learning_rate, at.weight_decay)
        if self.config.seeds_together:  # small networks, which take longer to compile than to copy
            rule = optax.flatten(rule)
        if memory is None:
            return rule
        return optax.chain(gnp.momentum_sam(at.r, at.decay, mask=memory.mask), rule)

    def take(
        self, state: State, batch: Split, key: jax.Array, at: Scheduled, kind: Kind
    ) -> Outcome:
        """Take a step."""
        if kind.is_split:
            return self._split(state, batch, key, at, kind.mask)
        params = state.params
        there = gnp.perturbed(params, state.opt_state) if kind.memory else params
        gradient = self._gradient(at, kind)
        (loss, statistics), grads = gradient(there, batch, state.statistics, key)
        updated = self.optimizer(at, kind.memory).update(grads, state.opt_state, params)
        return loss, grads, _next(state, statistics, *updated)

    def _split(
        self, state: State, batch: Split, key: jax.Array, at: Scheduled, mask: Any
    ) -> Outcome:
        """Keep the regularizer out of the optimizer's second moments."""

        def of_params(params: Params) -> Any:
            return self.network.loss(params, *batch, state.statistics, key, at.label_smoothing)

        params = state.params
        (loss, statistics), plain = jax.value_and_grad(of_params, has_aux=True)(params)
        regularize = gnp.gradient_regularization(at.r, at.alpha, mask=mask, has_aux=True)
        grads, _ = regularize.update(plain, regularize.init(params), params, value_fn=of_params)
        updated = plain_statistics(self.optimizer(at, None)).update(
            grads, state.opt_state, params, plain_gradient=plain
        )
        return loss, grads, _next(state, statistics, *updated)

    def _gradient(self, at: Scheduled, kind: Kind) -> Callable[..., Any]:
        def loss(params: Params, batch: Split, keys: jax.Array, *, statistics: Any) -> Any:
            # Every example comes with a key, so that every group has one of its own.
            return self.network.loss(params, *batch, statistics, keys[0], at.label_smoothing)

        gradient = gnp.value_and_grad(
            loss, at.r, at.alpha, mask=kind.mask, scope=scope(kind), has_aux=True
        )
        m = self.config.m
        if m is not None:
            gradient = gnp.batching.m_sharpness(gradient, m, has_aux=True)

        def of_batch(params: Params, batch: Split, statistics: Any, key: jax.Array) -> Any:
            if m is None:
                return gradient(params, batch, key[None], statistics=statistics)
            keys = jax.random.split(key, len(batch.labels))
            (value, each), grads = gradient(params, batch, keys, statistics=statistics)
            return (value, jax.tree.map(lambda x: x.mean(0), each)), grads

        return of_batch


def scope(kind: Kind) -> Scope:
    """Return who receives the gradient at perturbed layers: these alone, as in layer-wise GR.

    Where the other layers are perturbed as well, all of them.
    """
    return "all" if kind.mask is None or kind.memory else "masked"


def _next(state: State, statistics: Statistics, updates: Params, opt_state: Any) -> State:
    params = optax.apply_updates(state.params, updates)
    return State(params, opt_state, state.step + 1, state.key, statistics)
