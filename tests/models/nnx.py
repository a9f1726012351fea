"""The models of `models_linen` in Flax NNX, with the same names."""

import jax
import jax.numpy as jnp
from flax import nnx

# Flax before 0.12 has no `nnx.List`: there a plain list may hold modules.
List = getattr(nnx, "List", list)


class ResidualBlock(nnx.Module):
    def __init__(self, inputs, features, strides, *, rngs):
        self.conv_1 = nnx.Conv(inputs, features, (3, 3), strides, use_bias=False, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(features, rngs=rngs)
        self.conv_2 = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
        self.norm_2 = nnx.BatchNorm(features, rngs=rngs)
        self.projects = strides > 1
        if self.projects:
            self.projection = nnx.Conv(inputs, features, (1, 1), strides, use_bias=False, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu(self.norm_1(self.conv_1(x)))
        y = self.norm_2(self.conv_2(y))
        return nnx.relu(y + (self.projection(x) if self.projects else x))


class ResNet(nnx.Module):
    def __init__(self, classes=3, width=8, *, rngs):
        self.stem = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.stem_norm = nnx.BatchNorm(width, rngs=rngs)
        first = [ResidualBlock(width, width, 1, rngs=rngs) for _ in range(2)]
        second = [
            ResidualBlock(width, 2 * width, 2, rngs=rngs),
            ResidualBlock(2 * width, 2 * width, 1, rngs=rngs),
        ]
        self.stages = List([List(first), List(second)])
        self.head = nnx.Linear(2 * width, classes, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.stem_norm(self.stem(images)))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class MLP(nnx.Module):
    def __init__(self, width, *, rngs):
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class TransformerBlock(nnx.Module):
    def __init__(self, width, heads=2, dropout=0.1, *, rngs):
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = MLP(width, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x, mask=None):
        x = x + self.drop(self.attention(self.norm_1(x), mask=mask))
        return x + self.drop(self.mlp(self.norm_2(x)))


class ViT(nnx.Module):
    def __init__(self, classes=3, patch=4, tokens=4, width=8, depth=2, *, rngs):
        size = (patch, patch)
        self.patches = nnx.Conv(3, width, size, strides=size, padding="VALID", rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens, width)))
        self.blocks = List([TransformerBlock(width, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


class LanguageModel(nnx.Module):
    def __init__(self, vocabulary=11, length=6, width=8, depth=2, *, rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = List([TransformerBlock(width, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        causal = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, causal)
        return self.head(self.norm(x))
