"""Optimizers and their learning rates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnp_optax.experiments.config import Config


def learning_rate(config: Config, steps: int, warmup_steps: int) -> optax.Schedule:
    """Linear from 0 over the warmup, then a cosine to 0, or a tenth at 2/3 and at 8/9 of it all."""
    peak = config.learning_rate
    if config.decay == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps)
    warmup = optax.linear_schedule(0.0, peak, warmup_steps) if warmup_steps else lambda _: peak

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        falls = sum(jnp.asarray(step) >= steps * part // 9 for part in (6, 8))
        return jnp.asarray(warmup(step) * 0.1**falls, jnp.float32)

    return schedule


def optimizer(
    config: Config, learning_rate: Any, weight_decay: Any
) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of one step, behind a clip of the gradient's norm.

    Learning rate and weight decay may be traced, so that methods which differ in them share what is
    compiled. Weight decay is decoupled in AdamW and RMSProp. SGD adds it to the (regularized)
    gradient.
    """
    decay = optax.add_decayed_weights(weight_decay)
    step = optax.scale_by_learning_rate(learning_rate)
    clip = optax.clip_by_global_norm(config.clip_norm)
    match config.optimizer:
        case "adamw":
            return optax.chain(clip, optax.scale_by_adam(), decay, step)
        case "rmsprop":
            return optax.chain(clip, optax.scale_by_rms(decay=0.9), decay, step)
        case "sgd":
            return optax.chain(clip, decay, optax.trace(decay=0.9), step)
