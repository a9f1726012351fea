"""One step of training."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import gnp_optax as gnp
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


@dataclasses.dataclass(frozen=True)
class Steps:
    """The two kinds of steps, with radius and weight r and alpha on the leaves under a mask."""

    network: Network
    config: Config

    def regularized(
        self, state: State, batch: Split, key: jax.Array, at: Scheduled, mask: Any
    ) -> Outcome:
        """Give the optimizer the regularized gradient."""
        gradient = self._gradient(at, mask)
        (loss, statistics), grads = gradient(state.params, batch, state.statistics, key)
        updated = self._optimizer(at).update(grads, state.opt_state, state.params)
        return loss, grads, _next(state, statistics, *updated)

    def split(
        self, state: State, batch: Split, key: jax.Array, at: Scheduled, mask: Any
    ) -> Outcome:
        """Keep the regularizer out of the optimizer's second moments."""

        def of_params(params: Params) -> Any:
            return self.network.loss(params, *batch, state.statistics, key, at.label_smoothing)

        params = state.params
        (loss, statistics), plain = jax.value_and_grad(of_params, has_aux=True)(params)
        regularize = gnp.gradient_regularization(at.r, at.alpha, mask=mask, has_aux=True)
        grads, _ = regularize.update(plain, regularize.init(params), params, value_fn=of_params)
        updated = plain_statistics(self._optimizer(at)).update(
            grads, state.opt_state, params, plain_gradient=plain
        )
        return loss, grads, _next(state, statistics, *updated)

    def _optimizer(self, at: Scheduled) -> optax.GradientTransformationExtraArgs:
        return optimizer(self.config, at.learning_rate, at.weight_decay)

    def _gradient(self, at: Scheduled, mask: Any) -> Callable[..., Any]:
        def loss(params: Params, batch: Split, keys: jax.Array, *, statistics: Any) -> Any:
            # Every example comes with a key, so that every group has one of its own.
            return self.network.loss(params, *batch, statistics, keys[0], at.label_smoothing)

        gradient = gnp.value_and_grad(
            loss, at.r, at.alpha, mask=mask, scope="all" if mask is None else "masked", has_aux=True
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


def _next(state: State, statistics: Statistics, updates: Params, opt_state: Any) -> State:
    params = optax.apply_updates(state.params, updates)
    return State(params, opt_state, state.step + 1, state.key, statistics)
