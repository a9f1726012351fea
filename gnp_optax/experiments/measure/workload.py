"""What a cost is measured on: a model, its loss, and random inputs of the right shape."""

import dataclasses
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnp_optax import masks
from gnp_optax.experiments.models.resnets import ResNet, WideResNet
from gnp_optax.experiments.models.transformers import GPT, ViT

Params = Any
Model = Literal["vit-ti", "vit-s", "vit-b", "resnet20", "wrn-28-10", "gpt2-small"]


class Batch(NamedTuple):
    """What the loss takes beside the parameters."""

    inputs: Any
    targets: Any
    batch_stats: Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model of `depth` blocks, and the shapes of its inputs and targets.

    Block `depth` means the head, by which is meant everything after the last block. `head` names
    the layers that it consists of.
    """

    model: nn.Module
    depth: int
    inputs: jax.ShapeDtypeStruct
    targets: jax.ShapeDtypeStruct
    classes: int
    head: tuple[str, ...]

    def loss(self, params: Params, batch: Batch) -> tuple[jax.Array, Any]:
        """Return the mean cross-entropy, and the new statistics of batch normalisation."""
        return self._loss(params, batch, batch.inputs, None)

    def suffix_loss(
        self, params: Params, boundary: jax.Array, batch: Batch, block: int
    ) -> tuple[jax.Array, Any]:
        """Return the same from what block `block` receives."""
        return self._loss(params, batch, boundary, block)

    def _loss(
        self, params: Params, batch: Batch, x: Any, start: int | None
    ) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": batch.batch_stats}
        logits, changed = self.model.apply(
            variables, x, train=True, start=start, mutable=["batch_stats"]
        )
        logits = jnp.asarray(logits, jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return losses.mean(), dict(changed).get("batch_stats", {})

    def boundary(self, params: Params, batch: Batch, block: int) -> Any:
        """Return the shape and type of what block `block` receives."""

        def prefix(params: Params, batch: Batch) -> Any:
            variables = {"params": params, "batch_stats": batch.batch_stats}
            return self.model.apply(
                variables, batch.inputs, train=True, stop=block, mutable=["batch_stats"]
            )[0]

        return jax.eval_shape(prefix, params, batch)

    def mask(self, block: int) -> Any:
        """Select everything from a block on."""
        names = [*(f"block_{i}" for i in range(block, self.depth)), *self.head]
        return masks.by_path(f"^({'|'.join(names)})/")

    def abstract(self) -> tuple[Params, Batch]:
        """Return the shapes and types of parameters and batch."""
        variables = jax.eval_shape(self.model.init, jax.random.key(0), self.inputs)
        stats = variables.get("batch_stats", {})
        return variables["params"], Batch(self.inputs, self.targets, stats)

    def concrete(self) -> tuple[Params, Batch]:
        """Return random parameters and a random batch.

        Not as the model initialises them: the gradients of a head of zeros vanish below it.
        """
        random = np.random.default_rng(0)

        def array(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
            if jnp.issubdtype(like.dtype, jnp.integer):
                return jnp.asarray(random.integers(0, self.classes, like.shape), like.dtype)
            near_one = jax.tree_util.keystr(path).endswith(("['scale']", "['var']"))
            noise = 0.02 * random.standard_normal(like.shape, np.float32)
            return jnp.asarray(near_one + noise, like.dtype)

        arrays: tuple[Params, Batch] = jax.tree_util.tree_map_with_path(array, self.abstract())
        return arrays


def workload(name: Model, batch_size: int, dtype: str, length: int) -> Workload:
    """Return one of the models by name; `length` is the number of tokens of a text."""
    if name == "gpt2-small":
        gpt = GPT(vocabulary=50257, context=1024, width=768, depth=12, heads=12, dtype=dtype)
        return text(gpt, batch_size, length)
    vit: Any = {"classes": 10, "patch": 4, "depth": 12, "dtype": dtype}
    match name:
        case "vit-ti":
            return images(ViT(width=192, heads=3, **vit), batch_size)
        case "vit-s":
            return images(ViT(width=384, heads=6, **vit), batch_size)
        case "vit-b":
            return images(ViT(width=768, heads=12, **vit), batch_size)
        case "resnet20":
            return images(ResNet(10, (16, 32, 64), 3, dtype), batch_size)
        case "wrn-28-10":
            return images(WideResNet(10, (160, 320, 640), 4, dtype), batch_size)


def images(model: Any, batch_size: int, side: int = 32) -> Workload:
    """Classify images of three channels."""
    return Workload(
        model,
        model.depth,
        inputs=jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.dtype(jnp.float32)),
        targets=jax.ShapeDtypeStruct((batch_size,), jnp.dtype(jnp.int32)),
        classes=model.classes,
        head=("norm", "head"),
    )


def text(model: GPT, batch_size: int, length: int) -> Workload:
    """Predict the next token.

    The head is the last normalisation alone: its matrix is the embedding, at the very beginning.
    """
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.dtype(jnp.int32))
    return Workload(model, model.depth, tokens, tokens, classes=model.vocabulary, head=("norm",))
