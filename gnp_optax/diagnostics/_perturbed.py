"""Whether a step takes its gradient where `gnp.momentum_sam` says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax._momentum import MomentumSAMState

PyTree = Any


def check_perturbed(step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise if a training step with `gnp.momentum_sam` forgets `gnp.perturbed`.

    Such a step is plain training without a word, since a gradient does not say where it was taken.
    Here the step is run twice, with what is remembered and with its opposite. Where it perturbs,
    that makes a difference to more than the memory itself; where it forgets to, to nothing else.

    Args:
        step: A training step, jitted or not: any function of arrays that takes and returns the
            optimizer state, alone, in a tuple, or inside a `TrainState`. It must not change its
            arguments (of NNX, split the modules first), nor wait for other processes.
        *args: Its arguments, with an optimizer state after at least one step. Those that are arrays
            are copied, so that a step may take their memory (`donate_argnums`).
        **kwargs: Its keyword arguments.

    Returns:
        Nothing, if the step perturbs.

    Raises:
        ValueError: If the step does not perturb; if no argument holds a state of
            `gnp.momentum_sam`; if nothing is remembered yet, or the radius is 0, so that there is
            nothing to see.

    Example:
        >>> import gnp_optax as gnp, optax
        >>> loss = lambda w: jnp.sum(w**4)
        >>> tx = optax.chain(gnp.momentum_sam(rho=0.1), optax.sgd(0.1))
        >>> def step(params, opt_state):
        ...     grads = jax.grad(loss)(params)          # gnp.perturbed is forgotten
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     return optax.apply_updates(params, updates), opt_state
        >>> params = jnp.ones(2)
        >>> params, opt_state = step(params, tx.init(params))
        >>> check_perturbed(step, params, opt_state)
        Traceback (most recent call last):
            ...
        ValueError: The step takes its gradient at the parameters, not at the perturbed ones: ...
    """
    given = (args, kwargs)
    states = [node for node in jax.tree.leaves(given, is_leaf=_is_memory) if _is_memory(node)]
    if not states:
        raise ValueError(
            "No argument of the step holds a state of gnp.momentum_sam: pass those that the step "
            "is called with, check_perturbed(step, params, opt_state, *batch)."
        )
    if not any(float(jnp.max(state.perturbation_norm)) > 0 for state in states):
        raise ValueError(
            "The next step has no perturbation, so that nothing can be seen: before the first step "
            "nothing is remembered, and where rho is 0 nothing is perturbed. Call it later."
        )
    first, second = (_others(step, *_with_memory(given, sign)) for sign in (1, -1))
    if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)):
        raise ValueError(
            "The step takes its gradient at the parameters, not at the perturbed ones: what "
            "gnp.momentum_sam remembers changes nothing. Write "
            "jax.value_and_grad(loss_fn)(gnp.perturbed(params, opt_state), ...)."
        )


def _is_memory(node: Any) -> bool:
    return isinstance(node, MomentumSAMState)


def _with_memory(given: PyTree, sign: int) -> PyTree:
    """Copy the arrays, and turn what is remembered around for a sign of -1."""

    def copied(node: Any) -> Any:
        if _is_memory(node):
            copy = jax.tree.map(jnp.copy, node)
            return copy._replace(momentum=jax.tree.map(lambda m: sign * m, copy.momentum))
        return jnp.copy(node) if isinstance(node, jax.Array) else node

    return jax.tree.map(copied, given, is_leaf=_is_memory)


def _others(step: Callable[..., Any], args: Any, kwargs: Any) -> list[np.ndarray]:
    """Return all numbers that a step returns but those of the memory."""
    nodes = jax.tree.leaves(step(*args, **kwargs), is_leaf=_is_memory)
    found = [node for node in nodes if not _is_memory(node)]
    keys = [jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key) for x in found]
    return [
        np.asarray(jax.random.key_data(x) if key else x) for x, key in zip(found, keys, strict=True)
    ]
