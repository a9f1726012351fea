"""Checks of arguments that every public function shares."""

import contextlib
import inspect
import reprlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def check_scalar(name: str, value: Any) -> None:
    """Raise unless `value` can be a radius or a weight: a real number >= 0, or a traced scalar.

    A negative or non-finite value can only be seen where the number is known, not under `jit`.
    """
    if isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"{name} is a number, but it is given a gradient transformation. The optimizer follows "
            f"in the chain: optax.chain(gnp.sam(rho=0.1), optimizer)."
        )
    is_array = hasattr(value, "dtype") and hasattr(value, "shape")
    if is_array:
        is_number = value.shape == () and jnp.issubdtype(value.dtype, jnp.number)
        is_number = is_number and not jnp.issubdtype(value.dtype, jnp.complexfloating)
    else:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{name} must be a real scalar, such as 0.1, got {reprlib.repr(value)}.")
    if not isinstance(value, jax.core.Tracer) and not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {float(value)!r}.")


def check_scalar_or_schedule(name: str, value: Any) -> None:
    """Raise unless `value` is a schedule, or a scalar as `check_scalar` has it."""
    if not callable(value):
        check_scalar(name, value)


def check_share(name: str, value: Any) -> None:
    """Raise unless `value` is a share that is kept from step to step: a scalar in [0, 1)."""
    check_scalar(name, value)
    if not isinstance(value, jax.core.Tracer) and not float(value) < 1:
        raise ValueError(f"{name} must be less than 1, got {float(value)!r}.")


def check_integer(name: str, value: Any, *, at_least: int) -> None:
    """Raise unless `value` is an integer that is large enough."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value!r}.")


def check_scope(scope: str) -> None:
    """Raise unless `scope` is one of the two that exist."""
    if scope not in ("all", "masked"):
        raise ValueError(
            f"scope must be 'all' (every leaf gets the regularized gradient) or 'masked' (only the "
            f"leaves under the mask do), got {scope!r}."
        )


def check_curvature(curvature: str) -> None:
    """Raise unless `curvature` is one of the two that exist."""
    if curvature not in ("finite_difference", "exact"):
        raise ValueError(
            f"curvature must be 'finite_difference' (a second gradient, at the perturbed "
            f"parameters) or 'exact' (a Hessian-vector product), got {curvature!r}."
        )


def check_perturb_dtype(dtype: Any, curvature: str) -> None:
    """Raise unless `dtype` is None or a floating-point type that the perturbed loss can use."""
    if dtype is None:
        return
    is_floating = False
    if not isinstance(dtype, jax.Array):
        with contextlib.suppress(TypeError):
            is_floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    if not is_floating:
        raise TypeError(
            f"perturb_dtype must be a floating-point type, such as 'float32', got {dtype!r}. "
            f"(Behind optax.inject_hyperparams write the name; the class it takes for a schedule.)"
        )
    if jnp.dtype(dtype) != jax.dtypes.canonicalize_dtype(dtype):
        raise ValueError(
            f"perturb_dtype={jnp.dtype(dtype).name!r} needs 64-bit types: "
            f"jax.config.update('jax_enable_x64', True)."
        )
    if curvature == "exact":
        raise ValueError(
            "With curvature='exact' no parameter is perturbed, so that perturb_dtype would have no "
            "effect. Leave it out."
        )


# Told by the code that runs: to look at a frame's variables would keep them alive.
_MULTI_STEPS = {optax.MultiSteps.init.__code__, optax.MultiSteps.update.__code__}


def check_not_inside_multi_steps() -> None:
    """Raise where `optax.MultiSteps` calls: it hands on nothing by which it could be told."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in _MULTI_STEPS:
            raise ValueError(
                "optax.MultiSteps is wrapped around the gradient regularization, which would mix "
                "the mean gradient of all micro-batches with the perturbed gradient of the last. "
                "To regularize each micro-batch, accumulate afterwards: optax.chain("
                "gnp.gradient_regularization(r, alpha), optax.MultiSteps(optimizer, k)"
                ".gradient_transformation()). To regularize the whole batch: "
                "gnp.batching.accumulate(loss_fn, k)."
            )
        frame = frame.f_back


def check_direction(direction: Any) -> None:
    """Raise unless `direction` is a gradient transformation."""
    if not isinstance(direction, optax.GradientTransformation):
        raise TypeError(
            f"direction must be an optax.GradientTransformation from gradient to ascent direction, "
            f"got {direction!r}. Write direction=gnp.directions.normalized(), with parentheses."
        )


def listed(names: Iterable[str]) -> str:
    """Write names as a list that stays short."""
    shown = [repr(name) for name in names]
    return ", ".join(shown[:12]) + (f", ... ({len(shown)} in all)" if len(shown) > 12 else "")
