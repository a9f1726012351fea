"""Losses with known gradients, and small ones without."""

import jax
import jax.numpy as jnp
import numpy as np


class Quadratic:
    """`L(w) = w' H w / 2 + b' w`, with w split into leaves; its gradient is `H w + b`."""

    def __init__(self, seed=0, sizes=(("body", 5), ("head", 3))):
        rng = np.random.default_rng(seed)
        self.sizes = dict(sizes)
        n = sum(self.sizes.values())
        root = rng.normal(size=(n, n))
        self.hessian = root @ root.T / n
        self.b = rng.normal(size=n)
        self.vector = rng.normal(size=n)

    @property
    def params(self):
        return self.tree(self.vector)

    def tree(self, vector):
        ends = np.cumsum(list(self.sizes.values()))[:-1]
        parts = np.split(np.asarray(vector), ends)
        return {name: jnp.asarray(x) for name, x in zip(self.sizes, parts, strict=True)}

    def flat(self, tree):
        return np.concatenate([np.asarray(tree[name]) for name in self.sizes])

    def selection(self, *names):
        """A vector that is 1 on the named leaves."""
        return np.concatenate([np.full(n, float(x in names)) for x, n in self.sizes.items()])

    def loss(self, tree):
        w = jnp.concatenate([tree[name] for name in self.sizes])
        return w @ jnp.asarray(self.hessian) @ w / 2 + jnp.asarray(self.b) @ w

    def gradient(self, vector):
        return self.hessian @ vector + self.b


def mlp(seed=0, dtype=jnp.float32):
    """A two-layer network on random data: (params, loss of (params, x, y), x, y)."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "body": {
            "kernel": jax.random.normal(keys[0], (6, 16), dtype) / 2,
            "bias": jnp.zeros(16, dtype),
        },
        "head": {
            "kernel": jax.random.normal(keys[1], (16, 3), dtype) / 4,
            "bias": jnp.zeros(3, dtype),
        },
    }
    x = jax.random.normal(keys[2], (32, 6), dtype)
    y = jax.random.normal(keys[3], (32, 3), dtype)
    return params, mlp_loss, x, y


def mlp_loss(params, x, y):
    hidden = jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)


def two_layers():
    """A linear network, quick to compile: (params, loss of (params, x, y), x, y)."""
    rng = np.random.default_rng(0)
    shapes = {"body": (4, 5), "head": (5, 2)}
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    x, y = (jnp.asarray(rng.normal(size=(8, n)), jnp.float32) for n in (4, 2))

    def loss(params, x, y):
        return jnp.mean((x @ params["body"] @ params["head"] - y) ** 2)

    return params, loss, x, y


MASK = {"a": False, "b": True}  # of two_matrices


def residual(depth, width=64):
    """Layers of equal cost, each of which is a leaf: (params, loss of (params, x), x)."""
    keys = jax.random.split(jax.random.key(0), depth)
    params = {f"layer_{i}": jax.random.normal(k, (width, width)) / 8 for i, k in enumerate(keys)}
    x = jax.random.normal(jax.random.key(1), (2048, width))

    def loss(params, x):
        for w in params.values():
            x = x + jnp.tanh(x @ w)
        return jnp.mean(x**2)

    return params, loss, x


def two_matrices():
    """Parameters and inputs of `two_matrices_loss`, in the default precision."""
    rng = np.random.default_rng(0)
    a, b, x = (jnp.asarray(rng.normal(size=shape)) for shape in [(3, 3), (3, 3), (4, 3)])
    return {"a": a, "b": b}, x


def two_matrices_loss(params, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]))


def through_transformation(tx, loss, params, **kwargs):
    """The regularized gradient and the state after one update of a transformation."""
    has_aux = kwargs.pop("has_aux", False)
    grads = jax.grad(loss, has_aux=has_aux)(params)
    grads = grads[0] if has_aux else grads
    return tx.update(grads, tx.init(params), params, value_fn=loss, **kwargs)
