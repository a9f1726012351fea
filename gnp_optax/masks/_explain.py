"""What a mask costs, and why."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gnp_optax import _functional, _prefix
from gnp_optax._core import losses, selection
from gnp_optax._core.options import Curvature, Scope
from gnp_optax.masks import _cost, _flops

PyTree = Any
Arrays = list[Any]


class Explanation(NamedTuple):
    """What a regularized gradient costs, and why; printed as text.

    Attributes:
        cost: What `gnp.masks.cost` returns.
        shared: The share of the loss's operations that both passes have in common.
        begins: The line of the first matrix product that is computed in both passes, since it
            depends on a perturbed leaf; empty if there is none.
        not_cut: What is computed twice as a whole: loops, checkpoints, calls, each a tuple
            `(what, where, why)`.
    """

    cost: float
    shared: float
    begins: str
    not_cut: tuple[_prefix.NotCut, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.cost:.2f} ordinary gradients a step.",
            f"{100 * self.shared:.0f} % of the loss is computed once, the rest in both passes"
            + (f", from {self.begins} on." if self.begins else "."),
            *(f"Not cut: {each}." for each in self.not_cut),
        ]
        return "\n".join(lines)


def explain(
    fun: Callable[..., Any],
    params: PyTree,
    mask: selection.Mask,
    *args: Any,
    scope: Scope = "all",
    curvature: Curvature = "finite_difference",
    surrogate_gap: float | None = None,
    has_aux: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Return what a regularized gradient will cost, and why: what is shared and what is not.

    With a mask, what the loss computes before it first uses a perturbed leaf is shared by the two
    passes. Calls of jitted functions are opened for that, checkpoints and loops are cut in two;
    here stands what could not be, with the line that calls it and the reason. The logger
    "gnp_optax" tells the same at level DEBUG wherever a step is compiled.

    Args:
        fun: As in `gnp.masks.cost`.
        params: As in `gnp.masks.cost`.
        mask: As in `gnp.masks.cost`.
        *args: As in `gnp.masks.cost`.
        scope: As in `gnp.masks.cost`.
        curvature: As in `gnp.masks.cost`.
        surrogate_gap: As in `gnp.masks.cost`.
        has_aux: As in `gnp.masks.cost`.
        **kwargs: As in `gnp.masks.cost`.

    Returns:
        `Explanation(cost, shared, begins, not_cut)`, to be printed.

    Raises:
        TypeError, ValueError: As `gnp.value_and_grad`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gnp_optax.masks import by_path
        >>> def loss(params, x):
        ...     layer = lambda h, _: (jnp.tanh(h @ params["shared"]), None)
        ...     h, _ = jax.lax.scan(layer, jnp.tanh(x @ params["first"]), length=3)
        ...     return jnp.sum(h)
        >>> params = {"first": jnp.zeros((64, 64)), "shared": jnp.zeros((64, 64))}
        >>> found = explain(loss, params, by_path("^shared"), jnp.zeros((256, 64)))
        >>> round(found.cost, 2), round(found.shared, 2)
        (1.82, 0.25)
        >>> found.not_cut[0].what, found.not_cut[0].why
        ('a scan of 3 iterations', 'its first iteration uses a perturbed leaf')
    """
    cost = _cost.cost(
        fun,
        params,
        mask,
        *args,
        scope=scope,
        curvature=curvature,
        surrogate_gap=surrogate_gap,
        has_aux=has_aux,
        **kwargs,
    )
    options = _functional.resolve(None, mask, scope, curvature, None, has_aux, surrogate_gap)
    loss_fn = losses.with_aux(fun, options.has_aux)
    found: list[Explanation] = []

    def look(params: PyTree, *args: Any) -> None:
        parts = selection.Parts(options.mask, params)

        def loss(perturbed: Arrays, unperturbed: Arrays) -> tuple[jax.Array, Any]:
            return loss_fn(parts.unite(perturbed, unperturbed), *args, **kwargs)

        divided = parts.divide(params)
        cut = _prefix.cut(loss, *divided)
        # Of a loss without arithmetic, as one of exponentials alone, none is counted.
        shared = _flops.flops(cut.prefix, divided[1]) / max(1.0, _flops.flops(loss, *divided))
        found.append(Explanation(cost, shared, cut.begins, cut.not_cut))

    jax.eval_shape(look, params, *args)
    return found[0]
