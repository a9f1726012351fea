"""Gradient regularization, SAM and layer-wise gradient regularization for JAX and Optax."""

from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

from gnp_optax import batching, directions, masks, schedules
from gnp_optax._functional import value_and_grad
from gnp_optax._presets import asam, layerwise_gradient_regularization, sam
from gnp_optax._transformation import GradientRegularizationState, gradient_regularization

__version__ = "0.1.0"

__all__ = [
    "GradientRegularizationState",
    "asam",
    "batching",
    "directions",
    "gradient_regularization",
    "layerwise_gradient_regularization",
    "masks",
    "sam",
    "schedules",
    "value_and_grad",
]


def __getattr__(name: str) -> _ModuleType:
    # `gnp.linen` and `gnp.nnx` import Flax, which this package must not need: only when asked for.
    if name in ("linen", "nnx"):
        try:
            return _import_module(f"gnp_optax.{name}")
        except ModuleNotFoundError as error:
            if error.name != "flax":
                raise
            raise ModuleNotFoundError(
                f"gnp_optax.{name} needs Flax: pip install 'gnp-optax[flax]'."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
