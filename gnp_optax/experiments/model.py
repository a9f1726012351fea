"""A small Vision Transformer."""

import flax.linen as nn
import jax


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer MLP of four times the width."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map tokens to tokens, both of shape (batch, tokens, width)."""
        width = x.shape[-1]
        y = nn.LayerNorm(name="norm_1")(x)
        y = nn.MultiHeadDotProductAttention(num_heads=self.heads, name="attention")(y, y)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.LayerNorm(name="norm_2")(x)
        y = nn.gelu(nn.Dense(4 * width, name="mlp_in")(y))
        y = nn.Dense(width, name="mlp_out")(y)
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

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Map images of shape (batch, height, width, channels) to logits (batch, classes)."""
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.depth):
            x = Block(self.heads, self.dropout, name=f"block_{i}")(x, train)
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)
        return nn.Dense(self.classes, kernel_init=nn.initializers.zeros, name="head")(x)
