"""What is counted in a trace, against what XLA counts in the compiled program."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import gnp_optax as gnp
from gnp_optax import masks
from gnp_optax.experiments.models.resnets import ResNet
from gnp_optax.experiments.models.transformers import GPT, ViT
from gnp_optax.masks import _flops

KEY = jax.random.key(0)


def compiled(fun, *args):
    # Only the machine code is not optimized: it is the same program, compiled more quickly.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(fun).lower(*args).compile(options).cost_analysis().get("flops", 0)


IMAGES, KERNEL = jnp.ones((2, 9, 8, 4)), jnp.ones((3, 3, 4, 6))
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolution(strides=(1, 1), padding="SAME", **kwargs):
    def fun(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=DIMENSIONS, **kwargs
        )

    return fun


def dropped_twice(x):
    """The bits of one key, drawn by two functions."""
    keep = functools.partial(jax.random.bernoulli, KEY, 0.9, x.shape)
    return jnp.where(keep(), x, 0) + jnp.where(jax.jit(keep)(), 0, x.T)


PROGRAMS = {
    "padding": (convolution(), IMAGES, KERNEL),
    "strides": (jax.grad(lambda *a: convolution((2, 2))(*a).sum(), (0, 1)), IMAGES, KERNEL),
    "holes": (convolution(padding="VALID", rhs_dilation=(2, 3)), IMAGES, KERNEL),
    "transposed": (convolution(padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)), IMAGES, KERNEL),
    "groups": (convolution(feature_group_count=2), IMAGES, KERNEL[:, :, :2]),
    "bits": (dropped_twice, jnp.ones((64, 64))),
    "zeros": (lambda x: x + jnp.sqrt(jnp.sum((jnp.zeros((999, 9)) / x) ** 2)), jnp.ones(())),
    "nothing": (lambda x: jnp.concatenate([x.T, x[::-1]]).reshape(2, -1), jnp.ones((64, 64))),
    "powers": (lambda x: x**7 + 1 / x, jnp.ones((64, 64))),
    "normalized": (lambda x: jax.nn.softmax(x) - x.mean(0), jnp.ones((64, 64))),
    "scattered": (lambda t, x: t.at[jnp.array([3, 1])].add(x), jnp.ones((50, 64)), jnp.ones(64)),
    "reduced": (lambda t: lax.reduce(t, 1.0, lambda a, b: a * b + a, (0, 1)), jnp.ones((64, 64))),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_operations_of_a_small_program(name):
    if name == "zeros" and jax.__version_info__ < (0, 7):
        pytest.skip("an older XLA divides every zero")
    fun, *args = PROGRAMS[name]
    np.testing.assert_allclose(_flops.flops(fun, *args), compiled(fun, *args), rtol=0.1, atol=20)


def perceptron(batch):
    names, width = [f"layer_{i}" for i in range(4)], 64
    params = {n: {"kernel": jnp.ones((width, width)), "bias": jnp.ones(width)} for n in names}
    params["logits"] = {"kernel": jnp.ones((width, 10)), "bias": jnp.ones(10)}

    def logits(params, x):
        for name, layer in params.items():
            keep = jax.random.bernoulli(jax.random.fold_in(KEY, len(name)), 0.9, x.shape)
            x = jnp.tanh(jnp.where(keep, x, 0) @ layer["kernel"] + layer["bias"])
        return x

    return logits, params, (jnp.ones((batch, width)),), "^(layer_3|logits)/"


def linen(model, x, mask, **kwargs):
    variables = jax.eval_shape(model.init, KEY, x)
    params, *rest = (
        jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), variables.get(name, {}))
        for name in ("params", "batch_stats")
    )

    def logits(params, x):
        variables = {"params": params, "batch_stats": rest[0]}
        options = {"mutable": ["batch_stats"], "rngs": {"dropout": KEY}} if kwargs else {}
        found = model.apply(variables, x, **kwargs, **options)
        return found[0] if kwargs else found

    return logits, params, (x,), mask


def vit(batch):
    images = jnp.ones((batch, 32, 32, 3))
    return linen(ViT(10, 8, 64, 2, 4, dropout=0.1), images, "^(block_1|norm|head)/", train=True)


def resnet(batch):
    images = jnp.ones((batch, 32, 32, 3))
    return linen(ResNet(10, (16, 32, 64), 1), images, "^(block_2|head)/", train=True)


def gpt(batch):
    tokens = jnp.zeros((batch, 32), int)
    return linen(GPT(100, 32, 64, 2, 4, dropout=0.1), tokens, "^(block_1|norm)/", train=True)


def experts(batch):
    tokens, width, number = batch * 16, 32, 4
    layer = {
        "gate": jnp.ones((width, number)),
        "up": jnp.ones((number, width, 4 * width)),
        "down": jnp.ones((number, 4 * width, width)),
    }
    params = {"layer_0": layer, "layer_1": layer, "head": jnp.ones((width, 10))}

    def logits(params, x):
        for layer in (params["layer_0"], params["layer_1"]):
            gates = jax.nn.softmax(x @ layer["gate"])
            chosen = jnp.argmax(gates, -1)
            order, sizes = jnp.argsort(chosen), jnp.bincount(chosen, length=number)
            h = jax.nn.gelu(lax.ragged_dot(x[order], layer["up"], sizes))
            h = jnp.zeros_like(x).at[order].set(lax.ragged_dot(h, layer["down"], sizes))
            x = x + h * jnp.take_along_axis(gates, chosen[:, None], -1)
        return x @ params["head"]

    return logits, params, (jnp.ones((tokens, width)),), "^(layer_1|head)"


def all_experts(batch):
    return *experts(batch)[:3], "."


class Recurrent(nn.Module):
    unroll: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.RNN(nn.GRUCell(32), unroll=self.unroll)(x)
        return nn.Dense(10, name="head")(x)


def recurrent(batch, unroll=1):
    return linen(Recurrent(unroll), jnp.ones((batch, 12, 16)), "^(GRUCell_1|head)/")


def graph(batch):
    nodes, width = 16 * batch, 32
    ends = np.random.default_rng(0).integers(0, nodes, (2, 4 * nodes))
    layer = {"edge": jnp.ones((2 * width, width)), "node": jnp.ones((2 * width, width))}
    params = {"layer_0": layer, "layer_1": layer, "head": jnp.ones((width, 10))}

    def logits(params, x):
        for layer in (params["layer_0"], params["layer_1"]):
            messages = jnp.concatenate([x[ends[0]], x[ends[1]]], -1) @ layer["edge"]
            received = jax.ops.segment_sum(jax.nn.relu(messages), ends[1], nodes)
            x = x + jax.nn.relu(jnp.concatenate([x, received], -1) @ layer["node"])
        return jax.ops.segment_sum(x, jnp.arange(nodes) // 16, batch) @ params["head"]

    return logits, params, (jnp.ones((nodes, width)),), "^(layer_1|head)"


@pytest.mark.exhaustive(but=["perceptron-4"])
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        *((perceptron, 4), (perceptron, 128), (vit, 4), (resnet, 4)),
        *((gpt, 4), (experts, 4), (all_experts, 4), (recurrent, 4), (graph, 4)),
    ],
)
def test_cost_is_what_the_compiler_counts(build, batch):
    """Also for few examples, where arithmetic on the parameters and random bits weigh."""
    logits, params, args, regex = build(batch)
    mask = masks.by_path(regex)

    def loss_of(logits):
        def loss(params, *args):
            found = logits(params, *args)
            labels = jnp.zeros(found.shape[:-1], int)
            return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        return loss

    # XLA takes the body of a loop once; without the loop it is the same program.
    unrolled = loss_of(recurrent(batch, unroll=12)[0] if build is recurrent else logits)
    exact = compiled(gnp.value_and_grad(unrolled, 0.1, 0.5, mask=mask), params, *args)
    exact /= compiled(jax.value_and_grad(unrolled), params, *args)
    told = masks.cost(loss_of(logits), params, mask, *args)
    assert abs(told / exact - 1) < 0.03
