"""Diagnostics: how flat the loss is around the parameters, measured on the loss itself.

Every function takes the loss as it is trained, `fun(params, *args)`, the parameters as they are
sharded, and the masks of `gnp.masks`:

    import gnp_optax as gnp

    def loss_fn(params, x, y):
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    # Curvature, without ever forming the Hessian. (Eigenvalues of a layer: mask=...)
    top = gnp.diagnostics.hessian_eigenvalues(loss_fn, params, x, y, k=3, batch_size=256)
    trace = gnp.diagnostics.hessian_trace(loss_fn, params, x, y, key=key, batch_size=256)
    spectrum = gnp.diagnostics.hessian_spectrum(loss_fn, params, x, y, key=key, batch_size=256)
    density = gnp.diagnostics.spectral_density(spectrum, grid=jnp.linspace(-1, 30, 500), width=0.1)

    # Whether a step does what it is meant to, and what each radius would do.
    print(gnp.diagnostics.check_step(tx, loss_fn, params, x, y))
    radii = jnp.geomspace(1e-3, 1, 13)
    profile = gnp.diagnostics.radius_profile(loss_fn, params, x, y, radii=radii)

    # How much the loss grows within a distance, as SAM and ASAM see it, and at the worst.
    step = gnp.diagnostics.sharpness(loss_fn, params, x, y, rho=0.05)
    worst = gnp.diagnostics.worst_case_sharpness(loss_fn, params, x, y, rho=0.05)

    # The loss on a plane, for `plt.contour(*surface)`.
    pair = [gnp.diagnostics.random_direction(key, params) for key in jax.random.split(key)]
    steps = jnp.linspace(-1, 1, 21)
    surface = gnp.diagnostics.loss_surface(loss_fn, params, x, y, directions=pair, x=steps, y=steps)

With `batch_size`, the examples are computed in batches of that many, one after the other, in the
memory of one; the result is the mean over all examples, the last, smaller batch included. With
`progress=True` a bar counts the batches, and says so as long as the program is compiled.

Each function compiles itself, once for each loss function: keep the function, and give it what
changes as an argument. As with `jax.jit`, what a function closes over is read when it is compiled,
and kept in memory until `jax.clear_caches()`.
Measurements of vectors keep them on the devices that the parameters are on: no device holds more of
a vector than its part. Axes of a mesh that are `Explicit` are taken as `Auto` meanwhile.
"""

from gnp_optax.diagnostics._hessian import (
    Eigenpairs,
    TraceEstimate,
    hessian_eigenvalues,
    hessian_trace,
)
from gnp_optax.diagnostics._landscape import (
    Line,
    Path,
    Surface,
    loss_along,
    loss_between,
    loss_surface,
    random_direction,
)
from gnp_optax.diagnostics._layer_norms import LayerNorms, layer_gradient_norms, norms_by_layer
from gnp_optax.diagnostics._moments import AdaptiveStatistics, adaptive_statistics
from gnp_optax.diagnostics._perturbed import check_perturbed
from gnp_optax.diagnostics._radius import RadiusProfile, radius_profile
from gnp_optax.diagnostics._sharpness import MSharpness, Sharpness, m_sharpness, sharpness
from gnp_optax.diagnostics._spectrum import Spectrum, hessian_spectrum, spectral_density
from gnp_optax.diagnostics._step import StepCheck, check_step
from gnp_optax.diagnostics._worst_case import WorstCase, worst_case_sharpness

__all__ = [
    "AdaptiveStatistics",
    "Eigenpairs",
    "LayerNorms",
    "Line",
    "MSharpness",
    "Path",
    "RadiusProfile",
    "Sharpness",
    "Spectrum",
    "StepCheck",
    "Surface",
    "TraceEstimate",
    "WorstCase",
    "adaptive_statistics",
    "check_perturbed",
    "check_step",
    "hessian_eigenvalues",
    "hessian_spectrum",
    "hessian_trace",
    "layer_gradient_norms",
    "loss_along",
    "loss_between",
    "loss_surface",
    "m_sharpness",
    "norms_by_layer",
    "radius_profile",
    "random_direction",
    "sharpness",
    "spectral_density",
    "worst_case_sharpness",
]

# The public home, which is also where a pickled result looks for its type.
for _name in __all__:
    if isinstance(globals()[_name], type):
        globals()[_name].__module__ = __name__
