"""Equinox: the regularized gradient of a function of a model, and what transformations need."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import optax

from gnp_optax import _functional, _momentum
from gnp_optax._core import checks
from gnp_optax._core.options import Curvature, Scope
from gnp_optax._core.selection import Mask

__all__ = ["perturbed", "value_and_grad", "value_fn"]
PyTree = Any


def value_and_grad(
    fun: Callable[..., Any],
    r: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike | None = None,
    *,
    lam: jax.typing.ArrayLike | None = None,
    direction: optax.GradientTransformation | None = None,
    mask: Mask = None,
    scope: Scope = "all",
    curvature: Curvature = "finite_difference",
    perturb_dtype: jax.typing.DTypeLike | None = None,
    surrogate_gap: jax.typing.ArrayLike | None = None,
    has_aux: bool = False,
    return_report: bool = False,
) -> Callable[..., tuple[Any, ...]]:
    """Return a function for the value of `fun` and its regularized gradient, for Equinox models.

    As `eqx.filter_value_and_grad(fun, has_aux=has_aux)`, with the gradient of
    `gnp_optax.value_and_grad`: with respect to the floating-point arrays of the first argument. An
    `eqx.nn.State` in aux is that of the unperturbed pass, and both passes see the same random keys.

    Args:
        fun: Loss `fun(model, *args, **kwargs)`, a real scalar, or `(loss, aux)` with `has_aux`.
        r: As in `gnp_optax.value_and_grad`.
        alpha: As in `gnp_optax.value_and_grad`.
        lam: As in `gnp_optax.value_and_grad`.
        direction: As in `gnp_optax.value_and_grad`.
        mask: As in `gnp_optax.value_and_grad`: a mask of `gnp_optax.masks`, or a model of bools, as
            `eqx.tree_at` makes one for `eqx.partition`.
        scope: As in `gnp_optax.value_and_grad`.
        curvature: As in `gnp_optax.value_and_grad`.
        perturb_dtype: As in `gnp_optax.value_and_grad`.
        surrogate_gap: As in `gnp_optax.value_and_grad`.
        has_aux: Whether `fun` returns `(loss, aux)`.
        return_report: Whether to return a `gnp_optax.Report` as well.

    Returns:
        A function of `(model, *args, **kwargs)` that returns `(value, grads)`, or
        `((value, aux), grads)` with `has_aux`; `grads` is a model with `None` in place of all else.
        With `return_report` the report is a third.

    Raises:
        TypeError, ValueError: As `gnp_optax.value_and_grad`; if `model` is a module of another
            library.

    Example:
        >>> model = eqx.nn.MLP(2, "scalar", width_size=8, depth=1, key=jax.random.key(0))
        >>> loss = lambda model, x: (jax.vmap(model)(x) ** 2).mean()
        >>> value, grads = value_and_grad(loss, r=0.1, alpha=0.8)(model, jax.numpy.ones((4, 2)))
        >>> grads.layers[0].weight.shape, grads.activation
        ((8, 2), None)
    """
    options = _functional.resolve(
        direction, mask, scope, curvature, perturb_dtype, has_aux, surrogate_gap
    )

    def of_params(params: PyTree, loss: Callable[[PyTree], Any]) -> Any:
        return loss(params)

    gradient = _functional.regularized(of_params, r, alpha, options, lam, return_report)

    @functools.wraps(fun)
    def value_and_grad_fn(model: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return gradient(_params(model), value_fn(fun, model, *args, **kwargs))

    return value_and_grad_fn


def value_fn(
    loss: Callable[..., Any], model: Any, /, *args: Any, **kwargs: Any
) -> Callable[[PyTree], Any]:
    """Return the loss as a function of the parameters, as transformations take it.

        value, grads = eqx.filter_value_and_grad(loss)(model, x, y)
        value_fn = gnp_optax.equinox.value_fn(loss, model, x, y)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params, value_fn=value_fn)

    For a loss that returns `(loss, aux)` the transformation has `has_aux=True`.

    Args:
        loss: Loss `loss(model, *args, **kwargs)`.
        model: The model.
        *args: Further arguments of `loss`, an `eqx.nn.State` among them as it is before the pass.
        **kwargs: Keyword arguments of `loss`.

    Returns:
        A function from the parameters, the model's arrays, to what `loss` returns.

    Raises:
        TypeError: If `model` is a module of another library.

    Example:
        >>> model = eqx.nn.MLP(2, "scalar", width_size=8, depth=1, key=jax.random.key(0))
        >>> loss = lambda model, x: (jax.vmap(model)(x) ** 2).mean()
        >>> x = jax.numpy.ones((4, 2))
        >>> of_params = value_fn(loss, model, x)
        >>> bool(of_params(eqx.filter(model, eqx.is_inexact_array)) == loss(model, x))
        True
    """
    checks.check_parameters(model, but="Equinox")
    # Anew for every pass: an `eqx.nn.State` can be used once.
    leaves, structure = jax.tree.flatten((args, kwargs))

    def of_params(params: PyTree) -> Any:
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return loss(eqx.combine(params, model), *args, **kwargs)

    return of_params


def perturbed(
    model: Any, opt_state: PyTree, *, perturb_dtype: jax.typing.DTypeLike | None = None
) -> Any:
    """Return the model at which a step of `gnp_optax.momentum_sam` takes its gradient.

        there = gnp_optax.equinox.perturbed(model, opt_state)
        value, grads = eqx.filter_value_and_grad(loss)(there, x, y)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))

    Args:
        model: The model.
        opt_state: The optimizer state, made with
            `tx.init(eqx.filter(model, eqx.is_inexact_array))`.
        perturb_dtype: As in `gnp_optax.perturbed`.

    Returns:
        A model of the same kind.

    Raises:
        TypeError: If `model` is a module of another library.
        ValueError: As `gnp_optax.perturbed`.

    Example:
        >>> import gnp_optax as gnp
        >>> model = eqx.nn.MLP(2, "scalar", width_size=8, depth=1, key=jax.random.key(0))
        >>> tx = gnp.momentum_sam(rho=0.1)
        >>> opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        >>> perturbed(model, opt_state).layers[0].weight.shape
        (8, 2)
    """
    checks.check_parameters(model, but="Equinox")
    moved = _momentum.perturbed(_params(model), opt_state, perturb_dtype=perturb_dtype)
    return eqx.combine(moved, model)


def _params(model: Any) -> Any:
    return eqx.filter(model, eqx.is_inexact_array)


def __dir__() -> list[str]:
    return __all__
