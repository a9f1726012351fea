"""The functional core: a drop-in for `jax.value_and_grad`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnp_optax import _checks, _loss, _mixing, _numerics, _parts, _perturbation, _prefix
from gnp_optax._selection import Mask

PyTree = Any
Arrays = list[Any]


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
) -> Callable[..., tuple[Any, PyTree]]:
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
    functions, through `jax.checkpoint`, and between the layers of a `lax.scan` over stacked
    parameters (see `gnp.masks.stacked`); any other loop, branch or function with a custom
    derivative is on one side as a whole. Effects such as `jax.debug.print` happen once before the
    cut and in each pass after it. If a loss can't be cut at all, it is computed twice, and the
    logger "gnp_optax" tells why at level DEBUG.

    Args:
        fun: Loss `fun(params, *args, **kwargs)`, a real scalar, or `(loss, aux)` with `has_aux`.
        r: Radius of the perturbation, in the units of the parameters: a number or a traced scalar.
            Not negative. For a schedule pass `schedule(step)`.
        alpha: Weight of the perturbed gradient, `lambda / r`; a number or a traced scalar. Not
            negative. 1 is SAM, the number 0 exactly `jax.value_and_grad`.
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
        has_aux: Whether `fun` returns `(loss, aux)`.

    Returns:
        A function of `(params, *args, **kwargs)` that returns `(value, g_reg)`, or
        `((value, aux), g_reg)` with `has_aux`.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If a number is negative; if the mask selects nothing or does not fit the
            parameters; if `direction` has state.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda x, scale: scale * jnp.sum(x**2) / 2
        >>> value, grad = value_and_grad(loss, r=0.5, alpha=0.2)(jnp.array([3.0, 4.0]), 1.0)
        >>> float(value), [round(float(g), 4) for g in grad]   # x + lambda x / ||x||, lambda = 0.1
        (12.5, [3.06, 4.08])

    References:
        Zhao et al., "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
        Learning", ICML 2022; "When Will Gradient Regularization Be Harmful?", ICML 2024, section 2.
    """
    for name, number in (("r", r), ("alpha", alpha)):
        if callable(number):
            raise TypeError(
                f"{name} is a schedule, but value_and_grad keeps no step count to read it at. Call "
                f"it with your own: {name}=schedule(step)."
            )
        _checks.check_scalar(name, number)
    ascent = _perturbation.resolve_direction(direction, mask, scope, curvature, perturb_dtype)
    with_aux = _loss.with_aux(fun, has_aux)

    @functools.wraps(fun)
    def value_and_grad_fn(params: PyTree, /, *args: Any, **kwargs: Any) -> tuple[Any, PyTree]:
        parts = _parts.Parts(mask, params)
        perturbed, unperturbed = parts.divide(params)

        def loss(perturbed: Arrays, unperturbed: Arrays) -> tuple[jax.Array, Any]:
            return with_aux(parts.unite(perturbed, unperturbed), *args, **kwargs)

        def ascend(grads: Arrays) -> tuple[Arrays, Any]:
            filled = parts.unite(grads, [jnp.zeros_like(w) for w in unperturbed])
            found, state = _perturbation.ascend_without_state(
                ascent,
                filled,
                params,
                "value_and_grad keeps none between steps. Use the transformation: "
                "gnp.gradient_regularization(r, alpha, direction=...).",
            )
            return parts.divide(found)[0], state

        # Everything up to the boundary is computed once; the rest is a loss like any other.
        one_pass = _mixing.is_known_to_be(0, alpha)
        # Traced once, the suffix could not compute in two types.
        if one_pass or _mixing.is_retyped(perturbed, perturb_dtype):
            prefix, suffix = _prefix.uncut(loss)
        else:
            prefix, suffix = _prefix.cut(loss, perturbed, unperturbed)
        boundary, pullback, values = jax.vjp(prefix, unperturbed, has_aux=True)

        def rest(perturbed: Arrays, boundary: Arrays) -> tuple[jax.Array, Any]:
            return suffix(perturbed, boundary, values)

        def pulled_back(grads: _perturbation.Gradient) -> _perturbation.Gradient:
            (at_unperturbed,) = pullback(grads[1])
            return grads[0], at_unperturbed

        point = perturbed, boundary
        # Only a second gradient could be of other types than the first.
        again = curvature != "exact" and not one_pass
        typed = _perturbation.typed(rest, point, perturb_dtype) if again else rest
        gradient = jax.value_and_grad(typed, argnums=(0, 1), has_aux=True)
        # `H d` may be far smaller than the gradient. Where the boundary is of low precision the two
        # are added behind it, in the parameters.
        separately = curvature == "exact" and scope == "all" and any(map(_is_narrow, boundary))
        if curvature == "exact":

            def first_pass(perturbed: Arrays) -> tuple[Any, Any]:
                found, grads = gradient(perturbed, boundary)
                return (pulled_back(grads) if separately else grads), found

            # Not `jvp` at the second pass, which would compute the gradient anew.
            grads, linear, (value, aux) = jax.linearize(first_pass, perturbed, has_aux=True)

            def product(direction: Arrays) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
                first, second = linear(direction)
                return value, (first, second if scope == "all" else [None] * len(second))

            second_pass = _perturbation.extrapolation(product, perturbed, grads, r, alpha)
        else:
            # Where both passes ask for the same, they are traced once.
            same = scope == "all" or not boundary
            if same and again:
                gradient = _loss.traced_once(gradient, *point)
            (value, aux), grads = gradient(*point)

            def gradient_at(
                moved: Arrays, others: Arrays
            ) -> tuple[jax.Array, _perturbation.Gradient]:
                if not same:
                    return _perturbation.gradient(typed, (moved, others), scope)
                (value, _), found = gradient(moved, others)
                return value, found

            second_pass = _perturbation.finite_difference(
                gradient_at, point, grads, r, alpha, perturb_dtype
            )
        regularized, _, _ = _perturbation.regularize(
            grads, ascend=ascend, second_pass=second_pass, observe=lambda second: None, alpha=alpha
        )
        grads = regularized if separately else pulled_back(regularized)
        return ((value, aux) if has_aux else value), parts.unite(*grads)

    return value_and_grad_fn


def _is_narrow(x: jax.Array) -> bool:
    return _numerics.wide(x.dtype) != x.dtype
