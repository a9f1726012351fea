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


# Imported only when asked for, since they import what this package must not need: the extra that
# brings that, and the libraries that may be missing.
_EXTRAS = {
    "linen": ("flax", ("flax",)),
    "nnx": ("flax", ("flax",)),
    "plots": ("plots", ("matplotlib",)),
    "diagnostics": ("diagnostics", ("matfree", "tqdm")),
}


def __getattr__(name: str) -> _ModuleType:
    if name in _EXTRAS:
        extra, libraries = _EXTRAS[name]
        try:
            return _import_module(f"gnp_optax.{name}")
        except ModuleNotFoundError as error:
            if error.name not in libraries:
                raise
            raise ModuleNotFoundError(
                f"gnp_optax.{name} needs {error.name}: pip install 'gnp-optax[{extra}]'."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
