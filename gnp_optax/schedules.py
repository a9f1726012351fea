"""Schedules for the radius r and the weight alpha: warmups, delays, and every k-th step.

They are Optax schedules: functions from the step count to a number. Give them to
`gradient_regularization`, or call them with your own step count for `value_and_grad`. Each knows
whether it is of the radius or of the weight, so that one in the other's place is an error, and
prints as it was written. Those of the weight serve alpha and lambda alike: `alpha=zero_warmup(...)`
or `lam=zero_warmup(...)`.
"""

import jax
import jax.numpy as jnp
import optax

from gnp_optax._core import checks, strength
from gnp_optax._core.strength import Schedule

__all__ = ["delayed", "every", "lambda_warmup", "r_warmup", "zero_warmup"]


def r_warmup(r: float, warmup_steps: float) -> optax.Schedule:
    """Grow the radius linearly from 0 during warmup.

    `r_t = r * min(1, t / warmup_steps)`, with alpha held: `lambda_t = alpha * r_t` grows alike.
    The second gradient is computed in every step, at a point that moves away from the parameters.

    Args:
        r: Radius of the perturbation after warmup, in the units of the parameters.
        warmup_steps: Length of the warmup in optimizer steps; 0 is no warmup.

    Returns:
        A schedule for the `r` of `gradient_regularization`.

    Raises:
        TypeError: If `warmup_steps` is not a whole number.
        ValueError: If `r` or `warmup_steps` is negative.

    Example:
        >>> schedule = r_warmup(0.1, warmup_steps=2)
        >>> [round(float(schedule(step)), 3) for step in range(4)]
        [0.0, 0.05, 0.1, 0.1]

    References:
        Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024, r-warmup.
    """
    checks.check_scalar("r", r)
    steps = _steps(warmup_steps)
    return Schedule("radius", f"r_warmup({r!r}, {steps})", _linear(r, steps))


def lambda_warmup(alpha: float, warmup_steps: float) -> optax.Schedule:
    """Grow the weight of the penalty linearly from 0 during warmup.

    `alpha_t = alpha * min(1, t / warmup_steps)`, with r held, so `lambda_t = alpha_t * r` grows
    alike. The second gradient is computed in every step but the first, whose weight is 0.

    Args:
        alpha: Weight of the perturbed gradient after warmup, `lambda / r`; 1 is SAM.
        warmup_steps: Length of the warmup in optimizer steps; 0 is no warmup.

    Returns:
        A schedule for the `alpha` of `gradient_regularization`.

    Raises:
        TypeError: If `warmup_steps` is not a whole number.
        ValueError: If `alpha` or `warmup_steps` is negative.

    Example:
        >>> schedule = lambda_warmup(0.8, warmup_steps=2)
        >>> [round(float(schedule(step)), 3) for step in range(4)]
        [0.0, 0.4, 0.8, 0.8]

    References:
        Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024, lambda-warmup.
    """
    checks.check_scalar("alpha", alpha)
    steps = _steps(warmup_steps)
    return Schedule("weight", f"lambda_warmup({alpha!r}, {steps})", _linear(alpha, steps))


def zero_warmup(alpha: float, warmup_steps: float) -> optax.Schedule:
    """Switch regularization on only after warmup.

    `alpha_t = 0` for `t < warmup_steps` and `alpha` afterwards: during warmup the second gradient
    is not computed.

    Args:
        alpha: Weight of the perturbed gradient after warmup, `lambda / r`; 1 is SAM.
        warmup_steps: Length of the warmup in optimizer steps; 0 is no warmup.

    Returns:
        A schedule for the `alpha` of `gradient_regularization`.

    Raises:
        TypeError: If `warmup_steps` is not a whole number.
        ValueError: If `alpha` or `warmup_steps` is negative.

    Example:
        >>> schedule = zero_warmup(0.5, warmup_steps=2)
        >>> [float(schedule(step)) for step in range(4)]
        [0.0, 0.0, 0.5, 0.5]

    References:
        Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024, zero-warmup.
    """
    checks.check_scalar("alpha", alpha)
    steps = _steps(warmup_steps)
    schedule = optax.join_schedules(
        [optax.constant_schedule(0.0), optax.constant_schedule(alpha)], [steps]
    )
    return Schedule("weight", f"zero_warmup({alpha!r}, {steps})", schedule)


def delayed(schedule: optax.Schedule, warmup_steps: float) -> optax.Schedule:
    """Begin a schedule only after warmup, from 0.

    0 for `t < warmup_steps` and `schedule(t - warmup_steps)` afterwards. Where `zero_warmup`
    switches a large radius on at once, this lets it grow. Of four warmups at five radii this one
    with the largest was the best on digits; on CIFAR-10 it was no gain (notebooks/evidence, "When
    it harms, and the cures"). Beside a delayed radius give `alpha=zero_warmup(alpha,
    warmup_steps)`, so that no second gradient is computed before.

    Args:
        schedule: One of the radius or of the weight, of the steps after warmup.
        warmup_steps: Length of the warmup in optimizer steps; 0 is no warmup.

    Returns:
        A schedule of what `schedule` is of.

    Raises:
        TypeError: If `schedule` is a number, or `warmup_steps` not a whole number.
        ValueError: If `warmup_steps` is negative.

    Example:
        >>> r = delayed(r_warmup(0.8, warmup_steps=2), warmup_steps=2)
        >>> [round(float(r(step)), 3) for step in range(6)]
        [0.0, 0.0, 0.0, 0.4, 0.8, 0.8]
        >>> r, zero_warmup(1.0, warmup_steps=2)
        (delayed(r_warmup(0.8, 2), 2), zero_warmup(1.0, 2))
    """
    if not callable(schedule):
        raise TypeError(
            f"delayed takes a schedule, got {schedule!r}. A weight that is 0 in the warmup is "
            f"zero_warmup({schedule!r}, warmup_steps); a radius that grows after it is "
            f"delayed(r_warmup({schedule!r}, warmup_steps), warmup_steps)."
        )
    steps = _steps(warmup_steps)

    def later(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        return jnp.where(step < steps, 0.0, schedule(jnp.maximum(step - steps, 0)))

    if isinstance(schedule, Schedule):
        return Schedule(schedule.kind, f"delayed({schedule!r}, {steps})", later)
    return later


def every(k: float, alpha: optax.ScalarOrSchedule) -> optax.Schedule:
    """Regularize every k-th step only.

    `alpha_t = alpha` for `t = 0, k, 2k, ...` and 0 between, where the second gradient is not
    computed: `1 + 1/k` gradients a step on average.

    Args:
        k: Distance between two regularized steps; 1 is every step.
        alpha: Weight of the perturbed gradient, `lambda / r`; 1 is SAM. A schedule is read at the
            same step, so that `every(2, zero_warmup(1.0, 100))` does both.

    Returns:
        A schedule for the `alpha` of `gradient_regularization`.

    Raises:
        TypeError: If `k` is not an integer, or `alpha` a schedule of the radius.
        ValueError: If `k < 1` or `alpha` is negative.

    Example:
        >>> schedule = every(3, 0.5)
        >>> [float(schedule(step)) for step in range(5)]
        [0.5, 0.0, 0.0, 0.5, 0.0]
        >>> schedule
        every(3, 0.5)
    """
    k = _whole(k)
    if isinstance(k, float):
        raise TypeError(
            f"k must be an integer, got {k!r}. The weight comes second: every(2, {k!r})."
        )
    checks.check_integer("k", k, at_least=1)
    strength.check_weight("alpha", alpha)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        alpha_now = alpha(step) if callable(alpha) else alpha
        return jnp.where(jnp.asarray(step) % k == 0, alpha_now, 0.0)

    return Schedule("weight", f"every({k}, {alpha!r})", schedule)


def _linear(value: float, warmup_steps: int) -> optax.Schedule:
    # Optax's linear schedule of length 0 stays at its initial value, which here would be 0.
    if warmup_steps == 0:
        return optax.constant_schedule(value)
    return optax.linear_schedule(0.0, value, warmup_steps)


def _steps(warmup_steps: float) -> int:
    steps = _whole(warmup_steps)
    if isinstance(steps, float):
        of_all = "" if steps > 1 else " * total_steps"
        raise TypeError(
            f"warmup_steps must be an integer, the number of optimizer steps, got {steps!r}. Write "
            f"warmup_steps=round({steps!r}{of_all})."
        )
    checks.check_integer("warmup_steps", steps, at_least=0)
    return steps


def _whole(number: float) -> float:
    """Return 1e3 as 1000, and everything else as it is."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def __dir__() -> list[str]:
    return __all__
