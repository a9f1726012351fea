"""Masks: which leaves of the parameters are perturbed.

A mask is `None` (all leaves), a prefix pytree of Python bools (True = perturbed), or a callable
from the parameters to such a pytree. The callables made here are hashable and compare by value, so
that a mask can be a static argument of `jax.jit`: the step is compiled once per distinct selection.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax import _checks, _numerics, _paths, _selection

PyTree = Any


def by_path(regex: str) -> Callable[[PyTree], PyTree]:
    r"""Select the leaves whose path matches a regular expression.

    A leaf's path is its keys joined by `/`, such as `encoder/block_3/attention/kernel`. It is the
    same for linen, NNX, Equinox and plain pytrees: an index below a name is written as linen names
    the items of a list, `blocks_0/kernel`. As in `re.search`, a match anywhere in the path counts;
    anchor with `^` and `$`.

    Args:
        regex: Regular expression, in the syntax of `re`.

    Returns:
        A mask: hashable, equal to every other `by_path` of the same expression.

    Raises:
        ValueError: If `regex` is no regular expression; and later, where the mask is used, if it
            matches no leaf.

    Example:
        >>> params = {"body": [{"w": 1.0}, {"w": 2.0}], "head": {"w": 3.0, "b": 4.0}}
        >>> by_path(r"^head/|_1/")(params)
        {'body': [{'w': False}, {'w': True}], 'head': {'b': True, 'w': True}}
    """
    return _ByPath(regex)


def layers(*paths: str) -> Callable[[PyTree], PyTree]:
    """Select whole layers by name: what `top_k_layers` returns, for a selection known beforehand.

    A layer is a module's own parameters: the leaves that share a path up to the last `/`.

    Args:
        *paths: Paths of modules, such as `"blocks_3/mlp"`; `""` is the outermost module.

    Returns:
        A mask: hashable, equal to every other `layers` of the same paths in whatever order, and
        printed as it is written.

    Raises:
        ValueError: Where the mask is used, if the parameters lack one of the layers.

    Example:
        >>> layers("head")({"body": {"w": 1.0}, "head": {"w": 2.0, "b": 3.0}})
        {'body': {'w': False}, 'head': {'b': True, 'w': True}}
    """
    return _Layers(tuple(sorted(set(paths))))


def matrices() -> Callable[[PyTree], PyTree]:
    """Select the leaves with two or more dimensions: kernels and embeddings, not biases or scales.

    Returns:
        A mask: hashable, equal to every other `matrices()`.

    Example:
        >>> matrices()({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        {'bias': False, 'kernel': True}
    """
    return _Matrices()


def top_k_layers(grads: PyTree, k: int) -> Callable[[PyTree], PyTree]:
    """Select the k layers whose gradients have the largest norm.

    A layer is a module's own parameters: the leaves that share a path up to the last `/`, such as
    a kernel and its bias. Its score is `||grad_l L||`, the Euclidean norm over those leaves. Call
    it outside `jit`, every epoch or so, and give the result to a jitted step as a static argument.

    Args:
        grads: Gradient with respect to all parameters; concrete arrays.
        k: Number of layers, from 1 to the number of layers.

    Returns:
        The mask `layers(...)` of their names: hashable, and equal whenever the same layers are
        selected.

    Raises:
        TypeError: If `grads` is traced: the selection has to be known when a step is compiled.
        ValueError: If there are fewer than `k` layers, or a layer's gradient is not finite.

    Example:
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
    _checks.check_integer("k", k, at_least=1)
    leaves = jax.tree.leaves(grads)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError(
            "top_k_layers was called with traced gradients. Which layers are perturbed has to be "
            "known when the step is compiled: compute the gradients in a jitted function, call "
            "top_k_layers outside it, and pass the mask as a static argument: "
            "jax.jit(step, static_argnames='mask')."
        )
    by_layer: dict[str, list[jax.Array]] = {}
    for path, leaf in zip(_paths.leaf_paths(grads), leaves, strict=True):
        if _numerics.is_inexact(leaf):
            by_layer.setdefault(_paths.layer_of(path), []).append(leaf)
    if k > len(by_layer):
        raise ValueError(
            f"k={k} layers were asked for, but the gradient has {len(by_layer)}: "
            f"{_checks.listed(by_layer)}."
        )
    scores = dict(zip(by_layer, jax.device_get(_norms(list(by_layer.values()))), strict=True))
    broken = [name for name, score in scores.items() if not np.isfinite(score)]
    if broken:
        raise ValueError(f"These layers' gradients are not finite: {_checks.listed(broken)}.")
    return layers(*sorted(scores, key=lambda name: scores[name], reverse=True)[:k])


@jax.jit
def _norms(layers: list[list[jax.Array]]) -> list[jax.Array]:
    return [_numerics.norm(leaves) for leaves in layers]


@dataclasses.dataclass(frozen=True, repr=False)
class _ByPath:
    regex: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.regex)
        except (re.error, TypeError) as error:
            message = f"by_path({self.regex!r}) is no regular expression: {error}."
            raise ValueError(message) from error

    def __call__(self, params: PyTree) -> PyTree:
        return _tree_of(params, [bool(re.search(self.regex, path)) for path in _paths_of(params)])

    def __repr__(self) -> str:
        return f"by_path({self.regex!r})"


@dataclasses.dataclass(frozen=True, repr=False)
class _Matrices:
    def __call__(self, params: PyTree) -> PyTree:
        _refuse_step_count(params)
        return jax.tree.map(lambda leaf: jnp.ndim(leaf) >= 2, params)

    def __repr__(self) -> str:
        return "matrices()"


@dataclasses.dataclass(frozen=True, repr=False)
class _Layers:
    paths: tuple[str, ...]

    def __call__(self, params: PyTree) -> PyTree:
        owners = [_paths.layer_of(path) for path in _paths_of(params)]
        present = set(owners)
        missing = [layer for layer in self.paths if layer not in present]
        if missing:
            raise ValueError(
                f"The mask names layers that the parameters do not have: "
                f"{_checks.listed(missing)}. They have {_checks.listed(sorted(present))}. "
                f"Select again with the gradient of these parameters."
            )
        return _tree_of(params, [owner in self.paths for owner in owners])

    def __repr__(self) -> str:
        return f"layers({', '.join(map(repr, self.paths))})"


def _paths_of(params: PyTree) -> list[str]:
    _refuse_step_count(params)
    return _paths.leaf_paths(params)


def _tree_of(params: PyTree, selected: list[bool]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(params), selected)


def _refuse_step_count(params: PyTree) -> None:
    # `optax.inject_hyperparams` takes every callable for a schedule and calls it with its count.
    if isinstance(params, (int, np.ndarray, jax.Array)) and not _numerics.is_inexact(params):
        raise ValueError(_selection.MASK_AS_SCHEDULE)
