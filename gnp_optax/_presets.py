"""Points in the space of `gradient_regularization` that have names: SAM, ASAM, layer-wise GR."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import optax

from gnp_optax import directions
from gnp_optax._core import strength
from gnp_optax._core.options import Curvature, Scope
from gnp_optax._core.selection import Mask
from gnp_optax._transformation import gradient_regularization

P = ParamSpec("P")
T = TypeVar("T")


def _not_as_in_optax(fun: Callable[P, T]) -> Callable[P, T]:
    """Say what to write instead, where `fun` is called as `optax.contrib.sam` is."""
    names = inspect.signature(optax.contrib.sam).parameters.keys()

    @functools.wraps(fun)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        is_first = isinstance(next(iter(args), None), optax.GradientTransformation)
        if is_first or names & kwargs.keys():
            raise TypeError(
                "gnp.sam is not called as optax.contrib.sam is: it takes the radius, and stands "
                "before the optimizer. In place of optax.contrib.sam(optimizer, optax.chain("
                "optax.contrib.normalize(), optax.sgd(0.1))) write "
                "optax.chain(gnp.sam(rho=0.1), optimizer), and in every step "
                "tx.update(grads, opt_state, params, value_fn=loss_fn). Without normalize() it was "
                "gnp.sam(rho=0.1, direction=gnp.directions.unnormalized())."
            )
        return fun(*args, **kwargs)

    return checked


@_not_as_in_optax
def sam(
    rho: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule | None = None,
    *,
    direction: optax.GradientTransformation | None = None,
    mask: Mask = None,
    scope: Scope = "all",
    perturb_dtype: jax.typing.DTypeLike | None = None,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Minimize the sharpness of the loss: sharpness-aware minimization, SAM.

    `g_reg = grad L(theta + rho g / ||g||)`, which is `gradient_regularization` with `r = rho` and
    `alpha = 1`. Two gradients a step, and one where a schedule makes alpha 0:

        gnp.sam(rho=0.1, alpha=gnp.schedules.zero_warmup(1.0, 1000))

    `optax.contrib.sam` is wrapped around the optimizer; this stands before it. How to go from one
    to the other is in `notebooks/recipes.ipynb`.

    Args:
        rho: Radius of the perturbation, in the units of the parameters; a number or a schedule.
        alpha: Weight of the perturbed gradient; a number or a schedule. By default 1, which is SAM.
        direction: As in `gradient_regularization`.
        mask: As in `gradient_regularization`.
        scope: As in `gradient_regularization`.
        perturb_dtype: As in `gradient_regularization`.
        has_aux: As in `gradient_regularization`.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError, ValueError: As `gradient_regularization`.

    Example:
        >>> import jax, jax.numpy as jnp
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
    return gradient_regularization(
        rho,
        _weight(rho, alpha),
        direction=direction,
        mask=mask,
        scope=scope,
        perturb_dtype=perturb_dtype,
        has_aux=has_aux,
    )


def asam(
    rho: optax.ScalarOrSchedule,
    eta: float = 0.01,
    *,
    alpha: optax.ScalarOrSchedule | None = None,
    mask: Mask = None,
    scope: Scope = "all",
    perturb_dtype: jax.typing.DTypeLike | None = None,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Minimize sharpness in the geometry of the parameters' magnitudes: adaptive SAM.

    `g_reg = grad L(theta + rho T^2 g / ||T g||)` with `T = abs(theta) + eta`: SAM with
    `gnp.directions.adaptive(eta)`. The authors use radii about ten times those of SAM.

    Args:
        rho: Radius of the perturbation, relative to the parameters; a number or a schedule.
        eta: Added to the magnitudes, so that a parameter at 0 can move.
        alpha: As in `sam`.
        mask: As in `gradient_regularization`.
        scope: As in `gradient_regularization`.
        perturb_dtype: As in `gradient_regularization`.
        has_aux: As in `gradient_regularization`.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError, ValueError: As `gradient_regularization`; if `eta` is negative.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loss = lambda x: jnp.sum(x**2) / 2
        >>> params = jnp.array([1.0, 2.0])               # T g = (1, 4) for eta = 0
        >>> tx = asam(rho=17**0.5, eta=0.0)
        >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
        >>> [round(float(u), 4) for u in updates]        # x + T^2 g = (1 + 1, 2 + 8)
        [2.0, 10.0]

    References:
        Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021.
    """
    return sam(
        rho,
        alpha,
        direction=directions.adaptive(eta),
        mask=mask,
        scope=scope,
        perturb_dtype=perturb_dtype,
        has_aux=has_aux,
    )


def gsam(
    rho: optax.ScalarOrSchedule,
    surrogate_gap: float,
    *,
    alpha: optax.ScalarOrSchedule | None = None,
    direction: optax.GradientTransformation | None = None,
    mask: Mask = None,
    scope: Scope = "all",
    perturb_dtype: jax.typing.DTypeLike | None = None,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Minimize the perturbed loss and its gap to the loss: surrogate gap guided SAM, GSAM.

    `g_reg = g~ - a (g - <u, g> u)` with `g~ = grad L(theta + rho g / ||g||)`, `u = g~ / ||g~||` and
    a the weight of the gap: SAM's gradient, less what in g is orthogonal to it. To first order that
    leaves the perturbed loss to fall as with SAM, and lets the loss below it rise towards it.

    Args:
        rho: Radius of the perturbation, in the units of the parameters; a number or a schedule. The
            authors let it follow the learning rate.
        surrogate_gap: The weight a, in the paper alpha: 0.1 to 1. Not negative; 0 is SAM.
        alpha: As in `sam`: the weight of all that takes the place of g.
        direction: As in `gradient_regularization`.
        mask: As in `gradient_regularization`.
        scope: As in `gradient_regularization`.
        perturb_dtype: As in `gradient_regularization`.
        has_aux: As in `gradient_regularization`.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError, ValueError: As `gradient_regularization`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> loss = lambda x: x[0] ** 2 / 2 + x[1]
        >>> params = jnp.array([0.0, 1.0])               # g = (0, 1), g~ too: nothing orthogonal
        >>> tx = gsam(rho=0.5, surrogate_gap=0.4)
        >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
        >>> updates.tolist()
        [0.0, 1.0]

    References:
        Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022,
        algorithm 1.
    """
    return gradient_regularization(
        rho,
        _weight(rho, alpha),
        direction=direction,
        mask=mask,
        scope=scope,
        perturb_dtype=perturb_dtype,
        surrogate_gap=surrogate_gap,
        has_aux=has_aux,
    )


def layerwise_gradient_regularization(
    r: optax.ScalarOrSchedule,
    alpha: optax.ScalarOrSchedule | None = None,
    mask: Mask = None,
    *,
    lam: optax.ScalarOrSchedule | None = None,
    direction: optax.GradientTransformation | None = None,
    scope: Scope = "masked",
    curvature: Curvature = "finite_difference",
    perturb_dtype: jax.typing.DTypeLike | None = None,
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
        lam: As in `gradient_regularization`.
        mask: The layers to penalize: a prefix pytree of Python bools or a callable from the
            parameters to one, such as `gnp.masks.top_k_layers(grads, k)`.
        direction: As in `gradient_regularization`.
        scope: `"masked"`, the paper's rule; `"all"` gives every leaf the gradient of
            `L + lambda ||grad_S L||`.
        curvature: As in `gradient_regularization`.
        perturb_dtype: As in `gradient_regularization`.
        has_aux: As in `gradient_regularization`.

    Returns:
        A transformation whose state is a `GradientRegularizationState`.

    Raises:
        TypeError, ValueError: As `gradient_regularization`; if `mask` is None.

    Example:
        >>> import jax, jax.numpy as jnp
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
            "mask=gnp.masks.by_path('^head') or mask=gnp.masks.top_k_layers(grads, k=4). For all "
            "layers: gnp.gradient_regularization(r, alpha)."
        )
    return gradient_regularization(
        r,
        alpha,
        lam=lam,
        direction=direction,
        mask=mask,
        scope=scope,
        curvature=curvature,
        perturb_dtype=perturb_dtype,
        has_aux=has_aux,
    )


def _weight(
    rho: optax.ScalarOrSchedule, alpha: optax.ScalarOrSchedule | None
) -> optax.ScalarOrSchedule:
    """Check radius and weight by SAM's names for them; the weight is 1 unless another is given."""
    strength.check_radius("rho", rho)
    if alpha is None:
        return 1.0
    strength.check_weight("alpha", alpha, radius="rho")
    return alpha
