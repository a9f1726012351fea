"""Plots of what is measured on the way to a flat minimum.

Every function draws into the matplotlib `Axes` that it is given and returns them. None makes a
figure or touches pyplot or `rcParams`: the size of the figure, its fonts and its file are yours.
They are made to be read at the width of a column (3.5 inches), in black and white too.
"""

from gnp_optax.plots._curves import Style, band, curve_style, schedules
from gnp_optax.plots._landscapes import loss_contour, loss_line, loss_surface
from gnp_optax.plots._layer_map import layer_norms
from gnp_optax.plots._radii import radius_profile
from gnp_optax.plots._spectra import spectrum

__all__ = [
    "Style",
    "band",
    "curve_style",
    "layer_norms",
    "loss_contour",
    "loss_line",
    "loss_surface",
    "radius_profile",
    "schedules",
    "spectrum",
]
