"""Gradient regularization, SAM and layer-wise gradient regularization for JAX and Optax.

`gradient_regularization`, `sam`, `asam` and `layerwise_gradient_regularization` come first in an
Optax chain; `value_and_grad` takes the place of `jax.value_and_grad` instead. `momentum_sam` needs
one gradient a step, taken at `perturbed(params, opt_state)`. `report_as_dict` tells a logger what a
step did. `canonical_convolutions` is for loops on a CPU. Beside them:

    schedules      the warmups of radius and weight, and every k-th step
    directions     from the gradient to the direction of ascent
    masks          which layers are perturbed, and what that costs
    batching       gradient accumulation, and a perturbation for each group of m examples
    linen, nnx     Flax: a TrainState that hands on the loss; a drop-in for nnx.value_and_grad
    equinox        a drop-in for equinox.filter_value_and_grad
    diagnostics    how flat a minimum is: sharpness, Hessian, landscapes
    plots          pictures of what diagnostics measures

The last five need Flax, Equinox, tqdm or matplotlib, and are imported when they are asked for.
The comparison of all methods is a command: `python -m gnp_optax.experiments`.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from gnp_optax import batching, directions, masks, schedules
from gnp_optax._core.convolutions import canonical_convolutions
from gnp_optax._core.report import Report
from gnp_optax._functional import value_and_grad
from gnp_optax._logs import report_as_dict
from gnp_optax._momentum import MomentumSAMState, momentum_sam, perturbed
from gnp_optax._presets import asam, gsam, layerwise_gradient_regularization, sam
from gnp_optax._transformation import GradientRegularizationState, gradient_regularization

if TYPE_CHECKING:
    from gnp_optax import diagnostics, equinox, linen, nnx, plots  # noqa: F401

__version__ = "0.1.0"

__all__ = [
    "GradientRegularizationState",
    "MomentumSAMState",
    "Report",
    "asam",
    "batching",
    "canonical_convolutions",
    "directions",
    "gradient_regularization",
    "gsam",
    "layerwise_gradient_regularization",
    "masks",
    "momentum_sam",
    "perturbed",
    "report_as_dict",
    "sam",
    "schedules",
    "value_and_grad",
]


# Imported only when asked for, since they import what this package must not need: the extra that
# brings that, and the libraries that may be missing.
_EXTRAS = {
    "linen": ("flax", ("flax",)),
    "nnx": ("flax", ("flax",)),
    "equinox": ("equinox", ("equinox",)),
    "plots": ("plots", ("matplotlib",)),
    "diagnostics": ("diagnostics", ("tqdm",)),
}


def __getattr__(name: str) -> Any:
    if name in _EXTRAS:
        extra, libraries = _EXTRAS[name]
        try:
            return importlib.import_module(f"gnp_optax.{name}")
        except ModuleNotFoundError as error:
            if error.name not in libraries:
                raise
            raise ModuleNotFoundError(
                f"gnp_optax.{name} needs {error.name}: pip install 'gnp-optax[{extra}]'."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # `help` gets all that is listed, so that what can't be imported must not be.
    def is_there(library: str) -> bool:
        return importlib.util.find_spec(library) is not None

    there = [name for name, (_, libraries) in _EXTRAS.items() if all(map(is_there, libraries))]
    return [*__all__, *there, "__version__"]
