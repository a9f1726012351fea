"""ResNet and WideResNet of 32x32 images."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

_Layer = Callable[..., Any]


def _layers(train: bool, dtype: Any) -> tuple[_Layer, _Layer]:
    convolution = functools.partial(nn.Conv, use_bias=False, dtype=dtype)
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype)
    return convolution, norm


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each followed by normalisation; activation after the sum."""

    features: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map images to images, `stride` times smaller; a 1x1 projection where shapes differ."""
        convolution, norm = _layers(train, self.dtype)
        strides = (self.stride, self.stride)
        y = convolution(self.features, (3, 3), strides=strides, name="conv_1")(x)
        y = nn.relu(norm(name="norm_1")(y))
        y = convolution(self.features, (3, 3), name="conv_2")(y)
        y = norm(name="norm_2")(y)
        if x.shape != y.shape:
            x = convolution(self.features, (1, 1), strides=strides, name="projection")(x)
            x = norm(name="norm_projection")(x)
        return nn.relu(x + y)


class PreActivationBlock(nn.Module):
    """Normalisation and activation before each of the two 3x3 convolutions; a bare sum."""

    features: int
    stride: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map images to images, `stride` times smaller; a 1x1 projection where shapes differ."""
        convolution, norm = _layers(train, self.dtype)
        strides = (self.stride, self.stride)
        activated = nn.relu(norm(name="norm_1")(x))
        y = convolution(self.features, (3, 3), strides=strides, name="conv_1")(activated)
        y = nn.relu(norm(name="norm_2")(y))
        y = convolution(self.features, (3, 3), name="conv_2")(y)
        if x.shape != y.shape:
            x = convolution(self.features, (1, 1), strides=strides, name="projection")(activated)
        return x + y


class ResNet(nn.Module):
    """The ResNet of 32x32 images: three stages, each of half the side of the one before."""

    classes: int
    widths: tuple[int, int, int]
    blocks_per_stage: int
    dtype: Any = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.widths) * self.blocks_per_stage

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        train: bool = False,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> jax.Array:
        """Map images of shape (batch, height, width, channels) to logits (batch, classes)."""
        if start is None:
            x = self.stem(x, train)
        for i in range(start or 0, self.depth if stop is None else stop):
            stage, position = divmod(i, self.blocks_per_stage)
            stride = 2 if stage > 0 and position == 0 else 1
            x = self.block(self.widths[stage], stride, f"block_{i}")(x, train)
        if stop is not None:
            return x
        x = self.top(x, train).mean(axis=(1, 2))
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)

    def stem(self, x: jax.Array, train: bool) -> jax.Array:
        """Return what the first block receives."""
        convolution, norm = _layers(train, self.dtype)
        x = convolution(self.widths[0], (3, 3), name="stem")(x)
        return nn.relu(norm(name="norm_stem")(x))

    def block(self, features: int, stride: int, name: str) -> nn.Module:
        """Return a block."""
        return ResidualBlock(features, stride, self.dtype, name=name)

    def top(self, x: jax.Array, train: bool) -> jax.Array:
        """Return what is averaged over the image."""
        del train
        return x


class WideResNet(ResNet):
    """WideResNet: wider, and with pre-activation blocks, so that it ends in a normalisation."""

    def stem(self, x: jax.Array, train: bool) -> jax.Array:
        """Return what the first block receives."""
        convolution, _ = _layers(train, self.dtype)
        return convolution(16, (3, 3), name="stem")(x)

    def block(self, features: int, stride: int, name: str) -> nn.Module:
        """Return a block."""
        return PreActivationBlock(features, stride, self.dtype, name=name)

    def top(self, x: jax.Array, train: bool) -> jax.Array:
        """Return what is averaged over the image."""
        _, norm = _layers(train, self.dtype)
        return nn.relu(norm(name="norm")(x))
