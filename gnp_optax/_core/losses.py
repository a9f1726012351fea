"""The user's loss function, checked where it is called."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from gnp_optax._core import checks

PyTree = Any
_Parameter = inspect.Parameter
_NAMED = (_Parameter.POSITIONAL_OR_KEYWORD, _Parameter.KEYWORD_ONLY)
_VARIADIC = (_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD)
# From the parameters to the scalar loss and whatever else it returned.
Loss = Callable[[PyTree], tuple[jax.Array, Any]]


def with_aux(fun: Callable[..., Any], has_aux: bool) -> Callable[..., tuple[jax.Array, Any]]:
    """Return `fun` in the form `(value, aux)`, raising unless the value is a real scalar."""
    if not callable(fun):
        raise TypeError(
            f"The loss must be a function of the parameters, got {_kind(fun)}. Pass the function, "
            f"and its arguments to what is returned: "
            f"gnp.value_and_grad(loss_fn, r=0.1, alpha=1.0)(params, x, y)."
        )

    def loss(*args: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        out = fun(*args, **kwargs)
        if has_aux:
            if not (isinstance(out, (tuple, list)) and len(out) == 2):
                raise TypeError(
                    f"With has_aux=True the loss must return a pair (loss, aux), but it returned "
                    f"{_kind(out)}."
                )
            value, aux = out
        else:
            value, aux = out, None
        _check_scalar(value, has_aux)
        return value, aux

    return loss


def at_types(loss: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Return the loss of arrays such as `args`, at the types that it computes in for these.

    An array that comes of a Python number is weakly typed: in bfloat16 with it, a sum is bfloat16.
    Once it is perturbed, it is not, and the same sum would be float32.
    """
    leaves = jax.tree.leaves(args)
    if not any(getattr(x, "weak_type", isinstance(x, (float, complex))) for x in leaves):
        return loss
    return _recorded(loss, *args)


def traced_once(gradient: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Return the same function, traced here and no more when it is called.

    To trace a Vision Transformer takes Python a quarter as long as to compile it takes XLA.
    """
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
        return gradient  # nothing is traced, and Python may see values
    return _recorded(gradient, *args)


def _recorded(fun: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Return the same function of arrays of the types of `args`, traced here to be replayed."""
    fill: Callable[[Iterable[Any]], Any]

    def arrays(*args: Any) -> list[Any]:
        nonlocal fill
        computed, fill = split(fun(*args))
        return computed

    try:
        jaxpr = jax.make_jaxpr(arrays)(*args)
    except Exception:  # inside `jax.grad` alone, Python may see values; an error comes again
        return fun
    run, types = core.jaxpr_as_fun(jaxpr), _types(args)

    def replay(*args: Any) -> Any:
        # As when the radius differs between the devices that `shard_map` runs on.
        return fill(run(*jax.tree.leaves(args))) if _types(args) == types else fun(*args)

    return replay


def _types(args: Any) -> list[Any]:
    return [jax.typeof(x).strip_weak_type() for x in jax.tree.leaves(args)]


def split(out: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """Return what was computed, and a function that puts other values in its place.

    Aux may hold anything; what is no array of this trace is returned as it is.
    """
    leaves, treedef = jax.tree.flatten(out)
    static = [None if isinstance(leaf, jax.core.Tracer) else (leaf,) for leaf in leaves]

    def fill(computed: Iterable[Any]) -> Any:
        found = iter(computed)
        return jax.tree.unflatten(treedef, [next(found) if x is None else x[0] for x in static])

    return [leaf for leaf in leaves if isinstance(leaf, jax.core.Tracer)], fill


def closure(
    value_fn: Callable[..., Any] | None, extra_args: Mapping[str, Any], has_aux: bool
) -> Loss:
    """Return the loss of the parameters alone: `value_fn` with the extra args that it names.

    As with Optax's line searches, an extra arg is forwarded when it is a named parameter of
    `value_fn`; the first parameter is the model's parameters, whatever its name.
    """
    if value_fn is None:
        raise TypeError(
            "Gradient regularization needs the loss: tx.update(grads, opt_state, params, "
            "value_fn=loss_fn), where loss_fn(params) is the loss on this batch. If you passed "
            "value_fn, it was dropped on the way. Flax's own TrainState does so: take "
            "gnp_optax.linen.TrainState. So do optax.lookahead, an optax.GradientTransformation "
            "made by hand, and optax.MultiSteps inside a chain. Put the regularization outside: "
            "optax.chain(gnp.gradient_regularization(r, alpha), wrapped)."
        )
    if not callable(value_fn):
        raise TypeError(
            f"value_fn must be a function of the parameters, got {_kind(value_fn)}. Pass the loss, "
            f"not its value: value_fn=lambda params: loss_fn(params, x, y)."
        )
    kwargs = _kwargs(value_fn, extra_args)
    loss = with_aux(value_fn, has_aux)

    def of_params(params: PyTree) -> tuple[jax.Array, Any]:
        try:
            return loss(params, **kwargs)
        except Exception as error:
            if isinstance(params, jax.Array) and params.ndim == 1:
                error.add_note(
                    f"The loss was given a single vector of shape {params.shape}. If optax.flatten "
                    f"is wrapped around the gradient regularization, the loss does not see the "
                    f"tree it was written for. Put the regularization outside: "
                    f"optax.chain(gnp.gradient_regularization(r, alpha), optax.flatten(...))."
                )
            adapter = checks.adapter_of(params)
            if adapter is not None:
                error.add_note(
                    f"The loss was given the parameters of a model, not the model. For a loss of "
                    f"the model: value_fn=gnp_optax.{adapter}.value_fn(loss, model, x, y), made "
                    f"before the gradient."
                )
            raise

    return of_params


def _kwargs(fun: Callable[..., Any], extra_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the extra args that `fun` names, or raise unless they are all that it needs."""
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return {}
    if not parameters or parameters[0].kind in (_Parameter.KEYWORD_ONLY, _Parameter.VAR_KEYWORD):
        raise TypeError(
            "value_fn must take the parameters first: "
            "value_fn=lambda params: loss_fn(params, x, y)."
        )
    named = [p for p in parameters[1:] if p.kind in _NAMED]
    kwargs = {p.name: extra_args[p.name] for p in named if p.name in extra_args}
    needed = [p for p in parameters[1:] if p.default is p.empty and p.kind not in _VARIADIC]
    missing = [p.name for p in needed if p.name not in kwargs]
    if missing:
        names = [p.name for p in needed]
        by_name = ", ".join(f"{name}={name}" for name in names)
        raise TypeError(
            f"value_fn needs {', '.join(map(repr, missing))} beside the parameters. Close over the "
            f"batch, value_fn=lambda params: loss_fn(params, {', '.join(names)}), or pass it by "
            f"name: tx.update(grads, opt_state, params, value_fn=loss_fn, {by_name})."
        )
    return kwargs


def _check_scalar(value: Any, has_aux: bool) -> None:
    if isinstance(value, tuple) and not has_aux:
        raise TypeError(
            f"The loss must return a scalar, but it returned {_kind(value)}. If that is "
            f"(loss, aux), say so: has_aux=True. If it is (loss, gradient), of "
            f"jax.value_and_grad(loss_fn), pass loss_fn."
        )
    if not isinstance(value, (int, float, complex, np.generic, np.ndarray, jax.Array)):
        raise TypeError(f"The loss must return a scalar, but it returned {_kind(value)}.")
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != ():
        raise TypeError(
            f"The loss must return a scalar, but it returned an array of shape {shape}. Reduce it "
            f"over the examples: loss.mean()."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"The loss must be a real floating-point scalar, but it is {dtype}.")


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of length {len(value)}"
    return f"{value!r}" if value is None or isinstance(value, str) else f"a {type(value).__name__}"
