"""Flax NNX: the regularized gradient of a function of a module, and what transformations need."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from gnp_optax import _functional, _momentum
from gnp_optax._core import checks, losses, paths
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
    wrt: nnx.filterlib.Filter = nnx.Param,
) -> Callable[..., tuple[Any, ...]]:
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
        lam: As in `gnp_optax.value_and_grad`.
        direction: As in `gnp_optax.value_and_grad`.
        mask: As in `gnp_optax.value_and_grad`. A prefix pytree must be an `nnx.State`; the masks of
            `gnp_optax.masks` fit as they are.
        scope: As in `gnp_optax.value_and_grad`.
        curvature: As in `gnp_optax.value_and_grad`.
        perturb_dtype: As in `gnp_optax.value_and_grad`.
        surrogate_gap: As in `gnp_optax.value_and_grad`.
        has_aux: Whether `fun` returns `(loss, aux)`.
        return_report: Whether to return a `gnp_optax.Report` as well.
        wrt: Filter for the variables of `model` to differentiate; the one that the `nnx.Optimizer`
            was given.

    Returns:
        A function of `(model, *args, **kwargs)` that returns `(value, grads)`, or
        `((value, aux), grads)` with `has_aux`; `grads` is an `nnx.State` for
        `optimizer.update(model, grads)`. With `return_report` the report is a third.

    Raises:
        TypeError, ValueError: As `gnp_optax.value_and_grad`; if `wrt` matches no variable, or
            `model` is a module of another library.

    Example:
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> loss = lambda model, x: (model(x) ** 2).mean()
        >>> value, grads = value_and_grad(loss, r=0.1, alpha=0.8)(model, jax.numpy.ones((4, 2)))
        >>> jax.tree.map(jax.numpy.shape, nnx.to_pure_dict(grads))
        {'bias': (1,), 'kernel': (2, 1)}
    """
    loss = losses.with_aux(fun, has_aux)
    # Beside the user's aux, the variables that the clean pass has changed.
    options = _functional.resolve(
        direction, mask, scope, curvature, perturb_dtype, True, surrogate_gap
    )

    def of_params(params: PyTree, call: _Call) -> tuple[jax.Array, Any]:
        called = call.at(params)
        model, args, kwargs = called
        value, aux = loss(model, *args, **kwargs)
        return value, (aux, call.others(called))

    gradient = _functional.regularized(of_params, r, alpha, options, lam, return_report)

    @functools.wraps(fun)
    def value_and_grad_fn(model: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        called = (model, args, kwargs)
        call = _Call(called, wrt)
        (value, (aux, changed)), grads, *reports = gradient(call.params, call)
        nnx.update(called, changed)
        return ((value, aux) if has_aux else value), grads, *reports

    return value_and_grad_fn


def value_fn(
    loss: Callable[..., Any],
    model: Any,
    /,
    *args: Any,
    wrt: nnx.filterlib.Filter = nnx.Param,
    **kwargs: Any,
) -> Callable[[PyTree], Any]:
    """Return the loss as a function of the parameters, as transformations take it.

    Make it before the gradient, so that both passes see the same random keys:

        value_fn = gnp_optax.nnx.value_fn(loss, model, x, y)
        value, grads = nnx.value_and_grad(loss)(model, x, y)
        optimizer.update(model, grads, value_fn=value_fn)

    Every call works on a copy of the model and of all other arguments as they are now: batch
    statistics and random streams of the model itself stay what they are.

    Args:
        loss: Loss `loss(model, *args, **kwargs)`.
        model: The module.
        *args: Further arguments of `loss`.
        wrt: The filter that the `nnx.Optimizer` was given.
        **kwargs: Keyword arguments of `loss`.

    Returns:
        A function from the parameters, an `nnx.State`, to what `loss` returns.

    Raises:
        TypeError: If `model` is a module of another library.
        ValueError: If `wrt` matches no variable; when it is called, if the parameters are not those
            that `wrt` matches.

    Example:
        >>> import gnp_optax as gnp
        >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
        >>> loss = lambda model, x: (model(x) ** 2).mean()
        >>> x = jax.numpy.ones((4, 2))
        >>> tx = optax.chain(gnp.sam(0.1), optax.sgd(0.1))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> grads = nnx.grad(loss)(model, x)
        >>> _ = optimizer.update(model, grads, value_fn=value_fn(loss, model, x))
        >>> gnp.report_as_dict(optimizer.opt_state)["sam/perturbed"]
        1.0
    """
    call = _Call((model, args, kwargs), wrt)

    def of_params(params: PyTree) -> Any:
        given, expected = paths.leaf_paths(params), paths.leaf_paths(call.params)
        if given != expected:
            raise ValueError(
                f"The loss was made for the parameters {checks.listed(expected)}, and was given "
                f"{checks.listed(given)}. Name the filter of the optimizer: "
                f"gnp_optax.nnx.value_fn(loss, model, x, y, wrt=optimizer.wrt)."
            )
        model, args, kwargs = call.at(params)
        return loss(model, *args, **kwargs)

    return of_params


def perturbed(
    model: Any,
    optimizer: nnx.Optimizer[Any],
    *,
    perturb_dtype: jax.typing.DTypeLike | None = None,
) -> Any:
    """Return the model at which a step of `gnp_optax.momentum_sam` takes its gradient.

    The variables that the optimizer updates are perturbed copies; all others, batch statistics and
    random streams among them, are those of the model itself, which a pass through either advances:

        optimizer = nnx.Optimizer(model, optax.chain(gnp.momentum_sam(0.1), optax.adamw(1e-3)),
                                  wrt=nnx.Param)
        value, grads = nnx.value_and_grad(loss)(gnp_optax.nnx.perturbed(model, optimizer), x, y)
        optimizer.update(model, grads)

    Args:
        model: The module.
        optimizer: Its optimizer, with `gnp_optax.momentum_sam` in the chain.
        perturb_dtype: As in `gnp_optax.perturbed`.

    Returns:
        A module of the same kind.

    Raises:
        TypeError: If `model` is a module of another library.
        ValueError: As `gnp_optax.perturbed`.

    Example:
        >>> import gnp_optax as gnp
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, gnp.momentum_sam(rho=0.1), wrt=nnx.Param)
        >>> perturbed(model, optimizer).kernel.shape
        (2, 1)
    """
    checks.check_parameters(model, but="NNX")
    split: Any = nnx.split(model, optimizer.wrt, ...)
    graphdef, params, rest = split
    moved = _momentum.perturbed(
        _pure(params), _pure(optimizer.opt_state), perturb_dtype=perturb_dtype
    )
    copies = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(moved))
    there = nnx.merge(graphdef, copies, rest)
    for path, variable in nnx.to_flat_state(rest):
        _share(there, path, variable)
    again: Any = nnx.split(there, optimizer.wrt, ...)
    if len(nnx.to_flat_state(again[2])) > len(nnx.to_flat_state(rest)):
        raise ValueError(
            "Before version 0.12 Flax can't share a variable that stands in several places of a "
            "module: pip install --upgrade flax."
        )
    return there


def _share(module: Any, path: tuple[Any, ...], variable: Any) -> None:
    """Put a variable where a module has a copy of it; `nnx.merge` of Flax before 0.12 copies."""
    for key in path[:-1]:
        module = _child(module, key)
    if _child(module, path[-1]) is variable:
        return
    if isinstance(module, (list, dict)):
        module[path[-1]] = variable
    else:
        setattr(module, path[-1], variable)


def _child(node: Any, key: Any) -> Any:
    return node[key] if isinstance(key, int) or isinstance(node, dict) else getattr(node, key)


# From variables to what they hold; `nnx.pure` until Flax 0.12.
_pure: Callable[[Any], Any] = getattr(nnx, "as_pure", None) or nnx.pure


class _Call:
    """The model and all other arguments of a call, as a function of what is differentiated.

    All arguments at once, since they may share variables (an `nnx.Rngs` for one).
    """

    def __init__(self, called: PyTree, wrt: nnx.filterlib.Filter) -> None:
        checks.check_parameters(called[0], but="NNX")
        self._matches = nnx.filterlib.to_predicate(wrt)
        split: Any = nnx.split(called, self._is_differentiated, ...)
        self._graphdef, differentiated, rest = split
        self.params = differentiated[0] if differentiated else differentiated
        if not jax.tree.leaves(self.params):
            raise ValueError(f"The model has no variables to differentiate: wrt={wrt!r}.")
        self._structure = jax.tree.structure(differentiated)
        # The state holds the live variables, which a pass changes: keep their present values.
        self._values, self._rest_structure = jax.tree.flatten(rest)

    def at(self, params: PyTree) -> PyTree:
        """Return the arguments anew, so that the variables belong to the trace of one pass."""
        return nnx.merge(
            self._graphdef,
            jax.tree.unflatten(self._structure, jax.tree.leaves(params)),
            jax.tree.unflatten(self._rest_structure, self._values),
        )

    def others(self, called: PyTree) -> Any:
        """Return the variables that are not differentiated."""
        split: Any = nnx.split(called, self._is_differentiated, nnx.Variable, ...)
        _, _, variables, _ = split
        return variables

    def _is_differentiated(self, path: tuple[Any, ...], value: Any) -> bool:
        return path[0] == 0 and self._matches(path[1:], value)


def __dir__() -> list[str]:
    return __all__
