"""The composable form: the transformation that turns the gradient into the regularized one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnp_optax import _functional
from gnp_optax._core import (
    checks,
    losses,
    mixing,
    numerics,
    perturbation,
    report,
    selection,
    strength,
)
from gnp_optax._core.options import Curvature, Scope
from gnp_optax._core.perturbation import Arrays, Gradient
from gnp_optax._core.selection import Mask

PyTree = Any


class GradientRegularizationState(NamedTuple):
    """State of every transformation here; its layout depends on nothing but `direction`.

    Attributes:
        step: Number of updates so far, int32; the step at which schedules are read.
        direction_state: State of `direction`.
        grad_norm: `||g||` over all leaves.
        perturbation_norm: Norm of the change that happened to the parameters, after rounding.
        perturbed_loss: `L(theta + eps)`.
        cosine: Cosine between g and g~ over the leaves that receive g~; 0 where one of them is 0.
        perturbed: Whether the last update ran a second pass. Where it did not, the three before it
            are 0, 0 and 1.

    All but the first two are of the last update; norms, loss and cosine are float32. In a state
    that a version without `perturbed` has saved, it is False until the next update: a pickled one
    loads as it is; where fields are restored by name, add `perturbed=np.False_` to them.
    """

    step: jax.Array
    direction_state: PyTree
    grad_norm: jax.Array
    perturbation_norm: jax.Array
    perturbed_loss: jax.Array
    cosine: jax.Array
    perturbed: jax.Array | np.bool_ = np.False_


# The public home, which is also where a pickled optimizer state looks for it.
GradientRegularizationState.__module__ = "gnp_optax"


def gradient_regularization(
    r: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule | None = None,
    *,
    lam: optax.ScalarOrSchedule | None = None,
    direction: optax.GradientTransformation | None = None,
    mask: Mask = None,
    scope: Scope = "all",
    curvature: Curvature = "finite_difference",
    perturb_dtype: jax.typing.DTypeLike | None = None,
    surrogate_gap: float | None = None,
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

    What another order means tells `gnp.diagnostics.check_step(tx, loss_fn, params, *batch)`, which
    runs a step and says what it did.

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
        lam: The weight of the penalty, lambda, in place of alpha: `alpha = lam / r` at every step,
            and 0 where r is 0. A number or a schedule. With `r_warmup` it stays, and alpha is large
            while r is small; for a lambda that grows with r give alpha.
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
        surrogate_gap: Take `g~ - a (g - <u, g> u)`, `u = g~ / ||g~||`, for g~, with a this weight:
            GSAM's gradient, of the perturbed loss and of its gap to the loss. Not negative. The
            norms are over the leaves that receive g~.
        has_aux: Whether `value_fn` returns `(loss, aux)`; aux is dropped.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError: From `update`, if `value_fn` is missing or does not return a real scalar; if an
            argument is of the wrong type, a schedule of the other number among them; if both alpha
            and lam are given, or neither.
        ValueError: If a number is negative; if the mask or the gradient does not fit the
            parameters, or the mask selects nothing; if a wrapper such as `optax.masked` has taken
            parameters away, or `optax.MultiSteps` is wrapped around.

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
    options = _functional.resolve(
        direction, mask, scope, curvature, perturb_dtype, has_aux, surrogate_gap
    )
    strength.check_radius("r", r)
    alpha = strength.weight(r, alpha, lam)
    ascent = optax.with_extra_args_support(options.direction)

    def init_fn(params: optax.Params) -> GradientRegularizationState:
        checks.check_not_inside_multi_steps()
        # `optax.tree.map_params` calls `init` with a placeholder that has no leaves.
        if jax.tree.leaves(params):
            selection.selected_leaves(options.mask, params)
        step = jnp.zeros([], jnp.int32)
        return GradientRegularizationState(step, ascent.init(params), *report.empty())

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientRegularizationState]:
        state = _checked(state, params)
        loss_fn = losses.closure(value_fn, extra_args, options.has_aux)
        parts = selection.Parts(options.mask, params)
        g, point = parts.divide(updates), parts.divide(params)
        radius = strength.at("r", r, state.step)
        weight = strength.at("alpha", alpha, state.step)

        def loss(perturbed: Arrays, unperturbed: Arrays) -> tuple[jax.Array, Any]:
            return loss_fn(parts.unite(perturbed, unperturbed))

        def ascend() -> tuple[Arrays, optax.OptState]:
            zeros = [_zero(g, w) for g, w in zip(g[1], point[1], strict=True)]
            filled = parts.unite(g[0], zeros)
            found, moved = ascent.update(filled, state.direction_state, params, **extra_args)
            return parts.divide(found)[0], moved

        norm = report.grad_norm(g)
        second_gradient = perturbation.second_gradient(loss, point, options)

        def mixed() -> tuple[Gradient, optax.OptState, report.Report]:
            direction, direction_state = ascend()
            second = second_gradient(g, direction, radius)  # at theta + r d
            # (1 - alpha) g + alpha g~
            g_reg = mixing.mixture(g, second, radius, weight, options.surrogate_gap)
            return g_reg, direction_state, report.of(g, norm, point[0], second)

        def plain() -> tuple[Gradient, optax.OptState, report.Report]:
            # The state of a direction sees every gradient; of one without state, nothing remains.
            return g, ascend()[1], report.not_run(norm)

        g_reg, direction_state, seen = mixing.unless_zero(weight, mixed, plain)
        step = jnp.asarray(optax.safe_increment(state.step))
        return parts.unite(*g_reg), GradientRegularizationState(step, direction_state, *seen)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checked(state: Any, params: Any) -> GradientRegularizationState:
    """Return the state, or raise for what can't be updated."""
    checks.check_not_inside_multi_steps()
    if params is None:
        raise ValueError(
            "Gradient regularization perturbs the parameters and needs them: "
            "tx.update(grads, opt_state, params, value_fn=loss_fn)."
        )
    if not isinstance(state, GradientRegularizationState):
        raise TypeError(
            f"The optimizer state has {type(state).__name__} where GradientRegularizationState "
            f"should be. The order is tx.update(grads, opt_state, params, value_fn=loss_fn). A "
            f"checkpoint has to be restored into the structure of tx.init(params)."
        )
    return state


def _zero(g: Any, w: Any) -> jax.Array:
    # The gradient of an integer leaf is of type float0, or missing.
    has_gradient = numerics.is_inexact(w) and g is not None
    return jnp.zeros(jnp.shape(w), jnp.result_type(g if has_gradient else w))
