"""Models of other people's packages, as they are: value, aux, gradient and cost."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from models.unshared import assert_same_tree, unshared

import gnp_optax as gnp
from gnp_optax.masks import _flops

R, ALPHA = 0.1, 0.8
KEY = jax.random.key(0)
CLASSES = 3

pytestmark = pytest.mark.exhaustive


class Case(NamedTuple):
    """A model with a loss.

    Attributes:
        loss: Returns the loss of parameters, and aux.
        params: The parameters.
        mask: Which leaves are perturbed.
        rest: What the loss does after it has computed, without a perturbed leaf, `h`: a function
            of the parameters and of `h`.
        h: The shapes of that.
    """

    loss: Callable[[Any], tuple[jax.Array, Any]]
    params: Any
    mask: Any
    rest: Callable[[Any, Any], jax.Array]
    h: Any


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(KEY, sum(shape)), shape)


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def cross_entropy(logits: jax.Array) -> jax.Array:
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])


def equinox(model: eqx.Module, run: Callable, rest: Callable, h: Any, mask: str) -> Case:
    """Of a model that `run` runs: it returns logits and aux."""
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params):
        logits, aux = run(eqx.combine(params, static))
        return cross_entropy(logits), aux

    def after(params, h):
        return cross_entropy(rest(eqx.combine(params, static), h))

    return Case(loss, params, gnp.masks.by_path(mask), after, h)


def equinox_mlp():
    model, x = eqx.nn.MLP(8, CLASSES, 32, 3, key=KEY), normal(64, 8)
    last = lambda m, h: jax.vmap(m.layers[-1])(h)  # noqa: E731
    return equinox(model, lambda m: (jax.vmap(m)(x), None), last, array(64, 32), "^layers_3/")


class Convolutions(eqx.Module):
    first: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    second: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(3, 8, 3, padding=1, key=one)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.second = eqx.nn.Conv2d(8, 8, 3, key=two)
        self.head = eqx.nn.Linear(8, CLASSES, key=three)

    def __call__(self, x, state):
        x, state = self.norm(self.first(x), state)
        return self.head(jnp.mean(self.second(jax.nn.relu(x)), (1, 2))), state


def equinox_convolutions_with_batch_norm():
    model, state = eqx.nn.make_with_state(Convolutions)(KEY)
    x = normal(8, 3, 6, 6)

    def run(model):
        # A state can be used once; this is another with the same arrays.
        again = jax.tree.map(lambda leaf: leaf, state)
        over = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return over(x, again)

    def rest(model, h):
        return jax.vmap(lambda h: model.head(jnp.mean(model.second(h), (1, 2))))(h)

    return equinox(model, run, rest, array(8, 8, 6, 6), "^(second|head)/")


class Recurrent(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, xs):
        step = lambda h, x: (self.cell(x, h), None)  # noqa: E731
        return self.head(jax.lax.scan(step, jnp.zeros(16), xs)[0])


def equinox_gru_over_a_scan():
    model = Recurrent(eqx.nn.GRUCell(4, 16, key=KEY), eqx.nn.Linear(16, CLASSES, key=KEY))
    x = normal(8, 5, 4)
    last = lambda m, h: jax.vmap(m.head)(h)  # noqa: E731
    return equinox(model, lambda m: (jax.vmap(m)(x), None), last, array(8, 16), "^head/")


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 16, key=one)
        self.norm = eqx.nn.LayerNorm(16)
        self.mlp = eqx.nn.MLP(16, 16, 32, 1, key=two)

    def __call__(self, x):
        x = x + self.attention(x, x, x)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))


def equinox_attention():
    model = [Block(key) for key in jax.random.split(KEY, 2)]
    x = normal(64, 6, 16)

    def run(model):
        return jax.vmap(lambda x: model[1](model[0](x)))(x), None

    last = lambda m, h: jax.vmap(m[1])(h)  # noqa: E731
    return equinox(model, run, last, array(64, 6, 16), "^1/")


def haiku_resnet_block():
    hk = pytest.importorskip("haiku")
    x = normal(8, 6, 6, 3)

    def model(x):
        norm = {"create_scale": True, "create_offset": True, "decay_rate": 0.9}
        block = hk.nets.ResNet.BlockV1(8, 1, True, norm, bottleneck=False)
        h = block(x, is_training=True, test_local_stats=False)
        return hk.Linear(CLASSES)(jnp.mean(h, (1, 2)))

    network = hk.transform_with_state(model)
    params, state = jax.jit(network.init)(KEY, x)

    def loss(params):
        logits, after = network.apply(params, state, None, x)
        return cross_entropy(logits), after

    def rest(params, h):
        logits = params["linear"]
        return cross_entropy(jnp.mean(h, (1, 2)) @ logits["w"] + logits["b"])

    return Case(loss, params, gnp.masks.by_path("^linear/"), rest, array(8, 6, 6, 8))


def haiku_lstm():
    hk = pytest.importorskip("haiku")
    x = normal(5, 8, 4)

    def model(x):
        core = hk.LSTM(16)
        h, _ = hk.dynamic_unroll(core, x, core.initial_state(8))
        return hk.BatchApply(hk.nets.MLP([16, CLASSES]))(h)

    network = hk.without_apply_rng(hk.transform(model))
    params = jax.jit(network.init)(KEY, x)

    def rest(params, h):
        one, two = (params[f"mlp/~/linear_{i}"] for i in range(2))
        h = jax.nn.relu(h.reshape(40, 16) @ one["w"] + one["b"])
        return cross_entropy(h @ two["w"] + two["b"])

    def loss(params):
        return cross_entropy(network.apply(params, x)), None

    return Case(loss, params, gnp.masks.by_path("^mlp/"), rest, array(5, 8, 16))


def jraph_graph_network():
    jraph, hk = pytest.importorskip("jraph"), pytest.importorskip("haiku")
    ring = np.arange(200)
    graph = jraph.GraphsTuple(
        nodes=normal(200, 4),
        edges=normal(200, 4),
        senders=ring,
        receivers=np.roll(ring, 1),
        n_node=np.array([200]),
        n_edge=np.array([200]),
        globals=jnp.zeros((1, 4)),
    )

    def layer(name, graph):
        def update(part):
            one = jraph.concatenated_args(hk.nets.MLP([16, 16], name=f"{name}_{part}"))
            return lambda *args: one(*args)

        return jraph.GraphNetwork(update("edge"), update("node"), update("global"))(graph)

    def run(layers):
        return hk.without_apply_rng(
            hk.transform(lambda graph: functools.reduce(lambda g, n: layer(n, g), layers, graph))
        )

    network = run(["one", "two", "three"])
    params = jax.jit(network.init)(KEY, graph)
    mean = lambda graph: jnp.mean(graph.nodes**2)  # noqa: E731

    def rest(params, h):
        nodes, edges, of_all = h
        given = graph._replace(nodes=nodes, edges=edges, globals=of_all)
        return mean(run(["three"]).apply(params, given))

    def loss(params):
        after = network.apply(params, graph)
        return mean(after), after.globals

    h = array(200, 16), array(200, 16), array(1, 16)
    return Case(loss, params, gnp.masks.by_path("^three"), rest, h)


class Field(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return self.mlp(y)


def diffrax_neural_ode():
    diffrax = pytest.importorskip("diffrax")
    field = Field(eqx.nn.MLP(4, 4, 16, 1, activation=jnp.tanh, key=KEY))
    x = normal(64, 4)

    def solve(field, x):
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Heun(),
            t0=0,
            t1=1,
            dt0=0.25,
            y0=x,
            max_steps=4,
        )
        return found.ys[0]

    def run(model):
        field, head = model
        return jax.vmap(lambda x: head(solve(field, x)))(x), None

    model = field, eqx.nn.MLP(4, CLASSES, 32, 2, key=KEY)
    last = lambda m, h: jax.vmap(m[1])(h)  # noqa: E731
    return equinox(model, run, last, array(64, 4), "^1/")


class Attention(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + linen.MultiHeadDotProductAttention(2)(linen.LayerNorm()(x))
        return linen.Dense(CLASSES)(linen.Dropout(0.5, deterministic=False)(x))


def flax_linen_attention():
    model, x = Attention(), normal(4, 6, 16)
    rngs = {"params": KEY, "dropout": KEY}
    params = jax.jit(model.init)(rngs, x)["params"]

    def loss(params):
        return cross_entropy(model.apply({"params": params}, x, rngs=rngs)), None

    def rest(params, h):
        h = h * jax.random.bernoulli(KEY, 0.5, h.shape)
        return cross_entropy(linen.Dense(CLASSES).apply({"params": params["Dense_0"]}, h))

    return Case(loss, params, gnp.masks.by_path("^Dense"), rest, array(4, 6, 16))


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.lora = nnx.LoRALinear(8, 16, lora_rank=2, rngs=rngs)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.lora(self.norm(self.conv(x)).mean((1, 2)))))


def flax_nnx_with_lora():
    graph, params, state = nnx.split(Normalized(nnx.Rngs(0)), nnx.Param, ...)
    x = normal(4, 8, 8, 3)

    def loss(params):
        model = nnx.merge(graph, params, state, copy=True)
        return cross_entropy(model(x)), nnx.state(model, nnx.BatchStat)

    def rest(params, h):
        model = nnx.merge(graph, params, state, copy=True)
        return cross_entropy(model.head(h))

    return Case(loss, params, gnp.masks.by_path("^head/"), rest, array(4, 16))


CASES = [
    equinox_mlp,
    equinox_convolutions_with_batch_norm,
    equinox_gru_over_a_scan,
    equinox_attention,
    haiku_resnet_block,
    haiku_lstm,
    jraph_graph_network,
    diffrax_neural_ode,
    flax_linen_attention,
    flax_nnx_with_lora,
]


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_public_model(build):
    """Value, aux and gradient are those of two plain passes, and it costs `1 + q`."""
    case = build()

    def both(compute, mask, params):
        everywhere = compute(case.loss, R, ALPHA, has_aux=True)
        last = compute(case.loss, R, ALPHA, mask=mask, scope="masked", has_aux=True)
        return everywhere(params), last(params)

    found = jax.jit(functools.partial(both, gnp.value_and_grad, case.mask))(case.params)
    expected = jax.jit(functools.partial(both, unshared, case.mask(case.params)))(case.params)
    for got, by_formula in zip(found, expected, strict=True):
        assert_same_tree(got, by_formula, rtol=2e-5)
    # The perturbation has an effect that the tolerance would not hide.
    (_, everywhere), (_, last) = found
    pairs = zip(jax.tree.leaves(everywhere), jax.tree.leaves(last), strict=True)
    assert max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) > 1e-4

    plain = _flops.flops(jax.value_and_grad(case.loss, has_aux=True), case.params)
    rest = _flops.flops(jax.value_and_grad(case.rest, (0, 1)), case.params, case.h)
    cost = gnp.masks.cost(case.loss, case.params, case.mask, has_aux=True)
    assert cost < 1 + rest / plain + 0.03
