"""What each radius would do: how far r reaches, and how far the loss is quadratic."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnp_optax._core import numerics, selection
from gnp_optax._core.perturbation import perturb
from gnp_optax.diagnostics import _dataset, _operands, _sharpness
from gnp_optax.diagnostics._embedding import Embedding

PyTree = Any


class RadiusProfile(NamedTuple):
    """Radii (n,), two scalars at the parameters, and the rest for every radius, (n,).

    Attributes:
        radii: The radii r.
        loss: `L(params)`.
        grad_norm: `||g||`.
        surrogate_gap: Growth of the loss, `L(params + r d) - L(params)`.
        cosine: Cosine between g and g~.
        correction: `||g~ - g|| / ||g||`, how much of the gradient changes.
        curvature: How much of the correction is curvature: `<g~ - g, r H d>` over the larger of
            both squared norms. 1 where the loss is quadratic as far as r; less where it is not, and
            where rounding drowns the correction.
        moved: Share of the weights that the step moves, of those that it should; the others are
            lost in rounding to the parameters' type.
    """

    radii: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    surrogate_gap: jax.Array
    cosine: jax.Array
    correction: jax.Array
    curvature: jax.Array
    moved: jax.Array


def radius_profile(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    radii: jax.typing.ArrayLike,
    direction: optax.GradientTransformation | None = None,
    mask: selection.Mask = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> RadiusProfile:
    """Measure what each of several radii would do, in one compiled program.

    With `g~ = grad L(params + r d)`, `d = g / ||g||` by default, for every r:

        L(params + r d) - L(params)                               # growth of the loss
        <g, g~> / (||g|| ||g~||)                                  # cosine
        ||g~ - g|| / ||g||                                        # the correction
        <g~ - g, r H d> / max(||g~ - g||, ||r H d||)^2            # what of it is curvature
        share of the weights that move                            # in the parameters' type

    A radius at which the correction is a few hundredths does little, whatever `alpha` makes of it.
    One at which less than half of it is curvature penalizes no longer the norm of the gradient at
    the parameters; SAM with such a radius may still train well, as the loss far away has a say. The
    Hessian does not see the kinks of a network of ReLUs, whose share is the larger, the smaller r.
    Measure on a batch as large as those of training, and anew when training has gone on: gradients
    and curvature change by orders of magnitude. `gnp.plots.radius_profile` draws it.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded and in the type in which they are trained.
        *args: Further arguments of `fun`, such as inputs and labels.
        radii: Radii (n,), in the units of the parameters: `jnp.geomspace(0.001, 1, 13)`.
        direction: From the gradient to the ascent direction d, without state, as for `sharpness`.
        mask: Which leaves are perturbed; gradients, curvature and shares are of these.
        batch_size: Number of examples that are computed at a time; `None` for all. Gradients and
            losses are those of all examples in any case.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        The `RadiusProfile`. It takes one gradient, one product of the Hessian with a vector, and
        one gradient for each radius, one after the other.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If the radii are not positive; if `direction` has state; if the mask selects
            nothing; if the arguments cannot be split.

    Example:
        >>> loss = lambda w: jnp.sum(w**2) / 2                   # quadratic: g~ = (1 + r / ||w||) g
        >>> found = radius_profile(loss, jnp.array([3.0, 4.0]), radii=jnp.array([0.05, 0.5]))
        >>> [[round(float(x), 3) for x in xs] for xs in found[3:]]
        [[0.251, 2.625], [1.0, 1.0], [0.01, 0.1], [1.0, 1.0], [1.0, 1.0]]

    References:
        Foret et al., "Sharpness-Aware Minimization", ICLR 2021, section 2; Zhao et al., "Penalizing
        Gradient Norm for Efficiently Improving Generalization in Deep Learning", ICML 2022,
        equation 9: that the correction is curvature.
    """
    radii = _operands.coordinates("radii", radii)
    if not isinstance(radii, jax.core.Tracer) and not _are_positive(np.asarray(radii)):
        raise ValueError(
            f"radii must be positive and finite, such as jnp.geomspace(0.001, 1, 13); got "
            f"{np.asarray(radii).tolist()}."
        )
    found = _dataset.measure(
        "radius_profile",
        functools.partial(_profile, direction=_sharpness.checked_direction(direction)),
        fun,
        params,
        args,
        (radii,),
        mask=mask,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=2 + radii.size,
    )
    return RadiusProfile(radii, *found)


def _are_positive(radii: np.ndarray) -> bool:
    return radii.size > 0 and bool(np.all((radii > 0) & np.isfinite(radii)))


@functools.partial(jax.jit, static_argnums=0, static_argnames="direction")
@numerics.promoting
def _profile(
    objective: _dataset.Objective,
    bar: jax.Array | None,
    params: PyTree,
    args: PyTree,
    radii: jax.Array,
    *,
    direction: optax.GradientTransformation | None,
) -> tuple[jax.Array, ...]:
    losses = _dataset.Losses(objective, bar, params, args)
    loss, grads = losses.value_and_grad(losses.perturbed)
    ascent = _sharpness.ascent(losses, params, grads, direction)
    embedding = Embedding(losses.perturbed, losses.shardings)
    g = embedding.embed(grads)
    # Conjugated, as a gradient is.
    product = embedding.embed([jnp.conj(h) for h in losses.hessian_product(ascent)])
    grad_norm, product_norm = numerics.norm([g]), numerics.norm([product])
    expected = _count(d != 0 for d in ascent)

    def at(r: jax.Array) -> tuple[jax.Array, ...]:
        pairs = zip(losses.perturbed, ascent, strict=True)
        moved = [perturb(w, d, r) for w, d in pairs]
        perturbed_loss, found = losses.value_and_grad(moved)
        tilde = embedding.embed(found)
        correction = tilde - g
        size = numerics.norm([correction])
        larger = jnp.maximum(size, r * product_norm)
        return (
            perturbed_loss - loss,
            _ratio(numerics.product(g, tilde), grad_norm, numerics.norm([tilde])),
            _ratio(size, grad_norm),
            _ratio(r * numerics.product(correction, product), larger, larger),
            _count(v != w for v, w in zip(moved, losses.perturbed, strict=True))
            / jnp.maximum(expected, 1),
        )

    # One after the other: `vmap` would keep as many networks in memory.
    return loss, grad_norm, *jax.lax.map(at, radii)


def _ratio(x: jax.Array, *divisors: jax.Array) -> jax.Array:
    """Return x by the divisors, one after the other; 0 where one is 0."""
    for divisor in divisors:
        x = numerics.divide(x, divisor)
    return x


def _count(flags: Iterable[jax.Array]) -> jax.Array:
    return jnp.asarray(sum(jnp.sum(x) for x in flags))
