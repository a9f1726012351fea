"""Checks of arguments that every public function shares."""

import contextlib
import inspect
import reprlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnp_optax._core import nodes


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


# Where the modules of a library are, and what is written in place of passing one.
_MODULES = {
    "NNX": (
        "flax.nnx",
        "Its gradient, statistics and random streams: gnp_optax.nnx.value_and_grad(loss_fn, r, "
        "alpha)(model, x, y). For everything else take params = nnx.state(model, nnx.Param), and "
        "as their loss lambda params, x, y: gnp_optax.nnx.value_fn(loss_fn, model, x, y)(params).",
    ),
    "linen": (
        "flax.linen",
        "It holds none: params = model.init(key, x)['params'], and in the loss model.apply({"
        "'params': params}, x). The state of a training: gnp_optax.linen.TrainState.create("
        "apply_fn=model.apply, params=params, tx=tx).",
    ),
    "Equinox": (
        "equinox",
        "Its gradient: gnp_optax.equinox.value_and_grad(loss_fn, r, alpha)(model, x, y). For "
        "everything else take params = eqx.filter(model, eqx.is_inexact_array), and as their loss "
        "lambda params, x, y: gnp_optax.equinox.value_fn(loss_fn, model, x, y)(params).",
    ),
}


def check_parameters(params: Any, *, but: str = "") -> None:
    """Raise for a module where its parameters belong, unless it is one of the library `but`.

    The arrays of an Equinox module alone, as `eqx.filter` leaves them, are parameters.
    """
    for library, (home, advice) in _MODULES.items():
        kind = nodes.kind_of(home, "Module")
        if kind is not None and library != but:
            for module in nodes.inside(params, kind):
                if library != "Equinox" or not _has_only_arrays(module):
                    raise TypeError(
                        f"Parameters belong here, but {type(module).__name__} is a module of "
                        f"{library}. {advice}"
                    )


def adapter_of(params: Any) -> str | None:
    """Return the module of this package whose `value_fn` makes a loss of such parameters."""
    for adapter, home, name in (("nnx", "flax.nnx", "State"), ("equinox", "equinox", "Module")):
        kind = nodes.kind_of(home, name)
        if kind is not None and isinstance(params, kind):
            return adapter
    return None


def _has_only_arrays(tree: Any) -> bool:
    return all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(tree))


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
