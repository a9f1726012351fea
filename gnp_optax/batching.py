"""Batches in pieces: gradient accumulation and m-sharpness.

Both are wrappers, and what they are wrapped around says where the perturbation comes from:

    gnp.value_and_grad(gnp.batching.accumulate(loss_fn, 4), r, alpha)     # from the whole batch
    gnp.batching.m_sharpness(gnp.value_and_grad(loss_fn, r, alpha), 32)   # from 32 examples each
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gnp_optax._core import checks, losses, numerics, pieces
from gnp_optax._core.report import Report

__all__ = ["accumulate", "m_sharpness"]
PyTree = Any
Arrays = list[Any]


def accumulate(
    fun: Callable[..., Any], micro_batches: int, *, has_aux: bool = False
) -> Callable[..., Any]:
    """Return the same loss, computed and differentiated one micro-batch after the other.

    Value and gradient are the means over the micro-batches. For a loss that is a mean over examples
    they are those of the whole batch, to rounding, at the cost of the whole batch and with the
    memory of one micro-batch: `micro_batches` forward and backward passes for each gradient, none
    twice. The result is a loss like any other:

        loss_fn = gnp.batching.accumulate(loss_fn, 4)
        value, grads = gnp.value_and_grad(loss_fn, r, alpha)(params, x, y)    # 2 * 4 passes
        updates, state = tx.update(grads, state, params, value_fn=lambda p: loss_fn(p, x, y))

    so that in every form of regularization the perturbation comes from the gradient of the whole
    batch. (Prefix sharing does not reach into it: it would have to keep the activations of all
    micro-batches.) Micro-batch i consists of the examples i, i + micro_batches, ...: when a batch
    is sharded over devices, each device has a share of every micro-batch.

    Gradients are added up in float32 or wider. If the loss is scaled, for float16, scale it inside
    `fun`. Call it inside the jitted step. Inside `jax.shard_map`, let the parameters vary first
    (`jax.lax.pcast`), or take the mean over the devices inside `fun`.

    Args:
        fun: Loss `fun(params, *args, **kwargs)`, a real scalar, or `(loss, aux)` with `has_aux`.
            The positional arguments after the parameters are split along the first axis of all
            their leaves; keyword arguments are given to every micro-batch as they are. For a random
            key of its own in each, pass one key for each example: `jax.random.split(key, batch)`.
        micro_batches: How many; it must divide the number of examples.
        has_aux: Whether `fun` returns `(loss, aux)`. aux comes back with a new first axis, one row
            for each micro-batch; its leaves must be arrays or numbers.

    Returns:
        A function with the signature of `fun`, differentiable with respect to the parameters, in
        reverse mode first. What `fun` closes over can't be differentiated: put it among them.

    Raises:
        TypeError: If `fun` does not return a real scalar; if an argument that is not the parameters
            is differentiated; if a module stands in place of its parameters.
        ValueError: If the arguments cannot be split.

    Example:
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2)
        >>> w, x = jnp.ones(2), jnp.arange(8.0).reshape(4, 2)
        >>> jax.grad(loss)(w, x).tolist(), jax.grad(accumulate(loss, 2))(w, x).tolist()
        ([62.0, 76.0], [62.0, 76.0])
    """
    checks.check_integer("micro_batches", micro_batches, at_least=1)
    with_aux = losses.with_aux(fun, has_aux)

    @functools.wraps(fun)
    def accumulated(params: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        checks.check_parameters(params)
        size = pieces.batch_size("batching.accumulate", args, kwargs)
        if size % micro_batches:
            raise ValueError(
                f"A batch of {size} examples cannot be divided into {micro_batches} micro-batches "
                f"of the same size."
            )
        parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]), args)
        leaves, structure = jax.tree.flatten(params)
        differentiable = [numerics.is_inexact(leaf) for leaf in leaves]
        # Arrays are handed on, not closed over: JAX may differentiate after this trace is over.
        others, rebuild = pieces.arrays((pieces.only(leaves, differentiable, False), kwargs))

        def of_part(inexact: Arrays, others: Arrays, part: Any) -> tuple[jax.Array, Any]:
            rest, kwargs = rebuild(others)
            sources = iter(rest), iter(inexact)
            filled = [next(sources[is_inexact]) for is_inexact in differentiable]
            return with_aux(jax.tree.unflatten(structure, filled), *part, **kwargs)

        inexact = pieces.only(leaves, differentiable, True)
        value, aux = pieces.mean_loss(of_part, inexact, others, parts)
        return (value, jax.lax.stop_gradient(aux)) if has_aux else value

    return accumulated


def m_sharpness(
    gradient: Callable[..., tuple[Any, ...]],
    m: int,
    *,
    parallel: int = 1,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, ...]]:
    """Return the mean of the regularized gradients of groups of m examples.

    Each group is perturbed by its own gradient, as by a device that sees m examples of the batch.
    The papers on SAM and GR train so, and a smaller m often generalizes better. Here m depends
    neither on the number of devices nor on how the batch is sharded:

        gradient = gnp.batching.m_sharpness(gnp.value_and_grad(loss_fn, r, alpha), m=32)
        value, grads = gradient(params, x, y)

    Groups are computed one after the other, in the memory of one. Over N devices that share the
    batch, or where there is memory for it, compute N of them at a time: `parallel=N`. Group i
    consists of the examples from `i * m` on; the groups at work at the same time are spread evenly
    over the batch, so that each device computes its own. Call it inside the jitted step.

    Args:
        gradient: `gnp.value_and_grad(loss, r, alpha, ...)`: a function of
            `(params, *args, **kwargs)` that returns `(value, grads)`. The positional arguments
            after the parameters are split along the first axis of all their leaves; keyword
            arguments are given to every group as they are. For a random key of its own in each,
            pass one key for each example: `jax.random.split(key, batch)`.
        m: Number of examples in a group; it must divide the batch.
        parallel: How many groups are computed at the same time, by `jax.vmap`; it must divide the
            number of groups. Memory grows with it.
        has_aux: Whether `gradient` returns `((value, aux), grads)`. aux comes back with a new first
            axis, one row for each group; its leaves must be arrays or numbers.

    Returns:
        A function with the signature of `gradient` that returns the means over the groups of value
        and gradient; of a report, one row for each group, as of aux.

    Raises:
        TypeError: If `gradient` returns something else; if a module stands in place of its
            parameters.
        ValueError: If the arguments cannot be split.

    Example:
        >>> import gnp_optax as gnp
        >>> gradient = gnp.value_and_grad(lambda w, x: jnp.mean((x @ w) ** 2), 0.1, 1.0)
        >>> w, x = jnp.ones(2), jnp.arange(8.0).reshape(4, 2)
        >>> halves = [gradient(w, x[:2])[1], gradient(w, x[2:])[1]]
        >>> value, grads = m_sharpness(gradient, m=2)(w, x)
        >>> bool(jnp.allclose(grads, (halves[0] + halves[1]) / 2))
        True

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        ICLR 2021, section 4.1.
    """
    checks.check_integer("m", m, at_least=1)
    checks.check_integer("parallel", parallel, at_least=1)

    @functools.wraps(gradient)
    def mean_gradient(params: PyTree, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        checks.check_parameters(params)
        size = pieces.batch_size("batching.m_sharpness", args, kwargs)
        if size % m:
            raise ValueError(f"A batch of {size} examples has no groups of {m}: m must divide it.")
        if (size // m) % parallel:
            raise ValueError(
                f"A batch of {size} examples has {size // m} groups of m={m}, of which {parallel} "
                f"at a time cannot be computed: parallel must divide their number."
            )
        rounds = jax.tree.map(lambda x: x.reshape(parallel, -1, m, *x.shape[1:]), args)

        def of_group(group: Any) -> tuple[tuple[jax.Array, Any], PyTree]:
            return _checked(gradient(params, *group, **kwargs), params, has_aux)

        def of_groups(groups: Any) -> tuple[tuple[jax.Array, Any], PyTree]:
            if parallel == 1:  # without `vmap`, which not every loss goes through
                found, grads = of_group(jax.tree.map(lambda x: x[0], groups))
                return jax.tree.map(lambda x: jnp.asarray(x)[None], found), grads
            found, grads = jax.vmap(of_group)(groups)
            return found, jax.tree.map(lambda g: numerics.widen(g).sum(0), grads)

        (values, rows), sums = pieces.summed(of_groups, params, rounds)
        grads = jax.tree.map(
            lambda w, total: (total / (size // m)).astype(jnp.result_type(w)), params, sums
        )
        # From (round, place, ...) to the order of the groups in the batch.
        aux, reports = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), rows)
        value = pieces.mean(values)
        return ((value, aux) if has_aux else value), grads, *reports

    return mean_gradient


def _checked(found: Any, params: PyTree, has_aux: bool) -> tuple[tuple[jax.Array, Any], PyTree]:
    """Return `((value, (aux, reports)), grads)`, raising unless `found` is of a gradient function.

    There is one report, or none.
    """
    structure: Any = jax.tree.structure(params)
    is_gradient = isinstance(found, tuple) and len(found) >= 2
    is_gradient = is_gradient and all(isinstance(x, Report) for x in found[2:])
    if not is_gradient or jax.tree.structure(found[1]) != structure:
        raise TypeError(
            "m_sharpness takes a function of (params, *args) that returns (value, grads), not a "
            "loss: gnp.batching.m_sharpness(gnp.value_and_grad(loss_fn, r, alpha), m)."
        )
    value, grads, *reports = found
    if has_aux != isinstance(value, tuple):
        raise TypeError(
            "With has_aux=True the gradient function must return ((value, aux), grads), without "
            "it (value, grads); pass the same has_aux to both."
        )
    value, aux = value if has_aux else (value, None)
    return (value, (aux, reports)), grads


def __dir__() -> list[str]:
    return __all__
