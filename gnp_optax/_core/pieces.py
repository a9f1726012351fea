"""Batches in parts, one after the other; the parts stand along the second axis of every array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax._core import numerics

PyTree = Any
Arrays = list[Any]


def mean_loss(
    of_part: Callable[..., tuple[jax.Array, Any]], inexact: Arrays, others: Arrays, parts: PyTree
) -> tuple[jax.Array, Any]:
    """Return the mean of `of_part(inexact, others, part)`, differentiated part by part, and aux."""
    dtypes = [jnp.result_type(w) for w in inexact]

    def total(inexact: Arrays, others: Arrays, parts: PyTree) -> tuple[jax.Array, Any]:
        values, aux = _each(lambda part: of_part(inexact, others, part), parts)
        return mean(values), aux

    def forward(*primals: Any) -> tuple[tuple[jax.Array, Any], Arrays]:
        given, *fixed = (jax.tree.flatten(x, is_leaf=_is_primal) for x in primals)
        if any(x.perturbed for leaves, _ in fixed for x in leaves):
            raise TypeError(
                "The loss of gnp.batching.accumulate can be differentiated with respect to the "
                "parameters, but not to its other arguments."
            )
        inexact, others, parts = (
            jax.tree.unflatten(structure, [x.value for x in leaves])
            for leaves, structure in (given, *fixed)
        )
        gradient = jax.value_and_grad(of_part, has_aux=True)
        (values, aux), sums = summed(lambda x: gradient(inexact, others, x), inexact, parts)
        return (mean(values), aux), [total / len(values) for total in sums]

    @numerics.promoting
    def backward(grads: Arrays, cotangents: Any) -> tuple[Arrays | None, None, None]:
        cotangent, _ = cotangents
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            return None, None, None
        scaled = (cotangent * g for g in grads)
        return [g.astype(dtype) for g, dtype in zip(scaled, dtypes, strict=True)], None, None

    differentiable = jax.custom_vjp(total)
    differentiable.defvjp(forward, backward, symbolic_zeros=True)
    found: tuple[jax.Array, Any] = differentiable(inexact, others, parts)
    return found


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def summed(
    gradient: Callable[[PyTree], tuple[Any, PyTree]], params: PyTree, parts: PyTree
) -> tuple[Any, PyTree]:
    """Return what `gradient` finds beside the gradient, stacked, and the sum of the gradients."""

    def add(sums: PyTree, i: jax.Array) -> tuple[PyTree, Any]:
        found, grads = gradient(part(parts, i))
        return jax.tree.map(lambda total, g: total + numerics.widen(g), sums, grads), found

    # Like the parameters, so that inside `shard_map` a sum varies over the axes that they vary on.
    zeros = jax.tree.map(lambda w: jnp.zeros_like(w, numerics.wide(jnp.result_type(w))), params)
    sums, found = jax.lax.scan(add, zeros, _numbers(parts))
    return found, sums


def _each(fun: Callable[[PyTree], Any], parts: PyTree) -> Any:
    return jax.lax.scan(lambda _, i: ((), fun(part(parts, i))), (), _numbers(parts))[1]


def _numbers(parts: PyTree) -> jax.Array:
    return jnp.arange(jax.tree.leaves(parts)[0].shape[1])


def part(parts: PyTree, i: jax.Array) -> PyTree:
    # Taken out one by one: to put the parts first would copy the batch.
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), parts)


def mean(values: jax.Array) -> jax.Array:
    """Mean, computed in float32 or wider."""
    return numerics.widen(values).mean().astype(values.dtype)


def batch_size(name: str, args: Any, kwargs: Any | None) -> int:
    """Return the number of examples in the arguments that the public function `name` splits.

    `kwargs` is None if the function takes no keyword arguments for the loss.
    """
    shapes = _shapes(args)
    if not shapes:
        raise ValueError(
            f"gnp.{name} splits the positional arguments after the parameters, and there "
            f"are none. Pass the batch by position: loss_fn(params, x, y); to a transformation, "
            f"value_fn=lambda params: loss_fn(params, x, y)."
        )
    sizes = {shape[0] if shape else None for shape in shapes.values()}
    if len(sizes) > 1 or None in sizes:
        listed = ", ".join(f"args{path}: {shape}" for path, shape in shapes.items())
        advice = (
            "Close over what belongs to no example: lambda params, x: loss_fn(params, x, key)."
            if kwargs is None
            else "Pass what belongs to no example by keyword: loss_fn(params, x, y, key=key)."
        )
        raise ValueError(
            f"gnp.{name} splits all positional arguments after the parameters along their "
            f"first axis, the examples, but theirs differ ({listed}). {advice}"
        )
    size = max(size for size in sizes if size is not None)
    if size == 0:
        raise ValueError(f"gnp.{name} was given an empty batch.")
    for keyword, x in (kwargs or {}).items():
        # Not what is in a tree (statistics, a teacher), and not a key made of two integers.
        has_rows = isinstance(x, (jax.Array, np.ndarray)) and x.shape[:1] == (size,)
        if has_rows and size > 1 and x.dtype != jnp.uint32:
            raise ValueError(
                f"gnp.{name} splits positional arguments only, but the keyword argument "
                f"{keyword!r} has {size} rows, as many as the batch. Pass it by position. If its "
                f"rows are not examples, close over it."
            )
    return size


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


def arrays(tree: PyTree) -> tuple[Arrays, Callable[[Arrays], PyTree]]:
    """Return the arrays of a tree, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    is_array = [isinstance(leaf, (jax.Array, np.ndarray, np.generic)) for leaf in leaves]

    def rebuild(arrays: Arrays) -> PyTree:
        given = iter(arrays)
        filled = [next(given) if a else leaf for leaf, a in zip(leaves, is_array, strict=True)]
        return jax.tree.unflatten(structure, filled)

    return only(leaves, is_array, True), rebuild


def only(leaves: list[Any], flags: list[bool], wanted: bool) -> list[Any]:
    """Return the leaves whose flag is the wanted one."""
    return [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag == wanted]
