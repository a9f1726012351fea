"""What is perturbed, along what, and who receives it: the options that every form shares."""

import dataclasses
from typing import Literal

import jax
import optax

from gnp_optax._core import checks, selection

Scope = Literal["all", "masked"]
Curvature = Literal["finite_difference", "exact"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that are right whatever the parameters are; `_functional.resolve` makes them.

    Attributes:
        direction: From the gradient to the direction of ascent d, so that `eps = r * d`.
        mask: Which leaves are perturbed.
        scope: Which leaves receive g~: "all", or those under the mask.
        curvature: How g~ is found: at the perturbed parameters, or by a Hessian-vector product.
        perturb_dtype: The least type of the perturbed parameters, or None for their own.
        surrogate_gap: Weight of what is orthogonal to g~ in g, GSAM's alpha.
        has_aux: Whether the loss returns `(loss, aux)`.
    """

    direction: optax.GradientTransformation
    mask: selection.Mask
    scope: Scope
    curvature: Curvature
    perturb_dtype: jax.typing.DTypeLike | None
    surrogate_gap: jax.typing.ArrayLike
    has_aux: bool

    def __post_init__(self) -> None:
        """Check them."""
        checks.check_scope(self.scope)
        checks.check_curvature(self.curvature)
        checks.check_perturb_dtype(self.perturb_dtype, self.curvature)
        checks.check_scalar("surrogate_gap", self.surrogate_gap)
        selection.check_mask(self.mask)
        checks.check_direction(self.direction)
