"""The norm of each layer's gradient, and which layers have the largest."""

from typing import Any

import jax
import numpy as np

from gnp_optax import _checks, _numerics, _paths

PyTree = Any


def layer_norms(grads: PyTree) -> dict[str, jax.Array]:
    """Return the norm of every layer's gradient, by name, in the order of the parameters."""
    by_layer: dict[str, list[jax.Array]] = {}
    for path, leaf in zip(_paths.leaf_paths(grads), jax.tree.leaves(grads), strict=True):
        if _numerics.is_inexact(leaf):
            by_layer.setdefault(_paths.layer_of(path), []).append(leaf)
    return dict(zip(by_layer, _norms(list(by_layer.values())), strict=True))


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
        raise ValueError(f"These layers' gradients are not finite: {_checks.listed(broken)}.")
    return sorted(scores, key=lambda name: scores[name], reverse=True)


@jax.jit
def _norms(layers: list[list[jax.Array]]) -> list[jax.Array]:
    return [_numerics.norm(leaves) for leaves in layers]
