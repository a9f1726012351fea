"""Prefix sharing: what a loss computes before it first uses a perturbed leaf is computed once."""

from gnp_optax._prefix.refusals import NotCut
from gnp_optax._prefix.sharing import Cut, cut, uncut

__all__ = ["Cut", "NotCut", "cut", "uncut"]
