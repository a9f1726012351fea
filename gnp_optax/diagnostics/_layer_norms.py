"""The norm of the gradient, layer by layer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gnp_optax._core import numerics, selection
from gnp_optax.diagnostics import _dataset
from gnp_optax.masks import _ranking

PyTree = Any


class LayerNorms(NamedTuple):
    """The paths of the layers, and the norms of their gradients, (layers,)."""

    paths: tuple[str, ...]
    norms: jax.Array


def layer_gradient_norms(
    fun: Callable[..., Any],
    params: PyTree,
    *args: Any,
    mask: selection.Mask = None,
    batch_size: int | None = None,
    has_aux: bool = False,
    progress: bool = False,
) -> LayerNorms:
    """Compute the norm of every layer's gradient, by which `gnp.masks.top_k_layers` selects.

    A layer is a module's own parameters: the leaves that share a path up to the last `/`.

    Args:
        fun: Loss `fun(params, *args)`, a mean over examples; or `(loss, aux)` with `has_aux`.
        params: The parameters, sharded as they are trained.
        *args: Further arguments of `fun`, such as inputs and labels.
        mask: Which leaves; layers without one are left out.
        batch_size: Number of examples that are computed at a time; `None` for all. The gradient is
            that of all examples in any case.
        has_aux: Whether `fun` returns `(loss, aux)`.
        progress: Whether to show a bar, which counts batches.

    Returns:
        `LayerNorms(paths, norms)` in the order of the parameters.

    Raises:
        TypeError: If `fun` does not return a real scalar, or an argument is of the wrong type.
        ValueError: If the mask selects nothing; if the arguments cannot be split.

    Example:
        >>> loss = lambda p: jnp.sum(p["body"]["w"] ** 2) / 2 + p["head"]["b"]
        >>> params = {"body": {"w": jnp.array([3.0, 4.0])}, "head": {"b": jnp.array(1.0)}}
        >>> found = layer_gradient_norms(loss, params)
        >>> found.paths, found.norms.tolist()
        (('body', 'head'), [5.0, 1.0])

    References:
        Lee, "Layer-wise Adaptive Gradient Norm Penalizing Method for Efficient and Accurate Deep
        Learning", KDD 2024.
    """
    norms = _dataset.measure(
        "layer_gradient_norms",
        _norms,
        fun,
        params,
        args,
        mask=mask,
        batch_size=batch_size,
        has_aux=has_aux,
        progress=progress,
        passes=1,
    )
    kept = _kept(params, selection.selected_leaves(mask, params))
    return LayerNorms(tuple(_ranking.leaves_by_layer(kept)), norms)


@numerics.promoting
def norms_by_layer(grads: PyTree) -> LayerNorms:
    """Compute the norm of every layer of a gradient that is already there.

    Args:
        grads: Gradient with respect to the parameters.

    Returns:
        `LayerNorms(paths, norms)` in the order of the parameters. Under `jit` return the norms
        alone: paths are strings, which no compiled function returns.

    Raises:
        ValueError: If there is no gradient.

    Example:
        >>> found = norms_by_layer({"head": {"w": jnp.array([3.0]), "b": jnp.array([4.0])}})
        >>> found.paths, found.norms.tolist()
        (('head',), [5.0])
    """
    norms = _ranking.layer_norms(grads)
    if not norms:
        raise ValueError("There is no gradient: none of the leaves is floating point or complex.")
    return LayerNorms(tuple(norms), jnp.stack(list(norms.values())))


@functools.partial(jax.jit, static_argnums=0)
def _norms(
    objective: _dataset.Objective, bar: jax.Array | None, params: PyTree, args: PyTree
) -> jax.Array:
    losses = _dataset.Losses(objective, bar, params, args)
    grads = losses.filled(losses.value_and_grad(losses.perturbed)[1])
    return norms_by_layer(_kept(grads, objective.layout.selected)).norms


def _kept(tree: PyTree, selected: Sequence[Any]) -> PyTree:
    """Return a tree with None, which is no leaf, for what is not selected."""
    leaves, structure = jax.tree.flatten(tree)
    kept = [x if s is not False else None for x, s in zip(leaves, selected, strict=True)]
    return jax.tree.unflatten(structure, kept)
