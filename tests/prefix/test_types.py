"""Prefix sharing with parameters and aux of every type, and with stacked layers."""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models.problems import MASK, two_matrices
from models.problems import two_matrices_loss as loss
from models.unshared import assert_same_tree, unshared

import gnp_optax as gnp

pytestmark = pytest.mark.usefixtures("x64")


def check(fun, params, mask, scope="all", has_aux=False, jit=False, rtol=1e-12):
    """Compare with the formula."""
    results = []
    for transform in (gnp.value_and_grad, unshared):
        compute = transform(fun, 0.1, 0.7, mask=mask, scope=scope, has_aux=has_aux)
        results.append((jax.jit(compute) if jit else compute)(params))
    assert_same_tree(*results, rtol)


# Aux


@flax.struct.dataclass
class Record:
    array: jax.Array
    name: str = flax.struct.field(pytree_node=False)


@jax.tree_util.register_pytree_node_class
class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second

    def tree_flatten(self):
        return (self.first, self.second), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


AUX = {
    "Python values": lambda p, h, out: (1, 2.5, True, 1j, None, "word", b"bytes", print, {}),
    "NumPy values": lambda p, h, out: (np.ones(2), np.float32(1), np.array(["word"])),
    "JAX constants": lambda p, h, out: (jnp.ones(2), jnp.asarray(1.0), jnp.zeros((), "bfloat16")),
    "constants of a jitted function": lambda p, h, out: jax.jit(
        lambda x: (1, 2.5, True, np.float32(1), np.arange(2), jnp.ones(2), x)
    )(out),
    "custom nodes": lambda p, h, out: Pair(Record(h, "h"), [Record(out, "out"), Pair(1, "one")]),
    "keys": lambda p, h, out: (
        jax.random.key(0),
        jax.random.PRNGKey(0),
        jax.random.split(jax.random.fold_in(jax.random.key(0), jnp.argmax(out))),
    ),
    "integers and bools": lambda p, h, out: (jnp.argmax(h), jnp.argmax(out), h > 0, out > 0),
    "the parameters": lambda p, h, out: (p, jax.tree.map(lax.stop_gradient, p)),
    "a gradient of an integer": lambda p, h, out: jax.grad(
        lambda i, y: jnp.sum(y[i]), (0, 1), allow_int=True
    )(jnp.asarray(1), h),
    "nothing": lambda p, h, out: (),
}


@pytest.mark.parametrize("kind", AUX)
def test_aux_comes_back_as_it_is(kind):
    params, x = two_matrices()

    def fun(p):
        h = jnp.tanh(x @ p["a"])
        out = jnp.tanh(h @ p["b"])
        return out.sum(), AUX[kind](p, h, out)

    check(fun, params, MASK, has_aux=True)


def weak_types(tree):
    return [leaf.weak_type for leaf in jax.tree.leaves(tree)]


def test_value_and_aux_are_as_weakly_typed_as_without_regularization():
    params = {"a": 2.0, "b": 3.0, "c": np.float32(1.5), "d": jnp.asarray(1.0)}

    def fun(p):
        return p["a"] * p["b"], (p["a"] + 1, 2 * p["b"], p["c"] * p["a"], p["d"] * p["b"])

    mask = {"a": False, "b": True, "c": False, "d": False}
    got, grads = gnp.value_and_grad(fun, 0.1, 0.7, mask=mask, has_aux=True)(params)
    expected, plain = jax.value_and_grad(fun, has_aux=True)(params)
    assert weak_types(got) == weak_types(expected)
    assert [g.dtype for g in jax.tree.leaves(grads)] == [g.dtype for g in jax.tree.leaves(plain)]
    assert_same_tree(got, expected)


@pytest.mark.parametrize("constant", [1.0, np.float32(1.0), jnp.asarray(1.0)])
def test_a_constant_loss(constant):
    check(lambda p: constant, two_matrices()[0], MASK)


@pytest.mark.parametrize("ignored", ["a", "b"])
def test_a_loss_that_ignores_a_leaf(ignored):
    params, x = two_matrices()
    check(lambda p: loss({**p, ignored: jnp.ones((3, 3))}, x), params, MASK)


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_leaf_as_the_loss(name):
    check(lambda p: p[name], {"a": jnp.ones(()), "b": jnp.full((), 2.0)}, MASK)


# Parameters


@pytest.mark.exhaustive
def test_leaves_of_every_kind():
    params, x = two_matrices()
    params = {
        **params,
        "scalar": jnp.asarray(2.0),
        "numpy": np.linspace(1, 2, 3),
        "empty": jnp.zeros((0, 3)),
        "perturbed empty": jnp.zeros((2, 0)),
        "perturbed scalar": jnp.asarray(0.5),
        "perturbed numpy": np.ones(3),
        "complex": jnp.asarray([1 + 2j, 3j, 1]),
        "perturbed complex": jnp.asarray([1j, 2 - 1j, 1]),
    }

    def fun(p):
        z = jnp.abs(p["complex"] * p["perturbed complex"] + p["perturbed scalar"])
        factor = p["scalar"] * p["numpy"] * p["perturbed numpy"] * z
        return loss(p, x * factor) + sum(jnp.sum(p[name]) for name in ("empty", "perturbed empty"))

    mask = {name: name == "b" or name.startswith("perturbed") for name in params}
    check(fun, params, mask)


def test_leaves_of_lower_precision():
    """They round when a cotangent is pulled back, so that it matters what is mixed."""
    params, x = two_matrices()
    params = {"a": params["a"].astype(jnp.float32), "b": params["b"].astype(jnp.bfloat16)}
    check(lambda p: loss(p, x), params, MASK, rtol=1e-2)
    check(lambda p: loss(p, x), params, {"a": True, "b": False}, rtol=1e-2)


@pytest.mark.parametrize("mask", [None, {"scale": True, "x": False}])
def test_a_weakly_typed_leaf_keeps_the_types_of_the_program(mask):
    """A Python number: `bfloat16 * number` is bfloat16, and so must `bfloat16 * perturbed` be."""

    def fun(p):
        h, _ = lax.scan(lambda c, _: (c * p["scale"], None), p["x"], None, length=2)
        return h.astype(jnp.float32).sum()

    params = {"scale": jnp.asarray(2.0), "x": jnp.ones(3, jnp.bfloat16)}
    value, g = jax.value_and_grad(fun)(params)
    perturbed = {"scale": 2.0 + 0.5, "x": params["x"]}
    if mask is None:
        norm = np.sqrt(sum(float(jnp.sum(jnp.float32(x) ** 2)) for x in jax.tree.leaves(g)))
        move = jax.tree.map(lambda w, g: w + jnp.asarray(0.5 / norm * g, w.dtype), params, g)
        perturbed = {"scale": float(move["scale"]), "x": move["x"]}
    expected = jax.grad(fun)(perturbed)
    core = gnp.value_and_grad(fun, 0.5, 1.0, mask=mask)(params)
    tx = gnp.gradient_regularization(0.5, 1.0, mask=mask)
    updates, _ = tx.update(g, tx.init(params), params, value_fn=fun)
    assert core[0] == value
    for got in (core[1], updates):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), got, expected)
        assert got["x"].dtype == jnp.bfloat16


def test_the_same_array_in_two_leaves():
    a, x = two_matrices()[0]["a"], two_matrices()[1]
    check(lambda p: loss(p, x), {"a": a, "b": a}, MASK)


def test_constants_of_the_program():
    params, x = two_matrices()
    table = np.linspace(-1, 1, 9).reshape(3, 3)
    check(lambda p: loss({"a": p["a"] + params["b"], "b": p["b"] * table}, x), params, MASK)


def test_halves_of_a_checkpoint():
    params, x = two_matrices()

    def block(p, h):
        h = jnp.tanh(jnp.tanh(h @ p["a"]) @ p["b"])
        return h, (h.mean(), jnp.argmax(h))

    def fun(p):
        h, aux = jax.checkpoint(block)(p, x)
        h, more = jax.checkpoint(jax.jit(block), policy=jax.checkpoint_policies.dots_saveable)(p, h)
        return h.sum(), (aux, more)

    check(fun, params, MASK, has_aux=True)
    check(fun, params, MASK, has_aux=True, scope="masked", jit=True)
    check(jax.checkpoint(fun), params, MASK, has_aux=True)


# Exact curvature


@pytest.mark.exhaustive(but=["1.0"])
@pytest.mark.parametrize("alpha", [1e-2, 1.0])
def test_exact_curvature_survives_a_cut_between_bfloat16_activations(alpha):
    """Float32 parameters: what the penalty adds is right even where it is far below the rounding.

    Added to the gradient at the cut, in bfloat16, it would be off by a factor of 8.
    """
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(64, 64)) / 8, jnp.float32) for name in "ab"}
    x, y = (jnp.asarray(rng.normal(size=(32, 64)), jnp.float32) for _ in "xy")
    r = 0.1

    def fun(p, dtype=jnp.bfloat16):
        h = jnp.tanh(x.astype(dtype) @ p["a"].astype(dtype))
        out = jnp.tanh(h @ p["b"].astype(dtype))
        return jnp.mean((out.astype(jnp.float32) - y) ** 2)

    def penalty(p):
        g = jax.grad(lambda b: fun({**p, "b": b}, jnp.float32))(p["b"])
        return alpha * r * jnp.sqrt(jnp.sum(g**2))

    def change(alpha):
        core = gnp.value_and_grad(fun, r, alpha, mask=MASK, curvature="exact")
        return jax.jit(core)(params)[1]

    expected = jax.grad(penalty)(params)
    plain, got = change(0.0), change(alpha)
    for name, exact in expected.items():
        error = jnp.linalg.norm(got[name] - plain[name] - exact) / jnp.linalg.norm(exact)
        assert error < 0.03, (name, error)


@pytest.mark.parametrize("scope", ["all", "masked"])
@pytest.mark.parametrize("mask", [MASK, {"a": True, "b": False}, None])
def test_exact_curvature_is_the_gradient_of_the_penalized_loss(mask, scope):
    params, x = two_matrices()
    selected = [name for name in params if mask is None or mask[name]]

    def penalized(p):
        grads = jax.grad(loss)(p, x)
        return loss(p, x) + 0.3 * jnp.sqrt(sum(jnp.sum(grads[name] ** 2) for name in selected))

    _, got = gnp.value_and_grad(loss, 0.1, 3.0, mask=mask, scope=scope, curvature="exact")(
        params, x
    )
    expected, plain = jax.grad(penalized)(params), jax.grad(loss)(params, x)
    receiving = params if scope == "all" else selected
    assert_same_tree(got, {k: expected[k] if k in receiving else plain[k] for k in params})


# Stacked layers

SELECTIONS = [[False, False, True], [False, True, False], [True, False, False], [True, False, True]]


def stacked():
    rng = np.random.default_rng(0)
    shapes = {"first": (3, 3), "w": (3, 3, 3), "b": (3, 3)}
    return {name: jnp.asarray(rng.normal(size=shape)) / 2 for name, shape in shapes.items()}


def select(w, b=False):
    return {"first": False, "w": np.array(w), "b": b if b is False else np.array(b)}


def block(h, layer):
    h = jnp.tanh(h @ layer["w"] + layer["b"])
    return h, (h.sum(), layer["b"], jnp.argmax(h))


def run(params, body=block, cast=lambda x: x, **kwargs):
    x = two_matrices()[1]
    layers = jax.tree.map(cast, {name: params[name] for name in "wb"})
    h, ys = lax.scan(body, cast(jnp.tanh(x @ params["first"])), layers, **kwargs)
    return jnp.sum(h.astype(float) ** 2) + jnp.sum(jnp.cos(ys[0].astype(float))), ys


@pytest.mark.exhaustive(but=["selection3"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_some_layers_of_a_stack(selection):
    check(run, stacked(), select(selection), has_aux=True)
    check(run, stacked(), select(selection), has_aux=True, scope="masked", jit=True)


@pytest.mark.parametrize("b", [[False, False, True], [True, False, False], [True, True, True]])
def test_other_layers_of_another_stack(b):
    check(run, stacked(), select([False, True, True], b), has_aux=True)


VARIANTS = {
    "reverse": functools.partial(run, reverse=True),
    "unroll 2": functools.partial(run, unroll=2),
    "unrolled": functools.partial(run, unroll=True),
    "checkpoint": functools.partial(run, body=jax.checkpoint(block)),
    "jit": jax.jit(run),
    "jit of the body": functools.partial(run, body=jax.jit(block)),
    "checkpoint of all": jax.checkpoint(run),
    "arithmetic": functools.partial(run, cast=lambda w: -(2 * w + 1) / 3),
    "half of the steps": lambda p: run({**p, "w": p["w"][1:], "b": p["b"][:2]}),
    "vmap": lambda p: jax.tree.map(
        lambda y: y.sum(0), jax.vmap(lambda s: run({**p, "first": s * p["first"]}))(jnp.arange(2.0))
    ),
    "without a scan": lambda p: (sum(jnp.tanh(p["first"] @ w).sum() for w in p["w"]), p["w"]),
    "associative scan": lambda p: (lax.associative_scan(jnp.matmul, p["w"]).sum(), p["w"][0]),
}


@pytest.mark.exhaustive(but=["unroll 2", "checkpoint", "jit", "without a scan"])
@pytest.mark.parametrize("name", VARIANTS)
def test_scan_over_a_stack(name):
    mask = select([False, True, True], [False, False, True])
    check(VARIANTS[name], stacked(), mask, has_aux=True)


@pytest.mark.exhaustive
def test_scan_over_a_stack_in_bfloat16():
    """Which rounds when a cotangent is pulled back, so that it matters what is mixed."""
    fun = functools.partial(run, cast=lambda w: w.astype(jnp.bfloat16))
    check(fun, stacked(), select([False, True, True]), has_aux=True, rtol=1e-2)


def test_a_second_scan_over_what_the_first_collects():
    def fun(p):
        _, ys = run(p)
        return lax.scan(lambda h, w: (jnp.tanh(h @ w[0] + w[1]), None), p["first"],
                        (p["w"], 2 * ys[1]))[0].sum()  # fmt: skip

    check(fun, stacked(), select([False, True, True], [False, False, True]))


@pytest.mark.exhaustive
def test_keys_in_a_scan_over_a_stack():
    keys = jax.random.split(jax.random.key(0), 3)

    def body(carry, layer):
        h, key, step = carry
        w, dropout = layer
        h = jnp.tanh(h @ w) * jax.random.bernoulli(dropout, 0.8, h.shape)
        return (h, jax.random.fold_in(key, step), step + 1), (dropout, key)

    def fun(p):
        start = (p["first"], jax.random.key(1), 0)
        (h, *rest), ys = lax.scan(body, start, (p["w"], keys))
        return h.sum(), (rest, ys)

    check(fun, stacked(), select([False, True, True]), has_aux=True)
