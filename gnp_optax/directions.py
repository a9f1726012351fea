"""Directions of ascent: how the perturbation follows from the gradient.

A direction is an `optax.GradientTransformation` from the gradient (and the parameters) to the
ascent direction d, so that the perturbation is `eps = r * d`. Any Optax transformation can serve,
`optax.chain(optax.trace(0.9), gnp.directions.normalized())` for one. Leaves that are not perturbed
come in as zeros, and what comes out for them is not used.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp_optax._core import checks, numerics, paths

__all__ = ["adaptive", "friendly", "normalized", "per_layer", "sign", "unnormalized"]


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

    def direction(g: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        total = numerics.norm(jax.tree.leaves(g))
        return numerics.divide(jax.tree.map(jnp.conj, g), total)

    return _stateless(direction)


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

    @numerics.promoting
    def direction(g: optax.Updates, params: optax.Params | None) -> optax.Updates:
        if params is None:
            raise ValueError(
                "directions.adaptive scales by the parameters: pass them, update(g, state, params)."
            )

        def magnitude(w: jax.Array) -> jax.Array:
            w = numerics.widen(w)
            return (jnp.abs(w) + eta).astype(numerics.real(w.dtype))

        t = jax.tree.map(magnitude, params)
        scaled = jax.tree.map(lambda g, t: t * jnp.conj(g), g, t)
        total = numerics.norm(jax.tree.leaves(scaled))
        return numerics.divide(jax.tree.map(jnp.multiply, t, scaled), total)

    return _stateless(direction)


def unnormalized() -> optax.GradientTransformation:
    """Ascend along the gradient as it is: `d = g`, for complex leaves its conjugate.

    The perturbation `eps = r g` then grows with the gradient and vanishes where it does, and
    `(1 - alpha) g + alpha g~` is the gradient of `L + lambda/2 ||grad L||^2` to first order in r,
    with `lambda = alpha r`. Used so without normalization: USAM, and GR in reinforcement learning
    from rewards, with r about 1e-3 and alpha from 1 to 30.

    Returns:
        A stateless transformation.

    Example:
        >>> direction = unnormalized()
        >>> gradient = jnp.array([3.0, 4.0])
        >>> direction.update(gradient, direction.init(gradient))[0].tolist()
        [3.0, 4.0]

    References:
        Andriushchenko and Flammarion, "Towards Understanding Sharpness-Aware Minimization", ICML
        2022; for reinforcement learning arXiv 2602.18037.
    """

    def direction(g: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree.map(_ascent, g)

    return _stateless(direction)


def per_layer() -> optax.GradientTransformation:
    """Ascend in every layer by the same distance: `d_l = g_l / ||g_l||`.

    A layer is a module's own parameters, the leaves that share a path up to the last `/`, as in
    `gnp.masks.top_k_layers`. With one norm over all layers, those of small gradients hardly move.
    Of n perturbed layers `||d|| = sqrt(n)`, so that the radius is that of one layer. Layers that a
    leaf stacks for `lax.scan` count as one, and so do arrays side by side in a list.

    Returns:
        A stateless transformation.

    Example:
        >>> direction = per_layer()
        >>> gradient = {"body": {"w": jnp.array([30.0, 40.0])}, "head": {"w": jnp.array([0.5])}}
        >>> d, _ = direction.update(gradient, direction.init(gradient))
        >>> [[round(float(x), 4) for x in leaf] for leaf in jax.tree.leaves(d)]
        [[0.6, 0.8], [1.0]]

    References:
        Normalized by layer as the steps of You et al., "Large Batch Training of Convolutional
        Networks", 2017, are.
    """

    def direction(g: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        leaves, structure = jax.tree.flatten(g)
        owners = [paths.layer_of(path) for path in paths.leaf_paths(g)]
        norms = {
            layer: numerics.norm([x for x, own in zip(leaves, owners, strict=True) if own == layer])
            for layer in dict.fromkeys(owners)
        }
        pairs = zip(leaves, owners, strict=True)
        found = [numerics.divide(_ascent(x), norms[layer]) for x, layer in pairs]
        return jax.tree.unflatten(structure, found)

    return _stateless(direction)


def sign() -> optax.GradientTransformation:
    """Ascend along the signs of the gradient, by the same distance in every weight.

    `d = sign(g)`, the worst perturbation in a ball of the maximum norm, to first order: every
    weight moves by r at most, as where weights are rounded to a grid of the spacing `2 r`. `||d||`
    is the square root of the number of weights, so that r is far smaller than SAM's. For complex
    leaves `d = conj(g) / abs(g)`. A weight without gradient does not move.

    Returns:
        A stateless transformation.

    Example:
        >>> direction = sign()
        >>> gradient = jnp.array([3.0, 0.0, -0.1])
        >>> direction.update(gradient, direction.init(gradient))[0].tolist()
        [1.0, 0.0, -1.0]

    References:
        Foret et al., "Sharpness-Aware Minimization", ICLR 2021, equation 2 with p = infinity;
        Alizadeh et al., "Gradient l1 Regularization for Quantization Robustness", ICLR 2020.
    """

    def direction(g: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree.map(lambda x: jnp.sign(_ascent(x)), g)

    return _stateless(direction)


class FriendlyState(NamedTuple):
    """State of `friendly`.

    Attributes:
        step: Number of gradients so far, int32.
        mean: Their running mean m, in float32 or wider.
    """

    step: jax.Array
    mean: Any


FriendlyState.__module__ = "gnp_optax.directions"


def friendly(sigma: float = 1.0, decay: float = 0.9) -> optax.GradientTransformation:
    """Ascend along what is particular to the batch, as Friendly-SAM does.

        v_t = g_t - sigma m_{t-1},   d_t = v_t / ||v_t||
        m_t = decay m_{t-1} + (1 - decay) g_t,   m_0 = g_0

    The running mean m stands for the gradient of the whole data set, along which to ascend is held
    to be what harms. The first step ascends along the gradient. Since the direction has a state, it
    is for transformations, not for `gnp.value_and_grad`; it costs a copy of the parameters.

    Args:
        sigma: How much of the mean is taken away. Not negative; 0 is `normalized`.
        decay: Share of the mean that is kept, in [0, 1); the paper's lambda.

    Returns:
        A transformation whose state is a `FriendlyState`.

    Raises:
        ValueError: If `sigma` is negative or `decay` not in [0, 1).

    Example:
        >>> direction = friendly(sigma=1.0, decay=0.5)
        >>> state = direction.init(jnp.zeros(2))
        >>> _, state = direction.update(jnp.array([3.0, 0.0]), state)
        >>> direction.update(jnp.array([6.0, 4.0]), state)[0].tolist()     # (6, 4) - (3, 0)
        [0.6000000238418579, 0.800000011920929]

    References:
        Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024, algorithm 1; like the
        authors' code, with the mean of the steps before.
    """
    checks.check_scalar("sigma", sigma)
    checks.check_share("decay", decay)

    def init_fn(params: optax.Params) -> FriendlyState:
        mean = jax.tree.map(lambda w: jnp.zeros_like(w, numerics.wide(jnp.result_type(w))), params)
        return FriendlyState(jnp.zeros([], jnp.int32), mean)

    @numerics.promoting
    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, FriendlyState]:
        del params
        before: Any = state
        own = jax.tree.map(lambda g, m: _ascent(g) - sigma * jnp.conj(m), updates, before.mean)
        direction = numerics.divide(own, numerics.norm(jax.tree.leaves(own)))

        def mean(m: jax.Array, g: jax.Array) -> jax.Array:
            g = numerics.widen(g)
            return jnp.where(before.step == 0, g, decay * m + (1 - decay) * g).astype(m.dtype)

        step = jnp.asarray(optax.safe_increment(before.step))
        return direction, FriendlyState(step, jax.tree.map(mean, before.mean, updates))

    return optax.GradientTransformation(init_fn, update_fn)


_Direction = Callable[[optax.Updates, optax.Params | None], optax.Updates]


def _stateless(direction: _Direction) -> optax.GradientTransformation:
    def init_fn(params: optax.Params) -> optax.OptState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return direction(updates, params), state

    return optax.GradientTransformation(init_fn, update_fn)


def _ascent(g: jax.Array) -> jax.Array:
    # `jax.grad` returns the conjugate of the direction of steepest ascent.
    return jnp.conj(numerics.widen(g))


def __dir__() -> list[str]:
    return __all__
