"""The transformer block, and a Vision Transformer made of it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer MLP of four times the width."""

    heads: int
    dropout: float = 0.0
    causal: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map tokens to tokens, both of shape (batch, tokens, width)."""
        width = x.shape[-1]
        mask = nn.make_causal_mask(jnp.ones((1, x.shape[1]))) if self.causal else None
        y = nn.LayerNorm(dtype=self.dtype, name="norm_1")(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=self.heads, dtype=self.dtype, name="attention"
        )(y, y, mask=mask)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.LayerNorm(dtype=self.dtype, name="norm_2")(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="mlp_in")(y))
        y = nn.Dense(width, dtype=self.dtype, name="mlp_out")(y)
        return x + nn.Dropout(self.dropout, deterministic=not train)(y)


class ViT(nn.Module):
    """Vision Transformer: patches, learned positions, pre-norm blocks, mean over the tokens.

    The head starts at zero, as in the reference implementations.
    """

    classes: int
    patch: int
    width: int
    depth: int
    heads: int
    dropout: float = 0.0
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
        """Map images of shape (batch, height, width, channels) to logits (batch, classes).

        With `start`, x is what block `start` receives, and what precedes it is left out; with
        `stop`, what block `stop` would receive is returned. Block `depth` is the head.
        """
        if start is None:
            size = (self.patch, self.patch)
            x = nn.Conv(
                self.width, size, strides=size, padding="VALID", dtype=self.dtype, name="patches"
            )(x)
            x = x.reshape(x.shape[0], -1, self.width)
            positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
            x = x + positions.astype(x.dtype)
        for i in range(start or 0, self.depth if stop is None else stop):
            x = Block(self.heads, self.dropout, dtype=self.dtype, name=f"block_{i}")(x, train)
        if stop is not None:
            return x
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x).mean(axis=1)
        head = nn.Dense(
            self.classes, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="head"
        )
        return head(x)
