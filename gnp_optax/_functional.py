"""The functional core: a drop-in for `jax.value_and_grad`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp_optax import _prefix, directions
from gnp_optax._core import (
    losses,
    mixing,
    numerics,
    perturbation,
    report,
    selection,
    strength,
)
from gnp_optax._core.options import Curvature, Options, Scope
from gnp_optax._core.perturbation import Arrays, Gradient, Loss, Point
from gnp_optax._core.selection import Mask

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
    """Return a function for the value of `fun` and its regularized gradient.

    As `jax.value_and_grad(fun, has_aux=has_aux)`, with, in place of the gradient g,

        g_reg = (1 - alpha) g + alpha grad fun(params + r * g / ||g||)

    Value and aux come from the unperturbed pass; both passes get the same arguments, random keys
    included. Any optimizer, `TrainState` or Optax wrapper then works unmodified, since the gradient
    is regularized before it gets there. Where alpha is 0 there is no second pass. Call it inside
    the jitted step: outside, every call traces the loss anew.

    With a mask, what `fun` computes before it first uses a perturbed leaf is computed, and
    differentiated, once for both passes. That costs `1 + q` ordinary gradients, with q the share of
    what comes after; `gnp.masks.cost` tells it beforehand. The cut goes through calls of jitted
    functions, through `jax.checkpoint`, and between the layers of a `lax.scan` or `lax.fori_loop`
    over stacked parameters (see `gnp.masks.stacked`); any other loop, branch or function with a
    custom derivative is on one side as a whole. Effects such as `jax.debug.print` happen once
    before the cut and in each pass after it. What can't be cut is computed twice;
    `gnp.masks.explain` tells what and why, and so does the logger "gnp_optax" at level DEBUG.

    Args:
        fun: Loss `fun(params, *args, **kwargs)`, a real scalar, or `(loss, aux)` with `has_aux`.
        r: Radius of the perturbation, in the units of the parameters: a number or a traced scalar.
            Not negative. For a schedule pass `schedule(step)`.
        alpha: Weight of the perturbed gradient, `lambda / r`; a number or a traced scalar. Not
            negative. 1 is SAM, the number 0 exactly `jax.value_and_grad`.
        lam: The weight of the penalty, lambda, in place of alpha: `alpha = lam / r`, and 0 where r
            is 0. A number or a traced scalar.
        direction: From the gradient to the ascent direction d in `eps = r * d`; default
            `gnp.directions.normalized()`. It must have no state, since there is none here.
        mask: Which leaves are perturbed: `None` (all), a prefix pytree of Python bools, or a
            callable from the parameters to one (see `gnp.masks`). The norm is over these leaves.
        scope: `"all"`: every leaf gets g_reg, the gradient of `L + lambda ||grad_S L||`, with S
            the leaves under the mask. `"masked"`: they get g_reg, the others keep g.
        curvature: `"finite_difference"` takes g~ at the perturbed parameters. `"exact"` takes
            `g + r H d` with the Hessian H of the loss: `g_reg = g + lambda H d`, in which r appears
            only in `lambda = alpha * r`, and which low precision does not spoil. It costs about
            `1 + 2 q` gradients, and more memory; the loss must be twice differentiable. Where the
            cut is between activations of less than float32, and `scope` is "all", it costs one
            more backward pass of what comes before the cut.
        perturb_dtype: Evaluate the perturbed loss at parameters of at least this type, such as
            `"float32"`. By default the perturbed parameters are rounded to their own type: of
            bfloat16, most would not move. The remedy costs a copy of the leaves that it widens, and
            prefix sharing.
        surrogate_gap: Take `g~ - a (g - <u, g> u)`, `u = g~ / ||g~||`, for g~, with a this weight:
            GSAM's gradient, of the perturbed loss and of its gap to the loss. Not negative. With a
            mask and scope "all" the norms are over all leaves, and it costs one more backward pass
            of what comes before the cut.
        has_aux: Whether `fun` returns `(loss, aux)`.
        return_report: Whether to return a `gnp.Report` as well: norms, perturbed loss and cosine of
            the gradients that are there anyway, of the leaves under the mask. That costs a few
            operations for each parameter and each example, and for alpha = 1 the memory of g, else
            let go before the second pass.

    Returns:
        A function of `(params, *args, **kwargs)` that returns `(value, g_reg)`, or
        `((value, aux), g_reg)` with `has_aux`; with `return_report` the report is a third.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type; if
            both alpha and lam are given, or neither.
        ValueError: If a number is negative; if the mask selects nothing or does not fit the
            parameters; if `direction` has state.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda x, scale: scale * jnp.sum(x**2) / 2
        >>> value, grad = value_and_grad(loss, r=0.5, alpha=0.2)(jnp.array([3.0, 4.0]), 1.0)
        >>> float(value), [round(float(g), 4) for g in grad]   # x + lambda x / ||x||, lambda = 0.1
        (12.5, [3.06, 4.08])
        >>> gradient = value_and_grad(loss, r=0.5, alpha=0.2, return_report=True)
        >>> value, grad, report = gradient(jnp.array([3.0, 4.0]), 1.0)
        >>> float(report.perturbed_loss)   # 5.5**2 / 2
        15.125

    References:
        Zhao et al., "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
        Learning", ICML 2022; "When Will Gradient Regularization Be Harmful?", ICML 2024, section 2.
    """
    options = resolve(direction, mask, scope, curvature, perturb_dtype, has_aux, surrogate_gap)
    return regularized(fun, r, alpha, options, lam, return_report)


def resolve(
    direction: optax.GradientTransformation | None,
    mask: Mask,
    scope: Scope,
    curvature: Curvature,
    perturb_dtype: jax.typing.DTypeLike | None,
    has_aux: bool,
    surrogate_gap: jax.typing.ArrayLike | None = None,
) -> Options:
    """Check the options that every public form shares, and fill in the default direction."""
    ascent = directions.normalized() if direction is None else direction
    gap = 0.0 if surrogate_gap is None else surrogate_gap
    return Options(ascent, mask, scope, curvature, perturb_dtype, gap, has_aux)


def regularized(
    fun: Callable[..., Any],
    r: jax.typing.ArrayLike,
    alpha: jax.typing.ArrayLike | None,
    options: Options,
    lam: jax.typing.ArrayLike | None = None,
    return_report: bool = False,
) -> Callable[..., tuple[Any, ...]]:
    """Return the function that `value_and_grad` returns."""
    weight = _weight(r, alpha, lam)
    loss_fn = losses.with_aux(fun, options.has_aux)

    @functools.wraps(fun)
    def value_and_grad_fn(params: PyTree, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        parts = selection.Parts(options.mask, params)
        ascend = _ascent(options, parts, params)

        def loss(perturbed: Arrays, unperturbed: Arrays) -> tuple[jax.Array, Any]:
            return loss_fn(parts.unite(perturbed, unperturbed), *args, **kwargs)

        # What both gradients share: all that comes before the first use of a perturbed leaf.
        is_plain = mixing.is_known_to_be(0, weight)
        shared = _shared(loss, parts.divide(params), options, is_plain)
        # g, and how to find g~
        (value, aux), g, second_gradient, pullback = _first_gradient(shared, options, is_plain)

        def mixed() -> tuple[Gradient, report.Report | None]:
            second = second_gradient(g, ascend(g), r)  # at theta + r d
            # (1 - alpha) g + alpha g~
            g_reg = mixing.mixture(g, second, r, weight, options.surrogate_gap)
            seen = report.of_perturbed(g, shared.point[0], second) if return_report else None
            return g_reg, seen

        def plain() -> tuple[Gradient, report.Report | None]:
            if not return_report:
                return g, None
            return g, report.not_run(report.grad_norm((g[0], [])), value)

        g_reg, seen = mixing.unless_zero(weight, mixed, plain)
        grads = parts.unite(*pullback(g_reg))
        found = (value, aux) if options.has_aux else value
        return (found, grads, seen) if return_report else (found, grads)

    return value_and_grad_fn


def _weight(r: Any, alpha: Any, lam: Any) -> Any:
    """Return the weight of g~, or raise for what is no number."""
    strength.check_radius("r", r)
    weight = strength.weight(r, alpha, lam)
    for name, number in {"r": r, "alpha": alpha, "lam": lam}.items():
        if callable(number):
            written = number if isinstance(number, strength.Schedule) else "schedule"
            raise TypeError(
                f"{name} is a schedule, but value_and_grad keeps no step count to read it at. Call "
                f"it with your own: {name}={written}(step)."
            )
    return weight


def _ascent(
    options: Options, parts: selection.Parts, params: PyTree
) -> Callable[[Gradient], Arrays]:
    """Return the function from a gradient to the direction of ascent."""
    _, unperturbed = parts.divide(params)
    state = perturbation.empty_state(
        options.direction,
        params,
        "value_and_grad keeps none between steps. Use the transformation: "
        "gnp.gradient_regularization(r, alpha, direction=...).",
    )

    def ascend(g: Gradient) -> Arrays:
        # In place of g at the boundary, which is not that of leaves.
        filled = parts.unite(g[0], [jnp.zeros_like(w) for w in unperturbed])
        direction, _ = options.direction.update(filled, state, params)
        return parts.divide(direction)[0]

    return ascend


class _Shared(NamedTuple):
    """A loss behind a boundary, and the way back to the parameters.

    Attributes:
        loss: The loss of what is perturbed and of the boundary.
        point: What is perturbed, and the boundary.
        pullback: From the gradient at the point to that at the parameters.
        asks: Whether both gradients have to be of the same arrays.
    """

    loss: Loss
    point: Point
    pullback: Callable[[Gradient], Gradient]
    asks: bool


def _shared(loss: Loss, params: Point, options: Options, is_plain: bool) -> _Shared:
    """Compute what does not depend on what is perturbed, once for both gradients."""
    perturbed, unperturbed = params
    # Traced once, the suffix could not compute in two types.
    if is_plain or perturbation.is_retyped(perturbed, options.perturb_dtype):
        cut = _prefix.uncut(loss)
    else:
        cut = _prefix.cut(loss, perturbed, unperturbed)
    boundary, pull, values = jax.vjp(cut.prefix, unperturbed, has_aux=True)

    def rest(perturbed: Arrays, boundary: Arrays) -> tuple[jax.Array, Any]:
        return cut.suffix(perturbed, boundary, values)

    def pullback(gradient: Gradient) -> Gradient:
        (at_unperturbed,) = pull(gradient[1])
        return gradient[0], at_unperturbed

    return _Shared(rest, (perturbed, boundary), pullback, cut.asks)


class _First(NamedTuple):
    """The value with aux, g, how g~ is found, and the way back to the parameters."""

    value: tuple[jax.Array, Any]
    g: Gradient
    second_gradient: perturbation.Second
    pullback: Callable[[Gradient], Gradient]


def _first_gradient(shared: _Shared, options: Options, is_plain: bool) -> _First:
    if options.curvature == "exact":
        return _linearized(shared, options)
    loss, point = shared.loss, shared.point
    if not is_plain:  # only a second gradient could be of other types than the first
        loss = perturbation.at_types(loss, point, options.perturb_dtype)
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    is_same = options.scope == "all" or not point[1]
    # Where both gradients are of the same arrays, they are traced once.
    is_traced_once = is_same or shared.asks
    if is_traced_once and not is_plain:
        gradient = losses.traced_once(gradient, *point)
    # What is not linear in g~ is found in the parameters, behind the cut.
    separately = options.scope == "all" and not mixing.is_known_to_be(0, options.surrogate_gap)
    pull, pullback = _pulls(shared.pullback, separately)

    def gradient_at(moved: Arrays, others: Arrays) -> tuple[jax.Array, Gradient]:
        if not is_traced_once:
            return perturbation.gradient(loss, (moved, others), options.scope)
        (value, _), found = gradient(moved, others)
        return value, pull(found) if is_same else (found[0], [None] * len(others))

    second = perturbation.by_difference(gradient_at, point, options.perturb_dtype)
    found, g = gradient(*point)
    return _First(found, pull(g), second, pullback)


def _pulls(
    pullback: Callable[[Gradient], Gradient], separately: bool
) -> tuple[Callable[[Gradient], Gradient], Callable[[Gradient], Gradient]]:
    """Return what is done to each gradient, and to their mixture: here or there the way back."""
    return (pullback, lambda g: g) if separately else (lambda g: g, pullback)


def _linearized(shared: _Shared, options: Options) -> _First:
    perturbed, boundary = shared.point
    gradient = jax.value_and_grad(shared.loss, argnums=(0, 1), has_aux=True)
    everywhere = options.scope == "all"
    # `H d` may be far smaller than the gradient. Where the boundary is of low precision the two are
    # added behind it, in the parameters, as is what is not linear in g~.
    is_linear = mixing.is_known_to_be(0, options.surrogate_gap)
    separately = everywhere and (any(map(_is_narrow, boundary)) or not is_linear)
    pull, pullback = _pulls(shared.pullback, separately)

    def first(perturbed: Arrays) -> tuple[Gradient, Any]:
        found, g = gradient(perturbed, boundary)
        return pull(g), found

    # Not `jvp` when g~ is wanted, which would compute the gradient anew.
    g, linear, (value, aux) = jax.linearize(first, perturbed, has_aux=True)

    def product(direction: Arrays) -> tuple[jax.Array, Gradient]:
        own, others = linear(direction)
        return value, (own, others if everywhere else [None] * len(others))

    second = perturbation.by_curvature(product, shared.point)
    return _First((value, aux), g, second, pullback)


def _is_narrow(x: jax.Array) -> bool:
    return numerics.wide(x.dtype) != x.dtype
