"""Masks: which leaves of the parameters are perturbed.

A mask is `None` (all leaves), a prefix pytree of Python bools (True = perturbed), or a callable
from the parameters to such a pytree. The callables made here are hashable and compare by value, so
that a mask can be a static argument of `jax.jit`: the step is compiled once per distinct selection.
`a | b` selects what either selects, `a & b` what both do, and `~a` all else. In place of a leaf's
bool there may be a NumPy array of bools, for a leaf that stacks layers: of shape `(layers,)` along
its first axis, `(1, layers)` along its second.
"""

from gnp_optax.masks._cost import cost
from gnp_optax.masks._explain import explain
from gnp_optax.masks._kinds import by_path, layers, matrices, stacked
from gnp_optax.masks._ranking import top_k_layers

__all__ = ["by_path", "cost", "explain", "layers", "matrices", "stacked", "top_k_layers"]
