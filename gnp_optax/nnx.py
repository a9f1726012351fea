"""Flax NNX: the regularized gradient of a function of a module."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from gnp_optax import _functional, _loss
from gnp_optax._selection import Mask


def value_and_grad(
    fun: Callable[..., Any],
    r: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike,
    *,
    direction: optax.GradientTransformation | None = None,
    mask: Mask = None,
    scope: str = "all",
    curvature: str = "finite_difference",
    perturb_dtype: jax.typing.DTypeLike | None = None,
    has_aux: bool = False,
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> Callable[..., tuple[Any, Any]]:
    """Return a function for the value of `fun` and its regularized gradient, for NNX modules.

    As `nnx.value_and_grad(fun, has_aux=has_aux)` with respect to the first argument, with the
    gradient of `gnp_optax.value_and_grad`. Batch statistics, random streams and all other variables
    that are not differentiated are left as after one unperturbed pass, and both passes see the same
    random keys. (What `fun` does to plain Python attributes of a module, or to the differentiated
    variables themselves, is not carried over.)

    Args:
        fun: Loss `fun(model, *args, **kwargs)`, a real scalar, or `(loss, aux)` with `has_aux`.
        r: As in `gnp_optax.value_and_grad`.
        alpha: As in `gnp_optax.value_and_grad`.
        direction: As in `gnp_optax.value_and_grad`.
        mask: As in `gnp_optax.value_and_grad`. A prefix pytree must be an `nnx.State`; the masks of
            `gnp_optax.masks` fit as they are.
        scope: As in `gnp_optax.value_and_grad`.
        curvature: As in `gnp_optax.value_and_grad`.
        perturb_dtype: As in `gnp_optax.value_and_grad`.
        has_aux: Whether `fun` returns `(loss, aux)`.
        wrt: Filter for the variables of `model` to differentiate; the one that the `nnx.Optimizer`
            was given.

    Returns:
        A function of `(model, *args, **kwargs)` that returns `(value, grads)`, or
        `((value, aux), grads)` with `has_aux`; `grads` is an `nnx.State` for
        `optimizer.update(model, grads)`.

    Raises:
        TypeError, ValueError: As `gnp_optax.value_and_grad`; if `wrt` matches no variable.

    Example:
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> loss = lambda model, x: (model(x) ** 2).mean()
        >>> value, grads = value_and_grad(loss, r=0.1, alpha=0.8)(model, jax.numpy.ones((4, 2)))
        >>> jax.tree.map(jax.numpy.shape, nnx.to_pure_dict(grads))
        {'bias': (1,), 'kernel': (2, 1)}
    """
    matches = nnx.filterlib.to_predicate(wrt)
    with_aux = _loss.with_aux(fun, has_aux)

    def of_model(path: tuple[Any, ...], value: Any) -> bool:
        return path[0] == 0 and matches(path[1:], value)

    def pure(params: Any, rebuild: Callable[[Any], Any]) -> tuple[Any, Any]:
        called = rebuild(params)
        model, args, kwargs = called
        value, aux = with_aux(model, *args, **kwargs)
        split: Any = nnx.split(called, of_model, nnx.Variable, ...)
        _, _, variables, _ = split
        return value, (aux, variables)

    core = _functional.value_and_grad(
        pure,
        r,
        alpha,
        direction=direction,
        mask=mask,
        scope=scope,
        curvature=curvature,
        perturb_dtype=perturb_dtype,
        has_aux=True,
    )

    @functools.wraps(fun)
    def value_and_grad_fn(model: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        # All arguments at once, since they may share variables (an `nnx.Rngs` for one).
        called = (model, args, kwargs)
        split: Any = nnx.split(called, of_model, ...)
        graphdef, differentiated, rest = split
        if not jax.tree.leaves(differentiated):
            raise ValueError(f"The model has no variables to differentiate: wrt={wrt!r}.")
        # The state holds the live variables, which a pass changes: keep their present values.
        values, rest_structure = jax.tree.flatten(rest)
        structure = jax.tree.structure(differentiated)

        def rebuild(params: Any) -> Any:
            # Unflattened anew in every pass, so that the variables belong to the pass's own trace.
            return nnx.merge(
                graphdef,
                jax.tree.unflatten(structure, jax.tree.leaves(params)),
                jax.tree.unflatten(rest_structure, values),
            )

        (value, (aux, variables)), grads = core(differentiated[0], rebuild)
        nnx.update(called, variables)
        return ((value, aux) if has_aux else value), grads

    return value_and_grad_fn
