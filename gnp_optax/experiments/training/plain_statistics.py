"""An idea that was tried: the regularizer kept out of an adaptive optimizer's second moments."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gnp_optax.diagnostics._moments import has_moment

PyTree = Any


def plain_statistics(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Feed an optimizer's second moments with the plain gradient, all else with the regularized.

    With `v' = a v + c g^2` the second moment, the optimizer is run on the regularized gradient from
    a moment `v*` with `a v* + c g_reg^2 = a v + c g^2`, so that it arrives at what it would have
    been without regularization. What a and c are is found by running it; nothing is computed that
    is not needed, since XLA drops it.

    Args:
        optimizer: One whose state keeps second moments in fields named `nu`, as those of Optax do,
            and whose `v'` depends on v and the gradient as above.

    Returns:
        A transformation with the state of `optimizer`. Its `update(g_reg, state, params,
        plain_gradient=g)` takes both gradients.
    """

    def update_fn(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        plain_gradient: PyTree = None,
        **extra_args: Any,
    ) -> tuple[PyTree, PyTree]:
        del extra_args
        if plain_gradient is None:
            raise TypeError("Pass the plain gradient: update(..., plain_gradient=grads).")

        def moment_after(gradient: PyTree, start: PyTree) -> PyTree:
            return _moments(optimizer.update(gradient, start, params)[1])

        wanted = moment_after(plain_gradient, state)
        zeros, ones = (jax.tree.map(lambda v, x=x: jnp.full_like(v, x), wanted) for x in (0.0, 1.0))
        no_gradient = optax.tree.zeros_like(updates)
        kept = moment_after(no_gradient, _with_moments(state, ones))
        added = moment_after(updates, _with_moments(state, zeros))

        def start(wanted: jax.Array, kept: jax.Array, added: jax.Array) -> jax.Array:
            # Without the margin a moment of 0 may end, rounded, below it; its root would be NaN.
            margin = 4 * jnp.finfo(added.dtype).eps * added
            return (wanted - added + margin) / kept

        moved = _with_moments(state, jax.tree.map(start, wanted, kept, added))
        updates, state = optimizer.update(updates, moved, params)
        return updates, _with_moments(state, wanted)

    return optax.GradientTransformationExtraArgs(optimizer.init, update_fn)


def _moments(state: PyTree) -> list[PyTree]:
    nodes = jax.tree.leaves(state, is_leaf=has_moment)
    return [node.nu for node in nodes if has_moment(node)]


def _with_moments(state: PyTree, moments: list[PyTree]) -> PyTree:
    given = iter(moments)

    def put(node: Any) -> Any:
        return node._replace(nu=next(given)) if has_moment(node) else node

    return jax.tree.map(put, state, is_leaf=has_moment)
