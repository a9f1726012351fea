"""Whether a step regularizes as it is meant to: what one step of a chain did."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnp_optax._core import checks, losses, nodes, numerics
from gnp_optax._momentum import MomentumSAMState
from gnp_optax._transformation import GradientRegularizationState
from gnp_optax.masks import _flops

PyTree = Any


class StepCheck(NamedTuple):
    """What one step did; `print` shows it as a table.

    Attributes:
        is_first: Whether nothing stands before the regularization in its chain.
        perturbed: Whether a second pass ran.
        loss: `L(params)`.
        surrogate_gap: Growth of the loss at the perturbed parameters; 0 with exact curvature.
        cosine: Cosine between g and g~.
        grad_norm: `||g||` over all leaves.
        perturbation_norm: How far the parameters were moved for the second pass, after rounding.
        dtypes: The types of the parameters.
        update_norm: How far the step moves the parameters.
        cost: Floating-point operations of a step with a second pass, in gradients.
    """

    is_first: bool
    perturbed: bool
    loss: float
    surrogate_gap: float
    cosine: float
    grad_norm: float
    perturbation_norm: float
    dtypes: tuple[str, ...]
    update_norm: float
    cost: float

    def __str__(self) -> str:
        """Return a table of two columns."""
        first = "yes" if self.is_first else "no: what is before it left this gradient as it was"
        rows = {
            "first in its chain": first,
            "second pass": "ran" if self.perturbed else "did not run: alpha is 0 at this step",
            "norm of the gradient": f"{self.grad_norm:.4g}",
            "perturbation": self._perturbation(),
            "loss": f"{self.loss:.4g}, perturbed {self.loss + self.surrogate_gap:.4g}",
            "cosine of g and g~": f"{self.cosine:.4f}",
            "norm of the update": f"{self.update_norm:.4g}",
            "cost of a step": f"{self.cost:.2f} gradients",
        }
        if not self.perturbed:
            del rows["perturbation"], rows["cosine of g and g~"]
            rows["loss"] = f"{self.loss:.4g}"
        return "\n".join(f"{name:<22}{text}" for name, text in rows.items())

    def _perturbation(self) -> str:
        dtypes = ", ".join(self.dtypes)
        if self.perturbation_norm > 0:
            return f"{self.perturbation_norm:.4g}, in {dtypes}"
        # With exact curvature nothing is meant to move, which the state does not tell.
        return f"0: lost in rounding to {dtypes}? (or r is 0, or curvature='exact')"


def check_step(
    tx: optax.GradientTransformation,
    loss_fn: Callable[..., Any],
    params: PyTree,
    *batch: Any,
    opt_state: PyTree | None = None,
    has_aux: bool = False,
) -> StepCheck:
    """Run one step of a chain with gradient regularization, and tell what it did.

    Is the regularization first? Was it on? How far did the parameters really move, and in which
    type? Nothing is changed: parameters and state stay as they are.

    The order in a chain, with g the gradient and g~ the one at the perturbed parameters:

        regularization, clipping, adamw     right: g and g~ are mixed, then clipped, then used
        regularization, MultiSteps(adamw)   right: every micro-batch is regularized
        regularization, partition(...)      right: the layers differ in what comes after
        clipping, regularization            g is clipped and g~ is not: a large g~ passes
        weight decay, regularization        ascends along the decay too, and decays by 1 - alpha of
                                            it: not at all with SAM
        freezing, regularization            what is frozen receives alpha g~, and trains
        adamw, regularization               adds alpha g~, uphill, to an update: it diverges
        regularization, regularization      the second leaves 1 - alpha of what the first found
        MultiSteps(regularization, ...)     an error of `update`

    What stands before the regularization shows in the structure of the state, and in the norm of
    what the regularization was given: it is an error if that is not the gradient at `params`, or if
    there are two. What comes after it can't be seen, and is right as the chain has it. Nor can what
    a training step does to the gradient before `update`: there a mean over devices is meant, and a
    clipping is not.

    Args:
        tx: The optimizer: a chain that begins with `gnp.gradient_regularization` or `gnp.sam`.
        loss_fn: Loss `loss_fn(params, *batch)`; or `(loss, aux)` with `has_aux`, as `tx` has it.
        params: The parameters.
        *batch: Further arguments of `loss_fn`, arrays.
        opt_state: The state to step from; by default that of `tx.init(params)`. With a schedule,
            pass one after the warmup.
        has_aux: Whether `loss_fn` returns `(loss, aux)`.

    Returns:
        The `StepCheck`, to be printed.

    Raises:
        TypeError: If the loss does not return a real scalar.
        ValueError: If there is no gradient regularization in the state, or more than one; if what
            it was given is not the gradient, since something before it changes that.

    Example:
        >>> import gnp_optax as gnp, optax
        >>> loss = lambda w: jnp.sum(w**2) / 2
        >>> tx = optax.chain(gnp.sam(rho=0.5), optax.sgd(0.1))
        >>> print(check_step(tx, loss, jnp.array([3.0, 4.0])))
        first in its chain    yes
        second pass           ran
        norm of the gradient  5
        perturbation          0.5, in float32
        loss                  12.5, perturbed 15.12
        cosine of g and g~    1.0000
        norm of the update    0.55
        cost of a step        ...
    """
    checks.check_parameters(params)
    state = tx.init(params) if opt_state is None else opt_state
    _regularization(state)
    gradient = jax.value_and_grad(losses.with_aux(loss_fn, has_aux), has_aux=True)
    update = optax.with_extra_args_support(tx).update

    def step(params: PyTree, state: PyTree, *batch: Any) -> tuple[PyTree, ...]:
        (value, _), grads = gradient(params, *batch)
        updates, state = update(grads, state, params, value_fn=lambda p: loss_fn(p, *batch))
        return value, _norm(grads), _norm(updates), state

    value, norm, update_norm, following = jax.jit(step)(params, state, *batch)
    seen, is_first = _regularization(following)
    _check_gradient(float(seen.grad_norm), float(norm))
    cost = _flops.flops(step, params, state, *batch) / _flops.flops(gradient, params, *batch)
    leaves = [w for w in jax.tree.leaves(params) if numerics.is_inexact(w)]
    return StepCheck(
        is_first=is_first,
        perturbed=bool(seen.perturbed),
        loss=float(value),
        surrogate_gap=float(seen.perturbed_loss - value) if seen.perturbed else 0.0,
        cosine=float(seen.cosine),
        grad_norm=float(norm),
        perturbation_norm=float(seen.perturbation_norm),
        dtypes=tuple(sorted({jnp.result_type(w).name for w in leaves})),
        update_norm=float(update_norm),
        cost=cost,
    )


class _Found(NamedTuple):
    state: GradientRegularizationState
    is_first: bool


def _regularization(opt_state: PyTree) -> _Found:
    """Return the one state of a regularization, and whether nothing stands before it."""
    found = nodes.with_keys(opt_state, GradientRegularizationState)
    if len(found) > 1:
        raise ValueError(
            f"There are {len(found)} gradient regularizations in this chain. The second takes what "
            f"the first returns for the gradient, and leaves 1 - alpha of it: keep one. (For "
            f"another radius in some layers write a direction, or chain gnp.momentum_sam with "
            f"mask=~mask.)"
        )
    if not found and nodes.inside(opt_state, MomentumSAMState):
        raise ValueError(
            "gnp.momentum_sam perturbs before the gradient is taken, which only your own training "
            "step can show: gnp.diagnostics.check_perturbed(step, params, opt_state, *batch)."
        )
    if not found:
        raise ValueError(
            "There is no gradient regularization in this chain: optax.chain(gnp.sam(rho=0.1), "
            "optax.adamw(1e-3)). (gnp.value_and_grad regularizes before the optimizer, which knows "
            "nothing of it.)"
        )
    [(path, state)] = found
    # A chain's state is a plain tuple, with one entry for each of its transformations.
    return _Found(state, all(getattr(key, "idx", 0) == 0 for key in path))


def _check_gradient(given: float, norm: float) -> None:
    if not np.isclose(given, norm, rtol=1e-3, equal_nan=True):
        raise ValueError(
            f"The regularization was given something else than the gradient at the parameters, "
            f"whose norm is {norm:.4g}: what it was given has {given:.4g}. What stands before it "
            f"in the chain acts on g and not on g~. Put the regularization first: "
            f"optax.chain(gnp.sam(rho=0.1), optax.clip_by_global_norm(5.0), optax.adamw(1e-3))."
        )


def _norm(tree: PyTree) -> jax.Array:
    return numerics.norm([x for x in jax.tree.leaves(tree) if numerics.is_inexact(x)])
