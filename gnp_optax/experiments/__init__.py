"""A comparison of plain training, gradient regularization, SAM and layer-wise regularization.

Run it with `python -m gnp_optax.experiments`; `--help` explains every option and lists the recipes
and the other commands. `compare` reads the options, trains and reports; `config` has the options,
`methods` what is compared, `recipes` the named settings. `data`, `models`, `training` and `report`
are what a comparison is made of; `measure` are the other commands.
"""
