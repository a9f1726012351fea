"""A ResNet, a ViT and a decoder-only language model in Flax linen, as small as they can be."""

import jax.numpy as jnp
from flax import linen as nn


class ResidualBlock(nn.Module):
    features: int
    strides: int

    def setup(self):
        self.conv_1 = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)
        self.norm_1 = nn.BatchNorm()
        self.conv_2 = nn.Conv(self.features, (3, 3), use_bias=False)
        self.norm_2 = nn.BatchNorm()
        if self.strides > 1:
            self.projection = nn.Conv(self.features, (1, 1), self.strides, use_bias=False)

    def __call__(self, x, train):
        y = nn.relu(self.norm_1(self.conv_1(x), use_running_average=not train))
        y = self.norm_2(self.conv_2(y), use_running_average=not train)
        return nn.relu(y + (self.projection(x) if self.strides > 1 else x))


class ResNet(nn.Module):
    classes: int = 3
    width: int = 8
    last_stage: int = 2  # blocks in it

    def setup(self):
        self.stem = nn.Conv(self.width, (3, 3), use_bias=False)
        self.stem_norm = nn.BatchNorm()
        self.stages = [
            [ResidualBlock(self.width, 1), ResidualBlock(self.width, 1)],
            [ResidualBlock(2 * self.width, 2 if i == 0 else 1) for i in range(self.last_stage)],
        ]
        self.head = nn.Dense(self.classes)

    def __call__(self, images, train=False):
        x = nn.relu(self.stem_norm(self.stem(images), use_running_average=not train))
        for stage in self.stages:
            for block in stage:
                x = block(x, train)
        return self.head(x.mean(axis=(1, 2)))


class MLP(nn.Module):
    width: int

    def setup(self):
        self.up = nn.Dense(2 * self.width)
        self.down = nn.Dense(self.width)

    def __call__(self, x):
        return self.down(nn.gelu(self.up(x)))


class TransformerBlock(nn.Module):
    width: int
    heads: int = 2
    dropout: float = 0.1

    def setup(self):
        self.norm_1 = nn.LayerNorm()
        self.attention = nn.MultiHeadDotProductAttention(self.heads)
        self.norm_2 = nn.LayerNorm()
        self.mlp = MLP(self.width)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x, train, mask=None):
        x = x + self.drop(self.attention(self.norm_1(x), mask=mask), deterministic=not train)
        return x + self.drop(self.mlp(self.norm_2(x)), deterministic=not train)


class ViT(nn.Module):
    classes: int = 3
    patch: int = 4
    tokens: int = 4
    width: int = 8
    depth: int = 2
    remat: bool = False

    def setup(self):
        block = nn.remat(TransformerBlock, static_argnums=(2,)) if self.remat else TransformerBlock
        size = (self.patch, self.patch)
        self.patches = nn.Conv(self.width, size, strides=size, padding="VALID")
        shape = (1, self.tokens, self.width)
        self.positions = self.param("positions", nn.initializers.normal(0.02), shape)
        self.blocks = [block(self.width) for _ in range(self.depth)]
        self.norm = nn.LayerNorm()
        self.head = nn.Dense(self.classes)

    def __call__(self, images, train=False):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, self.width) + self.positions
        for block in self.blocks:
            x = block(x, train)
        return self.head(self.norm(x).mean(axis=1))


class LanguageModel(nn.Module):
    vocabulary: int = 11
    length: int = 6
    width: int = 8
    depth: int = 2
    tied: bool = False

    def setup(self):
        self.tokens = nn.Embed(self.vocabulary, self.width)
        self.positions = nn.Embed(self.length, self.width)
        self.blocks = [TransformerBlock(self.width) for _ in range(self.depth)]
        self.norm = nn.LayerNorm()
        if not self.tied:
            self.head = nn.Dense(self.vocabulary, use_bias=False)

    def __call__(self, tokens, train=False):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        causal = nn.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, train, causal)
        x = self.norm(x)
        return self.tokens.attend(x) if self.tied else self.head(x)
