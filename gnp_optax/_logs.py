"""What a step tells, as loggers take it."""

from typing import Any

import jax
import jax.numpy as jnp

from gnp_optax._core import nodes
from gnp_optax._core.report import Report
from gnp_optax._momentum import MomentumSAMState
from gnp_optax._transformation import GradientRegularizationState

PyTree = Any
_MEASURED = {
    Report: Report._fields,
    GradientRegularizationState: Report._fields,
    MomentumSAMState: ("grad_norm", "perturbation_norm", "radius"),
}


def report_as_dict(
    opt_state_or_report: PyTree, prefix: str = "sam/"
) -> dict[str, float | jax.Array]:
    """Return what the last step tells by name, for TensorBoard, wandb or `clu.metrics`.

        wandb.log(gnp.report_as_dict(opt_state), step=step)
        metric_writer.write_scalars(step, gnp.report_as_dict(report))          # clu
        for name, value in gnp.report_as_dict(opt_state).items():              # TensorBoard
            writer.add_scalar(name, value, step)

    Called outside `jit` it waits for the step: log every hundred steps or so.

    Args:
        opt_state_or_report: A report, as `gnp.value_and_grad(..., return_report=True)` returns; or
            anything with one state of this package inside: the state of a chain or of a wrapper
            around it, a `TrainState`, the `opt_state` of an `nnx.Optimizer`.
        prefix: Begins every name.

    Returns:
        The fields of `gnp.Report`, or, of `gnp.momentum_sam`, `grad_norm`, `perturbation_norm` and
        `radius`. `grad_norm` is over all leaves in a state, over those under the mask in a report.
        Python floats, and under `jit` float32 scalars; `perturbed` is 0 or 1.

    Raises:
        ValueError: If there is no report and no state, or several; if they are not of one step, as
            after `jax.vmap`.

    Example:
        >>> from gnp_optax import gradient_regularization
        >>> loss = lambda x: jnp.sum(x**2) / 2
        >>> params, tx = jnp.array([3.0, 4.0]), gradient_regularization(0.5, 1.0)
        >>> _, state = tx.update(params, tx.init(params), params, value_fn=loss)
        >>> report_as_dict(state)["sam/perturbed_loss"]
        15.125
    """
    found: list[Any] = nodes.inside(opt_state_or_report, *_MEASURED)
    if len(found) != 1:
        raise ValueError(
            f"There are {len(found)} reports or states of gnp_optax here, and one is needed. Of a "
            f"chain with several pass the part that is meant: gnp.report_as_dict(opt_state[0]). "
            f"Without a transformation ask for a report: value, grads, report = "
            f"gnp.value_and_grad(loss_fn, r, alpha, return_report=True)(params, x, y)."
        )
    (state,) = found
    names = next(names for kind, names in _MEASURED.items() if isinstance(state, kind))
    # A field of an `nnx.Optimizer` is a variable that holds one array.
    values = [jnp.asarray(*jax.tree.leaves(getattr(state, name))) for name in names]
    shapes = {value.shape for value in values}
    if shapes != {()}:
        raise ValueError(
            f"A logger takes scalars, and here are arrays of the shape {shapes.pop()}: reports of "
            f"several groups or seeds. Take their means, "
            f"jax.tree.map(lambda x: x.mean(0), report), or one of them, x[0]."
        )
    scalars: list[Any] = [value.astype(jnp.float32) for value in values]
    if not any(isinstance(x, jax.core.Tracer) for x in scalars):
        scalars = [float(x) for x in jax.device_get(scalars)]
    return {prefix + name: x for name, x in zip(names, scalars, strict=True)}
