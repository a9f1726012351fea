"""What is measured of a run: at the end of an epoch, and at some of its steps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gnp_optax as gnp
from gnp_optax import diagnostics
from gnp_optax._core import paths
from gnp_optax.experiments.data.datasets import Data, Split
from gnp_optax.experiments.models.network import Network, Params, cross_entropies
from gnp_optax.experiments.training.devices import jit

Floats = dict[str, Any]
# From a function of one run, and axes as for `vmap`, to one of runs that are trained together.
Lift = Callable[..., Callable[..., Any]]
_TEST_BATCH = 1000
_BINS = 15
_BITS = 4
TESTED = ("test_error", "test_loss", "ece", "error_4bit", "validation_error", "validation_loss")
UNTESTED: Floats = dict.fromkeys(TESTED, float("nan"))


class Evaluation:
    """The compiled measurements at the end of an epoch."""

    def __init__(self, network: Network, r: float, data: Data, lift: Lift, replicated: Any) -> None:
        self.network = network
        self.r = r
        self._splits: Any = jax.tree.map(np.asarray, (data.test, data.validation))
        compiled = functools.partial(jit, out_shardings=replicated)
        self._count = compiled(lift(self._counts, (0, 0, None)))
        self._probe = compiled(lift(self._measure, (0, 0, Split._make([None, 0]))))
        self._rounded = compiled(lift(lambda params: rounded_weights(params, _BITS), (0,)))

    def test(self, state: Any, is_last: bool) -> Floats:
        """Return errors in percent, losses, and the expected calibration error in percent.

        `error_4bit` is the test error after rounding the weights to 4 bits, at the last epoch. What
        is not measured is NaN, as with no validation examples what would be measured on them.
        """
        test, validation = self._splits
        found = self._of_split(state, test)
        chosen = self._of_split(state, validation) if len(validation.labels) else UNTESTED
        low = UNTESTED
        if is_last:
            low = self._of_split(state._replace(params=self._rounded(state.params)), test)
        return {
            **{name: found[name] for name in ("test_error", "test_loss", "ece")},
            "error_4bit": low["test_error"],
            "validation_error": chosen["test_error"],
            "validation_loss": chosen["test_loss"],
        }

    def _of_split(self, state: Any, split: Split) -> Floats:
        """One call for each batch, of which the last may be smaller."""
        parts = [
            self._count(
                state.params,
                state.statistics,
                Split(*(x[start : start + _TEST_BATCH] for x in split)),
            )
            for start in range(0, len(split.labels), _TEST_BATCH)
        ]
        wrong, loss, gaps = (sum(x) for x in zip(*jax.device_get(parts), strict=True))
        return {
            "test_error": 100 * wrong / split.labels.size,
            "test_loss": loss / split.labels.size,
            "ece": 100 * np.abs(gaps).sum(-1) / split.labels.size,
        }

    def _counts(self, params: Params, statistics: Any, examples: Split) -> tuple[Any, Any, Any]:
        """Return the number of errors, the sum of losses, and of confidence - correct by bin."""
        logits = self.network.logits(params, statistics, examples.images)
        probabilities = jax.nn.softmax(logits).reshape(-1, logits.shape[-1])
        confidence = probabilities.max(-1)
        correct = probabilities.argmax(-1) == examples.labels.reshape(-1)
        bins = jnp.clip((confidence * _BINS).astype(int), 0, _BINS - 1)
        gaps = jnp.zeros(_BINS).at[bins].add(confidence - correct)
        return jnp.sum(~correct), jnp.sum(cross_entropies(logits, examples.labels)), gaps

    def probe(self, state: Any, probe: Split) -> tuple[Params, Floats]:
        """Return the gradient on the probe, and `||g||` and `L(theta + r g/||g||) - L` there.

        And the norm of the gradient for each layer; of runs together the root mean square.
        """
        grads, measured = self._probe(state.params, state.statistics, probe)
        norm, sharpness, norms = jax.device_get(measured)
        if norm.ndim:
            norms = np.sqrt(np.mean(norms**2, axis=0))
        return grads, {
            "gradient_norm": norm,
            "sharpness": sharpness,
            "layer_norms": dict(zip(paths.layers_of(grads), rounded(norms), strict=True)),
        }

    def _measure(self, params: Params, statistics: Any, probe: Split) -> tuple[Params, Any]:
        def loss(params: Params) -> jax.Array:
            return self.network.test_loss(params, statistics, probe)

        value, grads = jax.value_and_grad(loss)(params)
        ascent = gnp.sam(self.r)
        seen: Any
        _, seen = ascent.update(grads, ascent.init(params), params, value_fn=loss)
        norms = diagnostics.norms_by_layer(grads).norms
        return grads, (seen.grad_norm, seen.perturbed_loss - value, norms)


def rounded_weights(params: Params, bits: int) -> Params:
    """Round weights to integers of so many bits, symmetric, with a scale per output channel.

    Leaves of less than two dimensions stay as they are. The output channels are the last axis.
    """
    largest = 2 ** (bits - 1) - 1

    def of_leaf(w: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return w
        scale = jnp.max(jnp.abs(w), axis=tuple(range(w.ndim - 1)), keepdims=True) / largest
        return jnp.where(scale == 0, w, jnp.round(w / jnp.where(scale == 0, 1, scale)) * scale)

    return jax.tree.map(of_leaf, params)


def rounded(values: Any) -> list[float]:
    """Return numbers with five digits, of which a file of many takes a third of the space."""
    return [float(f"{value:.5g}") for value in np.asarray(values)]


def early_statistics(
    optimizer: str, is_sampled: jax.Array, grads: Params, opt_state: optax.OptState
) -> dict[str, jax.Array]:
    """Return the norm of the regularized gradient, and the statistics of an adaptive optimizer.

    NaN where the step is none of those that are sampled: there they are not computed.
    """

    def measure() -> dict[str, jax.Array]:
        found = {"gradient_norm": optax.tree.norm(grads)}
        return (
            found
            if optimizer == "sgd"
            else found | diagnostics.adaptive_statistics(opt_state)._asdict()
        )

    missing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(measure))
    return jax.lax.cond(is_sampled, measure, lambda: missing)
