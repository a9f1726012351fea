"""The methods that are compared: radius, weight, and layers."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp_optax import schedules

Method = Literal[
    "plain",
    "gr",
    "gr-r-warmup",
    "gr-lambda-warmup",
    "gr-zero-warmup",
    "sam",
    "layerwise",
    "layerwise-1",
    "layerwise-2",
    "layerwise-4",
    "layerwise-8",
    "layerwise-budget",
    "gr-plain-statistics",
]
STANDARD: tuple[Method, ...] = (
    *("plain", "gr", "gr-r-warmup", "gr-lambda-warmup", "gr-zero-warmup", "sam", "layerwise"),
)


class Selection(NamedTuple):
    """How a layer-wise method selects: the `layers` of largest gradient norm, within a budget."""

    layers: int | None
    budget: float | None


def selection(method: Method, layers: int, budget: float | None) -> Selection | None:
    """Return how the method selects its layers; `None` for a method that perturbs all of them."""
    if method == "layerwise":
        return Selection(layers, budget)
    if method == "layerwise-budget":
        return Selection(None, budget)
    if method.startswith("layerwise-"):
        return Selection(int(method.removeprefix("layerwise-")), None)
    return None


def regularization(
    method: Method, r: float, alpha: float, steps: int, warmup_steps: int
) -> jax.Array:
    """Return the radius and the weight of every step of a run, as an array of shape (steps, 2)."""
    radius: optax.ScalarOrSchedule = r
    weight: optax.ScalarOrSchedule = alpha
    match method:
        case "plain":
            weight = 0.0
        case "sam":
            weight = 1.0
        case "gr-r-warmup":
            radius = schedules.r_warmup(r, warmup_steps)
        case "gr-lambda-warmup":
            weight = schedules.lambda_warmup(alpha, warmup_steps)
        case "gr-zero-warmup":
            weight = schedules.zero_warmup(alpha, warmup_steps)
        case _:
            pass

    def at(step: jax.Array) -> jax.Array:
        pair = [value(step) if callable(value) else value for value in (radius, weight)]
        return jnp.stack([jnp.asarray(value, jnp.float32) for value in pair])

    return jax.vmap(at)(jnp.arange(steps))
