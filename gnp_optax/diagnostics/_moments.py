"""What an adaptive optimizer has made of the gradients so far."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gnp_optax._core import numerics

PyTree = Any


class AdaptiveStatistics(NamedTuple):
    """Float32 scalars over all coordinates of the second moment, of which there are n.

    Attributes:
        second_moment_norm: `||v||`.
        learning_rate_mean: Mean of the adaptive learning rate `psi`.
        learning_rate_variance: Variance of `psi` over the coordinates.
        learning_rate_log_variance: Variance of `log psi`, which a few coordinates that have had no
            gradient yet, with their `psi` of `1 / eps`, do not dominate.
    """

    second_moment_norm: jax.Array
    learning_rate_mean: jax.Array
    learning_rate_variance: jax.Array
    learning_rate_log_variance: jax.Array


@numerics.promoting
def adaptive_statistics(
    opt_state: PyTree, *, b2: float = 0.999, eps: float = 1e-8
) -> AdaptiveStatistics:
    """Read the statistics of an adaptive optimizer from its state.

    The optimizer multiplies coordinate i of its update by `psi_i`, the adaptive learning rate. With
    the second moment `v` of Adam after t steps, of RMSProp, and of centered RMSProp with mean `m`:

        psi = 1 / (sqrt(v / (1 - b2^t)) + eps)      # optax.adam, optax.adamw; amsgrad: largest v
        psi = 1 / sqrt(v + eps)                     # optax.rmsprop
        psi = 1 / sqrt(v - m^2 + eps)               # optax.rmsprop(centered=True)

    Early in training few gradients have been seen and the variance of psi is large. Learning-rate
    warmup waits until it has fallen; gradient regularization at that time disturbs it.

    Args:
        opt_state: The state of `optax.adamw`, `optax.rmsprop` or another optimizer that is made of
            the same (`lamb`, `nadam`, `amsgrad`; not `adamax`, whose state looks like Adam's),
            however deep in `optax.chain`, `optax.inject_hyperparams` and other wrappers. Where
            there are several, as in `optax.partition`, the statistics are over the coordinates of
            all.
        b2: Decay of Adam's second moment; RMSProp's is not needed.
        eps: The optimizer's epsilon.

    Returns:
        The statistics. This can be called in a jitted step. Sharded states stay where they are.

    Raises:
        ValueError: If the state has no second moment.
        TypeError: If it has one of another kind.

    Example:
        >>> import optax
        >>> optimizer, params = optax.adam(1e-3), jnp.ones(2)
        >>> _, state = optimizer.update(jnp.array([0.5, 0.25]), optimizer.init(params), params)
        >>> statistics = adaptive_statistics(state)
        >>> round(float(statistics.learning_rate_mean), 3)  # of 2 and 4
        3.0
        >>> round(float(statistics.learning_rate_variance), 3)
        1.0

    References:
        Zhao et al., "When Will Gradient Regularization Be Harmful?", ICML 2024; Liu et al., "On the
        Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, section 3.
    """
    states = [x for x in jax.tree.leaves(opt_state, is_leaf=has_moment) if has_moment(x)]
    unknown = {type(state).__name__ for state in states if not isinstance(state, _KNOWN)}
    if unknown:
        raise TypeError(
            f"How {', '.join(sorted(unknown))} makes learning rates of its second moment is not "
            f"known. Those of adam, adamw, amsgrad and rmsprop (without bias_correction) are."
        )
    moments = [numerics.widen(v) for state in states for v in jax.tree.leaves(state.nu)]
    if not moments:
        raise ValueError(
            "There is no second moment in this state. Pass the state of an adaptive optimizer: "
            "opt_state = optax.adamw(1e-3).init(params), or of a chain that contains one."
        )
    psi = [x for state in states for x in _learning_rates(state, b2, eps)]
    mean, variance = _mean_and_variance(psi, lambda x: x)
    _, log_variance = _mean_and_variance(psi, jnp.log)
    every = (numerics.norm(moments), mean, variance, log_variance)
    return AdaptiveStatistics(*(jnp.asarray(x, jnp.float32) for x in every))


_KNOWN = (
    *(optax.ScaleByAdamState, optax.ScaleByAmsgradState),
    *(optax.ScaleByRmsState, optax.ScaleByRStdDevState),
)


def has_moment(node: Any) -> bool:
    """Tell whether a node of an optimizer's state holds second moments, as Optax names them."""
    return isinstance(node, tuple) and "nu" in getattr(node, "_fields", ())


def _learning_rates(state: Any, b2: float, eps: float) -> list[jax.Array]:
    moments = [numerics.widen(v) for v in jax.tree.leaves(state.nu)]
    if isinstance(state, optax.ScaleByAmsgradState):
        return [1 / (jnp.sqrt(numerics.widen(v)) + eps) for v in jax.tree.leaves(state.nu_max)]
    if isinstance(state, optax.ScaleByAdamState):
        # Before the first step there is nothing to correct.
        correction = 1 - b2 ** jnp.maximum(state.count, 1)
        return [1 / (jnp.sqrt(v / correction) + eps) for v in moments]
    if isinstance(state, optax.ScaleByRStdDevState):
        means = [numerics.widen(m) for m in jax.tree.leaves(state.mu)]
        moments = [jnp.maximum(v - m**2, 0) for v, m in zip(moments, means, strict=True)]
    return [jax.lax.rsqrt(v + eps) for v in moments]


def _mean_and_variance(
    leaves: list[jax.Array], of: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    count = sum(x.size for x in leaves)
    mean = sum(jnp.sum(of(x) / count) for x in leaves)
    return jnp.asarray(mean), jnp.asarray(sum(jnp.sum((of(x) - mean) ** 2 / count) for x in leaves))
