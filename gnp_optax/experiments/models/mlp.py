"""A multilayer perceptron."""

from typing import Any

import flax.linen as nn
import jax


class Layer(nn.Module):
    """A matrix, normalisation over the features, and ReLU."""

    width: int
    is_normalized: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map features (batch, features) to features (batch, width)."""
        x = nn.Dense(self.width, dtype=self.dtype, name="dense")(x)
        return nn.relu(nn.LayerNorm(dtype=self.dtype, name="norm")(x) if self.is_normalized else x)


class MLP(nn.Module):
    """Hidden layers, each half as wide as the one before, so that late ones are cheap.

    Each is a block; the head is what comes after.
    """

    classes: int
    width: int
    depth: int
    is_normalized: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> jax.Array:
        """Map examples of any shape (batch, ...) to logits (batch, classes)."""
        del train
        if start is None:
            x = x.reshape(x.shape[0], -1)
        for i in range(start or 0, self.depth if stop is None else stop):
            width = max(1, self.width // 2**i)
            x = Layer(width, self.is_normalized, self.dtype, name=f"block_{i}")(x)
        if stop is not None:
            return x
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)
