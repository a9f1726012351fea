"""The composable form: the transformation that turns the gradient into the regularized one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp_optax import _checks, _loss, _numerics, _parts, _perturbation, _report, _selection
from gnp_optax._selection import Mask

Arrays = list[Any]


class GradientRegularizationState(NamedTuple):
    """State of every transformation here; its layout depends on nothing but `direction`.

    Attributes:
        step: Number of updates so far, int32; the step at which schedules are read.
        direction_state: State of `direction`.
        grad_norm: `||g||` over all leaves.
        perturbation_norm: Norm of the change that happened to the parameters, after rounding.
        perturbed_loss: `L(theta + eps)`.
        cosine: Cosine between g and g~ over the leaves that receive g~; 0 where one of them is 0.

    The last four are of the last update, float32, and NaN where it ran no second pass.
    """

    step: jax.Array
    direction_state: optax.OptState
    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_loss: jax.Array
    cosine: jax.Array


# The public home, which is also where a pickled optimizer state looks for it.
GradientRegularizationState.__module__ = "gnp_optax"


def gradient_regularization(
    r: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule,
    *,
    direction: optax.GradientTransformation | None = None,
    mask: Mask = None,
    scope: str = "all",
    curvature: str = "finite_difference",
    perturb_dtype: jax.typing.DTypeLike | None = None,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Penalize the norm of the gradient.

    Turns the gradient g of a loss L into that of `L + lambda ||grad L||`, to first order in r:

        eps   = r * g / ||g||                    # on the leaves under `mask`
        g~    = grad L(theta + eps)
        g_reg = (1 - alpha) g + alpha g~         # alpha = lambda / r; alpha = 1 is SAM

    Put it first in a chain, and hand the loss to `update`:

        tx = optax.chain(gnp.gradient_regularization(r=0.1, alpha=0.8), optax.adamw(1e-3))
        updates, state = tx.update(grads, state, params, value_fn=loss_fn)

    The incoming updates are taken as g, whatever was done to them (a mean over devices, say).
    Keyword arguments of `update` that `value_fn` names are forwarded to it; others are ignored.
    A step at which alpha is 0 evaluates no second gradient. With a mask, the second gradient can
    share with the first only what XLA finds to be the same; `gnp.value_and_grad`, which computes
    both, is cheaper. Call `update` inside the jitted step, where a closure over the batch is traced
    with it. To accumulate gradients, put `optax.MultiSteps` after the transformation, not around
    it, or see `gnp.batching`.

    Args:
        r: Radius of the perturbation, in the units of the parameters; a number or a schedule of
            this transformation's own step count. Not negative.
        alpha: Weight of the perturbed gradient, `lambda / r`; a number or a schedule. Not negative.
        direction: From the gradient to the ascent direction d in `eps = r * d`; default
            `gnp.directions.normalized()`.
        mask: Which leaves are perturbed: `None` (all), a prefix pytree of Python bools, or a
            callable from the parameters to one (see `gnp.masks`). The norm is over these leaves.
        scope: `"all"`: every leaf gets g_reg, the gradient of `L + lambda ||grad_S L||`, with S
            the leaves under the mask. `"masked"`: they get g_reg, the others keep g.
        curvature: `"finite_difference"` takes g~ at the perturbed parameters. `"exact"` takes
            `g + r H d` with the Hessian H of the loss: `g_reg = g + lambda H d`, in which r appears
            only in `lambda = alpha * r`, and which low precision does not spoil. It costs three
            to four gradients, and more memory; the loss must be twice differentiable.
        perturb_dtype: Evaluate the perturbed loss at parameters of at least this type, such as
            `"float32"`. By default the perturbed parameters are rounded to their own type: of
            bfloat16, most would not move. The remedy costs a copy of the leaves that it widens.
        has_aux: Whether `value_fn` returns `(loss, aux)`; aux is dropped.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError: From `update`, if `value_fn` is missing or does not return a real scalar; if an
            argument is of the wrong type.
        ValueError: If a number is negative; if the mask selects nothing or does not fit the
            parameters; if a wrapper such as `optax.masked` has taken parameters away, or
            `optax.MultiSteps` is wrapped around.

    Example:
        >>> loss = lambda x: jnp.sum(x**2) / 2           # its gradient is x, its Hessian 1
        >>> params = jnp.array([3.0, 4.0])               # ||g|| = 5
        >>> tx = gradient_regularization(r=0.5, alpha=0.2)
        >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params,
        ...                            value_fn=loss)
        >>> [round(float(u), 4) for u in updates]        # x + lambda x / ||x||, lambda = 0.1
        [3.06, 4.08]
        >>> round(float(state.perturbed_loss), 4)        # 5.5**2 / 2
        15.125

    References:
        Zhao et al., "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
        Learning", ICML 2022; "When Will Gradient Regularization Be Harmful?", ICML 2024, section 2.
    """
    _checks.check_scalar_or_schedule("r", r)
    _checks.check_scalar_or_schedule("alpha", alpha)
    ascent = _perturbation.resolve_direction(direction, mask, scope, curvature, perturb_dtype)

    def init_fn(params: optax.Params) -> GradientRegularizationState:
        _checks.check_not_inside_multi_steps()
        # `optax.tree.map_params` calls `init` with a placeholder that has no leaves.
        if jax.tree.leaves(params):
            _selection.selected_leaves(mask, params)
        return GradientRegularizationState(
            jnp.zeros([], jnp.int32), ascent.init(params), *_report.not_run()
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientRegularizationState]:
        _checks.check_not_inside_multi_steps()
        if params is None:
            raise ValueError(
                "Gradient regularization perturbs the parameters and needs them: "
                "tx.update(grads, opt_state, params, value_fn=loss_fn)."
            )
        if not isinstance(state, GradientRegularizationState):
            raise TypeError(
                f"The optimizer state has {type(state).__name__} where GradientRegularizationState "
                f"should be. A checkpoint has to be restored into the structure of tx.init(params)."
            )
        loss_fn = _loss.closure(value_fn, extra_args, has_aux)
        parts = _parts.Parts(mask, params)
        grads = parts.divide(updates)

        def loss(perturbed: Arrays, unperturbed: Arrays) -> tuple[jax.Array, Any]:
            return loss_fn(parts.unite(perturbed, unperturbed))

        point = parts.divide(params)
        zeros = [_zero(g, w) for g, w in zip(grads[1], point[1], strict=True)]

        def ascend(g: Arrays) -> tuple[Arrays, Any]:
            found, direction_state = ascent.update(
                parts.unite(g, zeros), state.direction_state, params, **extra_args
            )
            return parts.divide(found)[0], direction_state

        radius, weight = _at_step("r", r, state.step), _at_step("alpha", alpha, state.step)
        if curvature == "exact":
            product = _perturbation.hessian_product(loss, point, scope)
            second_pass = _perturbation.extrapolation(product, point[0], grads, radius, weight)
        else:
            typed = _perturbation.typed(loss, point, perturb_dtype)

            def gradient_at(
                moved: Arrays, others: Arrays
            ) -> tuple[jax.Array, _perturbation.Gradient]:
                return _perturbation.gradient(typed, (moved, others), scope)

            second_pass = _perturbation.finite_difference(
                gradient_at, point, grads, radius, weight, perturb_dtype
            )

        def observe(second: _perturbation.SecondPass | None) -> _report.Report:
            return _report.report(grads, point[0], second) if second else _report.not_run(updates)

        regularized, direction_state, report = _perturbation.regularize(
            grads,
            ascend=ascend,
            second_pass=second_pass,
            observe=observe,
            alpha=weight,
        )
        step = jnp.asarray(optax.safe_increment(state.step))
        return parts.unite(*regularized), GradientRegularizationState(
            step, direction_state, *report
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _at_step(name: str, value: optax.ScalarOrSchedule, step: jax.Array) -> Any:
    if not callable(value):
        return value
    scheduled = value(step)
    _checks.check_scalar(f"{name}(step)", scheduled)
    return scheduled


def _zero(g: Any, w: Any) -> jax.Array:
    # The gradient of an integer leaf is of type float0, or missing.
    has_gradient = _numerics.is_inexact(w) and g is not None
    return jnp.zeros(jnp.shape(w), jnp.result_type(g if has_gradient else w))
