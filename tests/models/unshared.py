"""The regularized gradient from its formula: two plain gradients, with nothing shared."""

import jax
import jax.numpy as jnp
import numpy as np


def _selection(mask, params):
    """Which elements are perturbed: 1.0 or 0.0 for each, or for each layer of a stack."""
    mask = jax.tree.map(lambda _: True, params) if mask is None else mask

    def of_leaf(flag, w):
        layers = np.shape(flag) + (1,) * (np.ndim(w) - np.ndim(flag))
        return np.broadcast_to(np.reshape(flag, layers), np.shape(w)).astype(float)

    return jax.tree.map(lambda m, sub: jax.tree.map(lambda w: of_leaf(m, w), sub), mask, params)


def unshared(fun, r, alpha, mask=None, scope="all", has_aux=False):
    """As `gnp.value_and_grad`, by the formula."""
    plain = jax.value_and_grad(fun, has_aux=has_aux)

    def value_and_grad_fn(params, *args):
        selection = _selection(mask, params)
        value, g = plain(params, *args)
        selected = jax.tree.map(lambda s, x: s * x, selection, g)
        norm = jnp.sqrt(sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(selected)))
        scale = r / jnp.where(norm == 0, 1, norm)

        def move(w, x):
            return (w + scale * jnp.conj(x)).astype(jnp.result_type(w))

        def mix(g, tilde, s):
            weight = alpha * s if scope == "masked" else alpha
            return ((1 - weight) * g + weight * tilde).astype(g.dtype)

        _, tilde = plain(jax.tree.map(move, params, selected), *args)
        return value, jax.tree.map(mix, g, tilde, selection)

    return value_and_grad_fn


def assert_same_tree(got, expected, rtol=1e-12):
    """Of the same structure and types, equal, and as a whole within `rtol` of the expected norm."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    difference = size = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert type(x) is type(y), (x, y)
        if not isinstance(y, (jax.Array, np.ndarray)):
            assert x == y
            continue
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if jnp.issubdtype(y.dtype, jnp.inexact):
            wide = np.result_type(np.complex128 if jnp.iscomplexobj(y) else np.float64)
            difference += np.sum(np.abs(np.asarray(x, wide) - np.asarray(y, wide)) ** 2)
            size += np.sum(np.abs(np.asarray(y, wide)) ** 2)
        elif jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(jax.random.key_data(x), jax.random.key_data(y))
        else:
            np.testing.assert_array_equal(x, y)
    assert np.isfinite(size)
    assert difference <= rtol**2 * size, f"off by {np.sqrt(difference / max(size, 1e-300)):.1e}"
