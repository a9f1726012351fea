"""Whether a step takes its gradient where `gnp.momentum_sam` says."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnp_optax._core import nodes
from gnp_optax._momentum import MomentumSAMState

PyTree = Any


def check_perturbed(step: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise if a training step with `gnp.momentum_sam` forgets `gnp.perturbed`.

    Such a step is plain training without a word, since a gradient does not say where it was taken.
    Here the step is run twice, with what is remembered and with its opposite. Where it perturbs, it
    hands another gradient to `gnp.momentum_sam`, which tells its norm; where it forgets to, the
    same one.

    Args:
        step: A training step, jitted or not: any function of arrays that takes and returns the
            optimizer state, alone, in a tuple, or inside a `TrainState`. It must not change its
            arguments, as one of NNX modules does, nor wait for other processes.
        *args: Its arguments, with an optimizer state after at least one step. Those that are arrays
            are copied, so that a step may take their memory (`donate_argnums`).
        **kwargs: Its keyword arguments.

    Returns:
        Nothing, if the step perturbs.

    Raises:
        ValueError: If the step does not perturb; if no argument, or nothing that it returns, holds
            a state of `gnp.momentum_sam`; if nothing is remembered yet, or the radius is 0, so that
            there is nothing to see.

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
    states = nodes.inside(given, MomentumSAMState)
    if not states:
        raise ValueError(
            "No argument of the step holds a state of gnp.momentum_sam: pass those that the step "
            "is called with, check_perturbed(step, params, opt_state, *batch)."
        )
    if not any(np.any(np.asarray(s.radius * s.momentum_norm) > 0) for s in states):
        raise ValueError(
            "The next step has no perturbation, so that nothing can be seen: before the first step "
            "nothing is remembered, and where rho is 0 nothing is perturbed. Call it later."
        )
    first, second = (nodes.inside(_run(step, given, sign), MomentumSAMState) for sign in (1, -1))
    if not first:
        raise ValueError(
            "Nothing that the step returns holds a state of gnp.momentum_sam: let it return the "
            "optimizer state."
        )
    norms = [[np.asarray(state.grad_norm) for state in states] for states in (first, second)]
    if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*norms, strict=True)):
        raise ValueError(
            "The step takes its gradient at the parameters, not at the perturbed ones: what "
            "gnp.momentum_sam remembers changes nothing. Write "
            "jax.value_and_grad(loss_fn)(gnp.perturbed(params, opt_state), ...). (Or the "
            "perturbation is lost in rounding, as in bfloat16: perturb_dtype='float32'.)"
        )


def _is_memory(node: Any) -> bool:
    return isinstance(node, MomentumSAMState)


def _run(step: Callable[..., Any], given: PyTree, sign: int) -> Any:
    """Run a step on copies of its arguments, what is remembered turned around for a sign of -1."""

    def copied(node: Any) -> Any:
        if _is_memory(node):
            copy = jax.tree.map(jnp.copy, node)
            return copy._replace(momentum=jax.tree.map(lambda m: sign * m, copy.momentum))
        return jnp.copy(node) if isinstance(node, jax.Array) else node

    args, kwargs = jax.tree.map(copied, given, is_leaf=_is_memory)
    return step(*args, **kwargs)
