"""The network of a comparison, with its statistics of batch normalisation, if it has any."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gnp_optax.experiments.config import Config, option
from gnp_optax.experiments.data.datasets import Data, Split
from gnp_optax.experiments.models.mlp import MLP
from gnp_optax.experiments.models.resnets import ResNet, WideResNet
from gnp_optax.experiments.models.transformers import GPT, ViT

Params = Any
Statistics = Any


def model(config: Config, data: Data) -> nn.Module:
    """Return the model of the options, for the classes of the data."""
    widths = (config.width, 2 * config.width, 4 * config.width)
    dtype = jnp.dtype(config.dtype)
    shape = data.train.images.shape[1:]
    match config.model:
        case "mlp":
            return MLP(data.classes, config.width, config.depth, config.layer_norm, dtype)
        case "resnet":
            return ResNet(data.classes, widths, config.depth, dtype)
        case "wide-resnet":
            return WideResNet(data.classes, widths, config.depth, dtype)
        case "gpt":
            return GPT(
                vocabulary=data.classes,
                context=shape[0],
                width=config.width,
                depth=config.depth,
                heads=config.heads,
                dropout=config.dropout,
                dtype=dtype,
            )
        case "vit":
            if shape[0] % config.patch_size:
                raise ValueError(
                    f"{option('patch_size')} must divide the side of the images, {shape[0]} pixels."
                )
            return ViT(
                classes=data.classes,
                patch=config.patch_size,
                width=config.width,
                depth=config.depth,
                heads=config.heads,
                dropout=config.dropout,
                class_token=config.class_token,
                zero_head=config.head == "zero",
                dtype=dtype,
            )


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, and the data whose examples it is given."""

    model: nn.Module
    data: Data

    def init(self, key: jax.Array, example: Split) -> tuple[Params, Statistics]:
        """Return fresh parameters and statistics."""
        variables = dict(self.model.init(key, self.data.normalize(example.images)))
        return variables.pop("params"), variables

    def loss(
        self,
        params: Params,
        images: jax.Array,
        labels: jax.Array,
        statistics: Any,
        key: jax.Array,
        label_smoothing: jax.typing.ArrayLike = 0.0,
    ) -> tuple[jax.Array, Statistics]:
        """Return the mean cross-entropy in training mode, and the new statistics."""
        logits, changed = self.model.apply(
            {"params": params, **statistics},
            self.data.normalize(images),
            train=True,
            rngs={"dropout": key},
            mutable=list(statistics),
        )
        return _cross_entropy(logits, labels, label_smoothing), dict(changed)

    def test_loss(self, params: Params, statistics: Statistics, examples: Split) -> jax.Array:
        """Return the mean cross-entropy in evaluation mode."""
        return _cross_entropy(self.logits(params, statistics, examples.images), examples.labels)

    def logits(self, params: Params, statistics: Statistics, images: jax.Array) -> jax.Array:
        """Return the logits in evaluation mode, as float32."""
        variables = {"params": params, **statistics}
        logits: Any = self.model.apply(variables, self.data.normalize(images), train=False)
        return jnp.asarray(logits, jnp.float32)


def cross_entropies(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of every label, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits, jnp.float32), labels)


def _cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: jax.typing.ArrayLike = 0.0
) -> jax.Array:
    # The cross-entropy to the uniform distribution, as far as the label is spread over it.
    logits = jnp.asarray(logits, jnp.float32)
    spread = jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)
    return jnp.mean((1 - smoothing) * cross_entropies(logits, labels) + smoothing * spread)
