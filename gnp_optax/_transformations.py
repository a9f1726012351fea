"""The composable form: transformations that turn the gradient into the regularized one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp_optax import _checks, _loss, _perturbation, _selection, directions
from gnp_optax._selection import Mask


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
    A step at which alpha is 0 evaluates no second gradient, so a schedule that is 0 costs nothing.
    Call `update` inside the jitted step, where a closure over the batch is traced with it.

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
        has_aux: Whether `value_fn` returns `(loss, aux)`; aux is dropped.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError: From `update`, if `value_fn` is missing or does not return a real scalar; if an
            argument is of the wrong type.
        ValueError: If a number is negative; if the mask selects nothing or does not fit the
            parameters; if a wrapper such as `optax.masked` has taken parameters away.

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
    _checks.check_scope(scope)
    _selection.check_mask(mask)
    direction = directions.normalized() if direction is None else direction
    _checks.check_direction(direction)
    ascent = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> GradientRegularizationState:
        # `optax.tree.map_params` calls `init` with a placeholder that has no leaves.
        if jax.tree.leaves(params):
            _selection.selected_leaves(mask, params)
        return GradientRegularizationState(
            jnp.zeros([], jnp.int32), direction.init(params), *_perturbation.not_run()
        )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        value_fn: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GradientRegularizationState]:
        if params is None:
            raise ValueError(
                "Gradient regularization perturbs the parameters and needs them: "
                "tx.update(grads, opt_state, params, value_fn=loss_fn)."
            )
        assert isinstance(state, GradientRegularizationState)
        regularized, direction_state, report = _perturbation.regularize(
            _loss.closure(value_fn, extra_args, has_aux),
            updates,
            params,
            lambda g: ascent.update(g, state.direction_state, params, **extra_args),
            r=_at_step("r", r, state.step),
            alpha=_at_step("alpha", alpha, state.step),
            mask=mask,
            scope=scope,
        )
        step = jnp.asarray(optax.safe_increment(state.step))
        return regularized, GradientRegularizationState(step, direction_state, *report)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sam(
    rho: optax.ScalarOrSchedule,
    *,
    direction: optax.GradientTransformation | None = None,
    mask: Mask = None,
    scope: str = "all",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Minimize the sharpness of the loss: sharpness-aware minimization, SAM.

    `g_reg = grad L(theta + rho g / ||g||)`, which is `gradient_regularization` with `r = rho` and
    `alpha = 1`. Two gradients a step.

    Args:
        rho: Radius of the perturbation, in the units of the parameters; a number or a schedule.
        direction: As in `gradient_regularization`.
        mask: As in `gradient_regularization`.
        scope: As in `gradient_regularization`.
        has_aux: As in `gradient_regularization`.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError, ValueError: As `gradient_regularization`.

    Example:
        >>> loss = lambda x: jnp.sum(x**2) / 2
        >>> params = jnp.array([3.0, 4.0])
        >>> tx = optax.chain(sam(rho=0.5), optax.sgd(0.1))
        >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
        >>> [round(float(u), 4) for u in updates]
        [-0.33, -0.44]

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        ICLR 2021, algorithm 1.
    """
    _checks.check_scalar_or_schedule("rho", rho)
    return gradient_regularization(
        rho, 1.0, direction=direction, mask=mask, scope=scope, has_aux=has_aux
    )


def asam(
    rho: optax.ScalarOrSchedule,
    eta: float = 0.01,
    *,
    mask: Mask = None,
    scope: str = "all",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Minimize sharpness in the geometry of the parameters' magnitudes: adaptive SAM.

    `g_reg = grad L(theta + rho T^2 g / ||T g||)` with `T = abs(theta) + eta`: SAM with
    `gnp.directions.adaptive(eta)`. The authors use radii about ten times those of SAM.

    Args:
        rho: Radius of the perturbation, relative to the parameters; a number or a schedule.
        eta: Added to the magnitudes, so that a parameter at 0 can move.
        mask: As in `gradient_regularization`.
        scope: As in `gradient_regularization`.
        has_aux: As in `gradient_regularization`.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError, ValueError: As `gradient_regularization`; if `eta` is negative.

    Example:
        >>> loss = lambda x: jnp.sum(x**2) / 2
        >>> params = jnp.array([1.0, 2.0])               # T g = (1, 4) for eta = 0
        >>> tx = asam(rho=17**0.5, eta=0.0)
        >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
        >>> [round(float(u), 4) for u in updates]        # x + T^2 g = (1 + 1, 2 + 8)
        [2.0, 10.0]

    References:
        Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021.
    """
    return sam(rho, direction=directions.adaptive(eta), mask=mask, scope=scope, has_aux=has_aux)


def layerwise_gradient_regularization(
    r: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule,
    mask: Mask,
    *,
    direction: optax.GradientTransformation | None = None,
    scope: str = "masked",
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Penalize the norm of the gradient of a few layers only.

    `gradient_regularization` with a mask and the paper's rule: the layers under the mask get
    `(1 - alpha) g + alpha g~`, with one norm over all of them, and the others keep g. The state
    does not depend on the mask, so it carries over when the layers are selected anew:

        mask = gnp.masks.top_k_layers(grads, k=4)        # every epoch, outside jit

    Args:
        r: As in `gradient_regularization`.
        alpha: As in `gradient_regularization`.
        mask: The layers to penalize: a prefix pytree of Python bools or a callable from the
            parameters to one, such as `gnp.masks.top_k_layers(grads, k)`.
        direction: As in `gradient_regularization`.
        scope: `"masked"`, the paper's rule; `"all"` gives every leaf the gradient of
            `L + lambda ||grad_S L||`.
        has_aux: As in `gradient_regularization`.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError, ValueError: As `gradient_regularization`; if `mask` is None.

    Example:
        >>> loss = lambda p: jnp.sum(p["body"] ** 2 + p["head"] ** 2) / 2
        >>> params = {"body": jnp.array([1.0]), "head": jnp.array([2.0])}
        >>> tx = layerwise_gradient_regularization(0.5, 1.0, mask={"body": False, "head": True})
        >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
        >>> {name: leaf.tolist() for name, leaf in updates.items()}
        {'body': [1.0], 'head': [2.5]}

    References:
        Lee, "Layer-wise Adaptive Gradient Norm Penalizing Method for Efficient and Accurate Deep
        Learning", KDD 2024.
    """
    if mask is None:
        raise ValueError(
            "layerwise_gradient_regularization needs a mask that names layers, such as "
            "gnp.masks.top_k_layers(grads, k=4). For all layers: gnp.gradient_regularization."
        )
    return gradient_regularization(
        r, alpha, direction=direction, mask=mask, scope=scope, has_aux=has_aux
    )


def _at_step(name: str, value: optax.ScalarOrSchedule, step: jax.Array) -> Any:
    if not callable(value):
        return value
    scheduled = value(step)
    _checks.check_scalar(f"{name}(step)", scheduled)
    return scheduled
