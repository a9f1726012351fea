"""The methods that are compared: radius, weight, and layers; the controls begin with `plain`."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp_optax import schedules

Method = Literal[
    "plain",
    "plain-weight-decay",
    "plain-label-smoothing",
    "plain-twice",
    "gr",
    "gr-r-warmup",
    "gr-lambda-warmup",
    "gr-zero-warmup",
    "gr-after-warmup",
    "sam",
    "sam-every-2",
    "sam-every-5",
    "sam-last-quarter",
    "momentum-sam",
    "stale-sam",
    "hybrid-sam",
    "layerwise",
    "layerwise-1",
    "layerwise-2",
    "layerwise-4",
    "layerwise-8",
    "layerwise-budget",
    "layerwise-last",
    "layerwise-last-1",
    "layerwise-last-2",
    "layerwise-last-3",
    "layerwise-first-1",
    "gr-plain-statistics",
]
WARMUPS: tuple[Method, ...] = (
    *("plain", "gr", "gr-r-warmup", "gr-lambda-warmup", "gr-zero-warmup"),
)
STANDARD: tuple[Method, ...] = (*WARMUPS, "sam", "layerwise")
CONTROLS: tuple[Method, ...] = ("plain-weight-decay", "plain-label-smoothing", "plain-twice")


class Selection(NamedTuple):
    """How a layer-wise method selects its layers.

    Attributes:
        order: "norm": those of largest gradient norm, anew every epoch; "last" or "first": blocks
            from that end of the network on, with what comes after the last or before the first.
        layers: How many layers, or blocks; None for as many as the budget allows.
        budget: Largest cost of a step, in ordinary gradients.
    """

    order: Literal["norm", "last", "first"]
    layers: int | None
    budget: float | None


def selection(method: Method, layers: int, budget: float | None) -> Selection | None:
    """Return how the method selects the layers that it perturbs along the fresh gradient.

    `None` for a method that perturbs all of them, or none.
    """
    if method == "hybrid-sam":
        return Selection("last", None, budget)
    kind, _, rest = method.partition("-")
    if kind != "layerwise":
        return None
    match rest.split("-"):
        case [""]:
            return Selection("norm", layers, budget)
        case ["budget"]:
            return Selection("norm", None, budget)
        case ["last"]:
            return Selection("last", None, budget)
        case ["last", count]:
            return Selection("last", int(count), None)
        case ["first", count]:
            return Selection("first", int(count), None)
        case [count]:
            return Selection("norm", int(count), None)
        case _:
            raise ValueError(f"There is no method {method!r}.")


def memory(method: Method) -> float | None:
    """Return the decay of the gradients that the method remembers, to perturb along them.

    `None` for a method that remembers none. What is perturbed along the fresh gradient is not along
    these.
    """
    decays: dict[Method, float] = {"momentum-sam": 0.9, "stale-sam": 0.0, "hybrid-sam": 0.0}
    return decays.get(method)


def regularization(
    method: Method, r: float, alpha: float, steps: int, warmup_steps: int
) -> jax.Array:
    """Return the radius and the weight of every step of a run, as an array of shape (steps, 2)."""
    radius: optax.ScalarOrSchedule = r
    weight: optax.ScalarOrSchedule = alpha
    match method:
        case "momentum-sam" | "stale-sam":
            weight = 0.0
        case _ if method.startswith("plain"):
            weight = 0.0
        case "sam" | "hybrid-sam":
            weight = 1.0
        case "sam-every-2":
            weight = schedules.every(2, 1.0)
        case "sam-every-5":
            weight = schedules.every(5, 1.0)
        case "sam-last-quarter":
            weight = schedules.zero_warmup(1.0, steps * 3 // 4)
        case "gr-r-warmup":
            radius = schedules.r_warmup(r, warmup_steps)
        case "gr-lambda-warmup":
            weight = schedules.lambda_warmup(alpha, warmup_steps)
        case "gr-zero-warmup":
            weight = schedules.zero_warmup(alpha, warmup_steps)
        case "gr-after-warmup":
            radius = schedules.delayed(schedules.r_warmup(r, warmup_steps), warmup_steps)
            weight = schedules.zero_warmup(alpha, warmup_steps)
        case _:
            pass

    def at(step: jax.Array) -> jax.Array:
        pair = [value(step) if callable(value) else value for value in (radius, weight)]
        return jnp.stack([jnp.asarray(value, jnp.float32) for value in pair])

    return jax.vmap(at)(jnp.arange(steps))
