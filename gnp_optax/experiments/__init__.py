"""A comparison of plain training, gradient regularization, SAM and layer-wise regularization.

Run it with `python -m gnp_optax.experiments`; `--help` explains every option. What each method
costs is measured by `python -m gnp_optax.experiments cost`, what low precision does to the
perturbation by `python -m gnp_optax.experiments precision`, and how long the device waits for the
comparison by `python -m gnp_optax.experiments throughput`.
"""
