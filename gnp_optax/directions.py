"""Directions of ascent: how the perturbation follows from the gradient.

A direction is an `optax.GradientTransformation` from the gradient (and the parameters) to the
ascent direction d, so that the perturbation is `eps = r * d`. Any Optax transformation can serve,
`optax.chain(optax.trace(0.9), gnp.directions.normalized())` for one. Leaves that are not perturbed
come in as zeros, and what comes out for them is not used.
"""

import jax
import jax.numpy as jnp
import optax

from gnp_optax._core import checks, numerics

__all__ = ["adaptive", "normalized"]


def normalized() -> optax.GradientTransformation:
    """Ascend along the gradient, scaled to norm 1.

    `d = g / ||g||`, with one Euclidean norm over all perturbed leaves, in float32 or wider. A zero
    gradient gives a zero direction. For complex leaves `d = conj(g) / ||g||`, since `jax.grad`
    returns the conjugate of the direction of steepest ascent.

    Returns:
        A stateless transformation; the default `direction` everywhere in this package.

    Example:
        >>> direction = normalized()
        >>> gradient = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
        >>> d, _ = direction.update(gradient, direction.init(gradient))
        >>> {name: leaf.tolist() for name, leaf in d.items()}
        {'b': 0.800000011920929, 'w': [0.6000000238418579, 0.0]}

    References:
        Foret et al., "Sharpness-Aware Minimization", ICLR 2021, equation 2 with p = 2.
    """

    def init_fn(params: optax.Params) -> optax.OptState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        total = numerics.norm(jax.tree.leaves(updates))
        return numerics.divide(jax.tree.map(jnp.conj, updates), total), state

    return optax.GradientTransformation(init_fn, update_fn)


def adaptive(eta: float = 0.01) -> optax.GradientTransformation:
    """Ascend along the gradient in the geometry of the parameters' own magnitudes, as ASAM does.

    `d = T^2 g / ||T g||` with `T = abs(w) + eta`, elementwise and on every perturbed leaf. The
    perturbation then does not change when a layer is scaled up and the next one down. (The authors'
    code takes `T = 1` for biases; use a mask such as `gnp.masks.matrices()` to leave them out.)

    Args:
        eta: Added to the magnitudes, so that a parameter at 0 can move. Not negative.

    Returns:
        A stateless transformation, for the `direction` of `gradient_regularization`.

    Raises:
        ValueError: If `eta` is negative, or `update` is called without `params`.

    Example:
        >>> direction = adaptive(eta=0.0)
        >>> params, gradient = jnp.array([1.0, 2.0]), jnp.array([3.0, 2.0])
        >>> d, _ = direction.update(gradient, direction.init(params), params)
        >>> d.tolist()  # T g = (3, 4), of norm 5
        [0.6000000238418579, 1.600000023841858]

    References:
        Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021, equation 6.
    """
    checks.check_scalar("eta", eta)

    def init_fn(params: optax.Params) -> optax.OptState:
        del params
        return optax.EmptyState()

    @numerics.promoting
    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError(
                "directions.adaptive scales by the parameters: pass them, update(g, state, params)."
            )

        def magnitude(w: jax.Array) -> jax.Array:
            w = numerics.widen(w)
            return (jnp.abs(w) + eta).astype(numerics.real(w.dtype))

        t = jax.tree.map(magnitude, params)
        scaled = jax.tree.map(lambda g, t: t * jnp.conj(g), updates, t)
        total = numerics.norm(jax.tree.leaves(scaled))
        return numerics.divide(jax.tree.map(jnp.multiply, t, scaled), total), state

    return optax.GradientTransformation(init_fn, update_fn)


def __dir__() -> list[str]:
    return __all__
