"""The transformer block, a Vision Transformer and a GPT made of it."""

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
            num_heads=self.heads,
            dtype=self.dtype,
            dropout_rate=self.dropout,
            broadcast_dropout=False,
            deterministic=not train,
            name="attention",
        )(y, y, mask=mask)
        x = x + nn.Dropout(self.dropout, deterministic=not train)(y)
        y = nn.LayerNorm(dtype=self.dtype, name="norm_2")(x)
        y = nn.gelu(nn.Dense(4 * width, dtype=self.dtype, name="mlp_in")(y))
        y = nn.Dense(width, dtype=self.dtype, name="mlp_out")(y)
        return x + nn.Dropout(self.dropout, deterministic=not train)(y)


class ViT(nn.Module):
    """Vision Transformer: patches, learned positions, pre-norm blocks, mean over the tokens.

    With `class_token`, the output of an extra token in place of the mean. The head starts at zero,
    as in the reference implementations, or with `zero_head=False` as other layers do.
    """

    classes: int
    patch: int
    width: int
    depth: int
    heads: int
    dropout: float = 0.0
    class_token: bool = False
    zero_head: bool = True
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
            if self.class_token:
                token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
                token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
                x = jnp.concatenate([token, x], axis=1)
            positions = self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
            x = x + positions.astype(x.dtype)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i in range(start or 0, self.depth if stop is None else stop):
            x = Block(self.heads, self.dropout, dtype=self.dtype, name=f"block_{i}")(x, train)
        if stop is not None:
            return x
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        x = x[:, 0] if self.class_token else x.mean(axis=1)
        init = nn.initializers.zeros if self.zero_head else nn.initializers.lecun_normal()
        return nn.Dense(self.classes, kernel_init=init, dtype=self.dtype, name="head")(x)


class GPT(nn.Module):
    """GPT-2: learned positions, causal pre-norm blocks, and the embedding again as the head."""

    vocabulary: int
    context: int
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
        """Map tokens of shape (batch, length) to logits (batch, length, vocabulary)."""
        normal = nn.initializers.normal(0.02)
        embedding = nn.Embed(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=normal, name="embedding"
        )
        if start is None:
            positions = self.param("positions", normal, (self.context, self.width))
            x = embedding(x)
            x = x + positions[: x.shape[1]].astype(x.dtype)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i in range(start or 0, self.depth if stop is None else stop):
            block = Block(self.heads, self.dropout, True, self.dtype, name=f"block_{i}")
            x = block(x, train)
        if stop is not None:
            return x
        return embedding.attend(nn.LayerNorm(dtype=self.dtype, name="norm")(x))
