"""How strong: the radius and the weight, as numbers or schedules, which know what they are for."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gnp_optax._core import checks, numerics


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A schedule that knows what it is for, and prints as it was written.

    Attributes:
        kind: What it is of: the radius r, or the weight, alpha or lambda.
        written: The call that made it.
        of_step: From the step to the number.
    """

    kind: Literal["radius", "weight"]
    written: str
    of_step: optax.Schedule

    def __call__(self, step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        """Return the number at a step."""
        return self.of_step(step)

    def __repr__(self) -> str:
        """Return the call that made it."""
        return self.written


def check_radius(name: str, value: Any) -> None:
    """Raise unless `value` is a radius or a schedule, and not one that is of the weight."""
    if isinstance(value, Schedule) and value.kind == "weight":
        raise TypeError(
            f"{name}={value!r} is a schedule of the weight, not of the radius. Write "
            f"{name}=0.1, alpha={value!r}, with your radius and weight."
        )
    checks.check_scalar_or_schedule(name, value)


def check_weight(name: str, value: Any, *, radius: str = "r") -> None:
    """Raise unless `value` is a weight or a schedule, and not one that is of the radius."""
    if isinstance(value, Schedule) and value.kind == "radius":
        raise TypeError(
            f"{name}={value!r} is a schedule of the radius, not of the weight. Write "
            f"{radius}={value!r}, {name}=0.8, with your weight."
        )
    checks.check_scalar_or_schedule(name, value)


def weight(
    r: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule | None,
    lam: optax.ScalarOrSchedule | None,
) -> optax.ScalarOrSchedule:
    """Return the weight alpha of g~, given as it is or as `lam / r`: a schedule if one of them is.

    Where a schedule or a traced scalar makes r 0, as an r-warmup does at first, the weight is 0.
    """
    if lam is None:
        if alpha is None:
            raise TypeError(
                "The weight is missing: alpha=1.0 is SAM, and lam=0.05 stands for alpha = lam / r."
            )
        check_weight("alpha", alpha)
        return alpha
    if alpha is not None:
        raise TypeError(
            f"alpha and lam are the same weight, alpha = lam / r. Write one of them, "
            f"alpha={alpha!r} or lam={lam!r}."
        )
    check_weight("lam", lam)
    if callable(lam) or callable(r):
        return lambda step: _ratio(at("lam", lam, step), at("r", r, step))
    if [isinstance(x, (int, float)) and x == 0 for x in (r, lam)] == [True, False]:
        raise ValueError(
            f"At r=0 the penalty has no weight: alpha = lam / r. Write r=0.1, lam={lam!r}, with "
            f"your radius."
        )
    return _ratio(lam, r)


def at(name: str, value: optax.ScalarOrSchedule, step: jax.typing.ArrayLike) -> Any:
    """Return a number as it is, and a schedule's at the step."""
    if not callable(value):
        return value
    scheduled = value(step)
    checks.check_scalar(f"{name}(step)", scheduled)
    return scheduled


@numerics.promoting
def _ratio(lam: Any, r: Any) -> Any:
    if not isinstance(lam, jax.core.Tracer) and not isinstance(r, jax.core.Tracer):
        # In Python, so that a weight of 0 or 1 is known to be that.
        return float(lam) / float(r) if float(r) else 0.0
    # With a divisor that is never 0, so that derivatives are finite.
    return jnp.where(r == 0, 0.0, lam / jnp.where(r == 0, 1.0, r))
