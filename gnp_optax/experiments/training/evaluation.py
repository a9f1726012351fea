"""What is measured of a run: at the end of an epoch, and at some of its steps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gnp_optax as gnp
from gnp_optax import diagnostics
from gnp_optax.experiments.data.datasets import Split
from gnp_optax.experiments.models.network import Network, Params

Floats = dict[str, Any]
_TEST_BATCH = 1000
UNTESTED: Floats = {"test_error": float("nan"), "test_loss": float("nan")}


class Evaluation:
    """The compiled measurements at the end of an epoch."""

    def __init__(self, network: Network, r: float, test: Split, replicated: Any) -> None:
        self.network = network
        self.r = r
        self._examples: Any = jax.tree.map(np.asarray, test)
        jit = functools.partial(jax.jit, out_shardings=replicated)
        self._test, self._probe = jit(network.test), jit(self._measure)

    def test(self, state: Any) -> Floats:
        """Return test error in percent, and test loss.

        One call for each batch: on a CPU, convolutions are slow inside a compiled loop.
        """
        images, labels = self._examples
        found, sizes = [], []
        for start in range(0, len(labels), _TEST_BATCH):
            part = Split(*(x[start : start + _TEST_BATCH] for x in (images, labels)))
            found.append(self._test(state.params, state.statistics, part))
            sizes.append(len(part.labels))
        wrong, loss = np.average(jax.device_get(found), axis=0, weights=sizes)
        return {"test_error": 100 * float(wrong), "test_loss": float(loss)}

    def probe(self, state: Any, probe: Split) -> tuple[Params, Floats]:
        """Return the gradient on the probe, and `||g||` and `L(theta + r g/||g||) - L` there.

        And the norm of the gradient for each layer.
        """
        grads, (norm, sharpness) = self._probe(state.params, state.statistics, probe)
        layers = diagnostics.norms_by_layer(grads)
        return grads, {
            "gradient_norm": float(norm),
            "sharpness": float(sharpness),
            "layer_norms": dict(zip(layers.paths, rounded(layers.norms), strict=True)),
        }

    def _measure(self, params: Params, statistics: Any, probe: Split) -> tuple[Params, Any]:
        def loss(params: Params) -> jax.Array:
            return self.network.test_loss(params, statistics, probe)

        value, grads = jax.value_and_grad(loss)(params)
        ascent = gnp.sam(self.r)
        seen: Any
        _, seen = ascent.update(grads, ascent.init(params), params, value_fn=loss)
        return grads, (seen.grad_norm, seen.perturbed_loss - value)


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
