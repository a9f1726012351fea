"""The layers of largest gradient norm."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gnp_optax._core import checks, numerics, paths
from gnp_optax.masks._kinds import layers

PyTree = Any


def top_k_layers(
    grads: PyTree,
    k: int | None,
    *,
    budget: float | None = None,
    cost: Callable[[Callable[[PyTree], PyTree]], float] | None = None,
) -> Callable[[PyTree], PyTree]:
    """Select the layers whose gradients have the largest norm, k of them or what a budget buys.

    A layer is a module's own parameters: the leaves that share a path up to the last `/`, such as
    a kernel and its bias. Its score is `||grad_l L||`, the Euclidean norm over those leaves. Call
    it outside `jit`, every epoch or so, and give the result to a jitted step as a static argument.

    With a budget, the layers are gone through from the largest norm to the smallest, and each is
    taken with which the cost stays within the budget. "At most 1.2 gradients a step":

        top_k_layers(grads, k=8, budget=1.2,
                     cost=lambda mask: gnp.masks.cost(loss_fn, params, mask, x, y))

    Args:
        grads: Gradient with respect to all parameters; concrete arrays.
        k: Number of layers, from 1 to the number of layers; with a budget it is the largest number,
            and `None` means as many as fit.
        budget: Largest cost of a step in ordinary gradients, more than 1.
        cost: From a mask to its cost: `gnp.masks.cost`, or a time measured. It is called for every
            layer that is considered.

    Returns:
        The mask `layers(...)` of their names: hashable, and equal whenever the same layers are
        selected.

    Raises:
        TypeError: If `grads` is traced: the selection has to be known when a step is compiled; or a
            module.
        ValueError: If there are fewer than `k` layers, or a layer's gradient is not finite; if no
            layer fits into the budget.

    Example:
        >>> import jax.numpy as jnp
        >>> grads = {"body": {"w": jnp.ones(3)}, "head": {"w": jnp.ones(3), "b": jnp.ones(1)}}
        >>> mask = top_k_layers(grads, 1)
        >>> mask
        layers('head')
        >>> mask(grads)
        {'body': {'w': False}, 'head': {'b': True, 'w': True}}

    References:
        Lee, "Layer-wise Adaptive Gradient Norm Penalizing Method for Efficient and Accurate Deep
        Learning", KDD 2024.
    """
    _check_budget(k, budget, cost)
    ranked = layers_by_norm(grads)
    k = len(ranked) if k is None else k
    if k > len(ranked):
        raise ValueError(
            f"k={k} layers were asked for, but the gradient has {len(ranked)}: "
            f"{checks.listed(sorted(ranked))}."
        )
    if budget is None or cost is None:
        return layers(*ranked[:k])
    taken: list[str] = []
    for name in ranked:
        if len(taken) < k and cost(layers(*taken, name)) <= budget:
            taken.append(name)
    if not taken:
        cheapest = min((float(cost(layers(name))), name) for name in ranked)
        raise ValueError(
            f"No layer fits into budget={budget}. The cheapest is {cheapest[1]!r}, which costs "
            f"{cheapest[0]:.3f} gradients a step."
        )
    return layers(*taken)


def _check_budget(k: int | None, budget: float | None, cost: Any) -> None:
    if (budget is None) != (cost is None):
        raise ValueError(
            "budget and cost belong together: top_k_layers(grads, k, budget=1.2, "
            "cost=lambda mask: gnp.masks.cost(loss_fn, params, mask, *batch))."
        )
    if k is not None:
        checks.check_integer("k", k, at_least=1)
    elif budget is None:
        raise ValueError("k=None, as many layers as fit, needs a budget.")
    if budget is not None and not budget > 1:
        raise ValueError(f"budget must be more than 1, the ordinary gradient, got {budget!r}.")
    if cost is not None and not callable(cost):
        raise TypeError(f"cost must be a function from a mask to its cost, got {cost!r}.")


def layer_norms(grads: PyTree) -> dict[str, jax.Array]:
    """Return the norm of every layer's gradient, by name, in the order of the parameters."""
    checks.check_parameters(grads)
    by_layer = leaves_by_layer(grads)
    return dict(zip(by_layer, _norms(list(by_layer.values())), strict=True))


def leaves_by_layer(tree: PyTree) -> dict[str, list[jax.Array]]:
    """Return the leaves of every layer that can be differentiated, by its name."""
    by_layer: dict[str, list[jax.Array]] = {}
    for path, leaf in zip(paths.leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        if numerics.is_inexact(leaf):
            by_layer.setdefault(paths.layer_of(path), []).append(leaf)
    return by_layer


def layers_by_norm(grads: PyTree) -> list[str]:
    """Return the names of the layers, the one with the largest gradient first."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(grads)):
        raise TypeError(
            "top_k_layers was called with traced gradients. Which layers are perturbed has to be "
            "known when the step is compiled: compute the gradients in a jitted function, call "
            "top_k_layers outside it, and pass the mask as a static argument: "
            "jax.jit(step, static_argnames='mask')."
        )
    norms = layer_norms(grads)
    scores = dict(zip(norms, jax.device_get(list(norms.values())), strict=True))
    broken = [name for name, score in scores.items() if not np.isfinite(score)]
    if broken:
        raise ValueError(f"These layers' gradients are not finite: {checks.listed(broken)}.")
    return sorted(scores, key=lambda name: scores[name], reverse=True)


@jax.jit
def _norms(layers: list[list[jax.Array]]) -> list[jax.Array]:
    return [numerics.norm(leaves) for leaves in layers]
