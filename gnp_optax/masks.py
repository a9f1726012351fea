"""Masks: which leaves of the parameters are perturbed.

A mask is `None` (all leaves), a prefix pytree of Python bools (True = perturbed), or a callable
from the parameters to such a pytree. The callables made here are hashable and compare by value, so
that a mask can be a static argument of `jax.jit`: the step is compiled once per distinct selection.
`a | b` selects what either selects. In place of a leaf's bool there may be a NumPy array of bools,
for a leaf that stacks layers along its first axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from gnp_optax import _checks, _flops, _functional, _masks, _ranking, _selection

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
    return _masks.ByPath(regex)


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
    return _masks.Layers(tuple(sorted(set(paths))))


def matrices() -> Callable[[PyTree], PyTree]:
    """Select the leaves with two or more dimensions: kernels and embeddings, not biases or scales.

    Returns:
        A mask: hashable, equal to every other `matrices()`.

    Example:
        >>> import jax.numpy as jnp
        >>> matrices()({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)})
        {'bias': False, 'kernel': True}
    """
    return _masks.Matrices()


def stacked(regex: str, *, last: int) -> Callable[[PyTree], PyTree]:
    """Select the last layers of leaves that stack layers along their first axis, for `lax.scan`.

    With prefix sharing the loop is cut: the first layers are computed once. That needs one forward
    `lax.scan` over the stacks as they are, or cast to another type.

    Args:
        regex: The leaves whose path matches, as in `by_path`.
        last: How many of the layers.

    Returns:
        A mask: hashable, equal to every other `stacked` of the same arguments.

    Raises:
        ValueError: If `regex` is no regular expression or `last` less than 1; where the mask is
            used, if a matching leaf does not have as many layers.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"blocks": jnp.zeros((3, 4, 4)), "head": jnp.zeros((4, 2))}
        >>> mask = stacked("blocks", last=2) | by_path("head")
        >>> mask(params)
        {'blocks': array([False,  True,  True]), 'head': True}
    """
    _checks.check_integer("last", last, at_least=1)
    return _masks.Stacked(regex, int(last))


def cost(
    fun: Callable[..., Any],
    params: PyTree,
    mask: _selection.Mask,
    *args: Any,
    scope: str = "all",
    curvature: str = "finite_difference",
    has_aux: bool = False,
    **kwargs: Any,
) -> float:
    """Return what a regularized gradient will cost, in ordinary gradients.

    The ratio of the floating-point operations of `gnp.value_and_grad(fun, ..., mask=mask)` and of
    `jax.value_and_grad(fun)`, counted in their traces: nothing is compiled or run. It is about
    `1 + q`, where q is the share of what follows the first use of a perturbed leaf.

    Args:
        fun: Loss `fun(params, *args, **kwargs)`, or `(loss, aux)` with `has_aux`.
        params: The parameters; arrays or `jax.ShapeDtypeStruct`.
        mask: Which leaves are perturbed; `None` for all.
        *args: Further arguments of `fun`; arrays or `jax.ShapeDtypeStruct`.
        scope: As in `gnp.value_and_grad`.
        curvature: As in `gnp.value_and_grad`.
        has_aux: Whether `fun` returns `(loss, aux)`.
        **kwargs: Keyword arguments of `fun`, taken as constants.

    Returns:
        The ratio. A `while_loop` counts as if it ran once, `lax.cond` as its dearest branch.

    Raises:
        TypeError, ValueError: As `gnp.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["body"]) @ p["head"])
        >>> params = {"body": jnp.zeros((64, 64)), "head": jnp.zeros((64, 8))}
        >>> x = jnp.zeros((256, 64))
        >>> [round(cost(loss, params, mask, x), 1) for mask in (None, by_path("head"))]
        [2.0, 1.1]
    """
    regularized = _functional.value_and_grad(
        fun, 0.1, 0.5, mask=mask, scope=scope, curvature=curvature, has_aux=has_aux
    )
    plain = jax.value_and_grad(fun, has_aux=has_aux)
    counts = [
        _flops.flops(functools.partial(gradient, **kwargs), params, *args)
        for gradient in (regularized, plain)
    ]
    return counts[0] / counts[1]


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
        TypeError: If `grads` is traced: the selection has to be known when a step is compiled.
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
    ranked = _ranking.layers_by_norm(grads)
    k = len(ranked) if k is None else k
    if k > len(ranked):
        raise ValueError(
            f"k={k} layers were asked for, but the gradient has {len(ranked)}: "
            f"{_checks.listed(sorted(ranked))}."
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
        _checks.check_integer("k", k, at_least=1)
    elif budget is None:
        raise ValueError("k=None, as many layers as fit, needs a budget.")
    if budget is not None and not budget > 1:
        raise ValueError(f"budget must be more than 1, the ordinary gradient, got {budget!r}.")
    if cost is not None and not callable(cost):
        raise TypeError(f"cost must be a function from a mask to its cost, got {cost!r}.")
