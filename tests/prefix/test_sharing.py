"""Prefix sharing on whole models: `1 + q` gradients, and the same numbers as without it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models import linen as models_linen
from models import nnx as models_nnx

import gnp_optax as gnp
import gnp_optax.nnx

KEY = jax.random.key(1)
IMAGES = jax.random.normal(jax.random.key(2), (16, 16, 16, 3))
LABELS = jnp.arange(16) % 3
TOKENS = jnp.arange(4 * 64).reshape(4, 64) % 97


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def linen(model, inputs, labels, *, cast=None):
    """The loss and the parameters of a linen model; with batch statistics they are aux."""
    variables = model.init(jax.random.key(0), inputs)
    statistics = {name: value for name, value in variables.items() if name != "params"}

    def loss(params, inputs, labels, key):
        if cast is not None:
            params, inputs = jax.tree.map(lambda x: x.astype(cast), (params, inputs))
        logits, changed = model.apply(
            {"params": params, **statistics},
            inputs,
            train=True,
            rngs={"dropout": key},
            mutable=list(statistics),
        )
        return cross_entropy(logits.astype(jnp.promote_types(logits.dtype, "float32")), labels), (
            changed
        )

    return loss, variables["params"], (inputs, labels, KEY)


def vit(depth, cast=None, **kwargs):
    model = models_linen.ViT(width=64, tokens=16, depth=depth, **kwargs)
    return linen(model, IMAGES, LABELS, cast=cast)


def resnet(depth):
    return linen(models_linen.ResNet(width=16, last_stage=depth), IMAGES, LABELS)


def language_model(depth):
    model = models_linen.LanguageModel(vocabulary=97, length=64, width=64, depth=depth, tied=True)
    return linen(model, TOKENS, TOKENS)


@jax.custom_vjp
def scaled_tanh(x):
    return 2 * jnp.tanh(x)


def _forward(x):
    y = jnp.tanh(x)
    return 2 * y, y


scaled_tanh.defvjp(_forward, lambda y, t: (2 * t * (1 - y**2),))


def plain(depth):
    """A residual MLP in plain JAX, with a custom derivative and a checkpoint in every layer."""
    keys = jax.random.split(jax.random.key(0), depth + 2)
    blocks = [jax.random.normal(k, (64, 64)) / 8 for k in keys[2:]]
    params = {"embed": jax.random.normal(keys[0], (3 * 16 * 16, 64)) / 30, "blocks": blocks}
    params["head"] = jax.random.normal(keys[1], (64, 3)) / 8

    def loss(params, images, labels):
        x = images.reshape(len(images), -1) @ params["embed"]
        for kernel in params["blocks"]:
            x = jax.checkpoint(lambda x, kernel: x + scaled_tanh(x @ kernel))(x, kernel)
        return cross_entropy(x @ params["head"], labels), None

    return loss, params, (IMAGES, LABELS)


def flops(fun, *args):
    # Only the machine code is not optimized: it is the same program, compiled more quickly.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(fun).lower(*args).compile(options).cost_analysis()["flops"]


def run(fun, *args):
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(fun).lower(*args).compile(options)(*args)


@functools.cache
def plain_flops(build, depth):
    loss, params, args = build(depth)
    return flops(jax.value_and_grad(loss, has_aux=True), params, *args)


def share_of_a_block(build, depth):
    """What one block takes of the gradient's cost: the difference to a model with one fewer."""
    return 1 - plain_flops(build, depth - 1) / plain_flops(build, depth)


vit_bfloat16 = functools.partial(vit, cast=jnp.bfloat16)
vit_remat = functools.partial(vit, remat=True)
CASES = {
    "vit": (vit, r"^blocks_2/|^norm|^head"),
    "vit-checkpoint": (vit_remat, r"^blocks_2/|^norm|^head"),
    "vit-bfloat16": (vit_bfloat16, r"^blocks_2/|^norm|^head"),
    "resnet": (resnet, r"^stages_1_2/|^head"),
    "plain": (plain, r"^blocks_2|^head"),
}


@pytest.mark.exhaustive(but=["vit-all-number", "plain-masked-traced"])
@pytest.mark.parametrize(("scope", "alpha"), [("all", "number"), ("masked", "traced")])
@pytest.mark.parametrize("name", CASES)
def test_last_block_and_head(name, alpha, scope):
    build, regex = CASES[name]
    loss, params, args = build(3)
    loss = jax.jit(loss) if scope == "all" else loss
    mask = gnp.masks.by_path(regex)

    def gradient(alpha, params, *args):
        return gnp.value_and_grad(loss, 0.1, alpha, mask=mask, scope=scope, has_aux=True)(
            params, *args
        )

    if alpha == "number":
        cost = flops(functools.partial(gradient, 0.8), params, *args)
    else:
        cost = flops(gradient, jnp.float32(0.8), params, *args)
    assert cost <= (1 + share_of_a_block(build, 3) + 0.02) * plain_flops(build, 3)


@pytest.mark.exhaustive
def test_last_block_below_a_tied_head():
    """The embedding is used before the cut and after it; the head counts as after it."""
    loss, params, args = language_model(3)
    mask = gnp.masks.by_path("^blocks_2/")
    cost = flops(gnp.value_and_grad(loss, 0.1, 0.8, mask=mask, has_aux=True), params, *args)
    plain_cost = plain_flops(language_model, 3)
    after = plain_flops(language_model, 1)  # an embedding is a look-up, and costs nothing
    assert cost <= 1.02 * plain_cost + after


@pytest.mark.exhaustive
@pytest.mark.parametrize("scope", ["all", "masked"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_head_alone_costs_nothing(name, scope):
    build, _ = CASES[name]
    loss, params, args = build(3)
    mask = gnp.masks.by_path("^head")
    gradient = gnp.value_and_grad(loss, 0.1, 0.8, mask=mask, scope=scope, has_aux=True)
    assert flops(gradient, params, *args) <= 1.01 * plain_flops(build, 3)


@pytest.mark.exhaustive(but=["resnet"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_all_layers_cost_two_gradients(name):
    build, _ = CASES[name]
    loss, params, args = build(3)
    gradient = gnp.value_and_grad(loss, 0.1, 0.8, has_aux=True)
    assert flops(gradient, params, *args) <= 2.01 * plain_flops(build, 3)


def nnx_flops(gradient, depth):
    model = models_nnx.ViT(width=64, tokens=16, depth=depth, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    def pure(state, images, labels):
        return gradient(nnx.merge(graphdef, state), images, labels)

    return flops(pure, state, IMAGES, LABELS)


def nnx_loss(model, images, labels):
    return cross_entropy(model(images), labels)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scope", ["all", "masked"])
def test_nnx(scope):
    mask = gnp.masks.by_path(r"^blocks_2/|^norm|^head")
    cost = nnx_flops(
        gnp.nnx.value_and_grad(nnx_loss, 0.1, 0.8, mask=mask, scope=scope, wrt=nnx.Param), 3
    )
    whole, without = (nnx_flops(nnx.value_and_grad(nnx_loss), depth) for depth in (3, 2))
    assert cost <= 2.02 * whole - without


@pytest.mark.exhaustive(but=["all"])
@pytest.mark.parametrize("scope", ["all", "masked"])
def test_equinox(scope):
    def build(depth):
        model = eqx.nn.MLP(768, 3, 256, depth, key=jax.random.key(0))
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss(params):
            # Enough examples that arithmetic on the parameters does not count.
            images, labels = jnp.tile(IMAGES.reshape(16, -1), (16, 1)), jnp.tile(LABELS, 16)
            return cross_entropy(jax.vmap(eqx.combine(params, static))(images), labels)

        return loss, params

    loss, params = build(3)
    mask = gnp.masks.by_path(r"layers_[23]")  # the last hidden layer and the output
    whole, without = (flops(jax.value_and_grad(f), p) for f, p in (build(3), build(2)))
    cost = flops(gnp.value_and_grad(loss, 0.1, 0.8, mask=mask, scope=scope), params)
    assert cost <= 2.02 * whole - without


def unshared(loss, params, selected, alpha, scope, *args):
    """The two passes one after the other; `selected` is a tree of bools."""
    (value, aux), g = jax.value_and_grad(loss, has_aux=True)(params, *args)
    kept = jax.tree.map(lambda g, s: g * s, g, selected)
    scale = 0.1 / jnp.sqrt(sum(jnp.sum(k**2) for k in jax.tree.leaves(kept)))
    moved = jax.tree.map(lambda w, k: w + scale * k, params, kept)
    tilde = jax.grad(loss, has_aux=True)(moved, *args)[0]
    weights = jax.tree.map(lambda s: alpha * (s or scope == "all"), selected)
    mixed = jax.tree.map(lambda g, t, a: (1 - a) * g + a * t, g, tilde, weights)
    return (value, aux), mixed


@pytest.mark.exhaustive(but=["plain-masked"])
@pytest.mark.parametrize(
    ("build", "scope"),
    [
        (vit, "all"),
        (vit_remat, "masked"),
        (resnet, "all"),
        (resnet, "masked"),
        (language_model, "all"),
        (plain, "masked"),
    ],
)
@pytest.mark.usefixtures("x64")
def test_same_numbers_as_without_sharing(build, scope):
    loss, params, args = build(2)
    args = *(x[:4] for x in args[:2]), *args[2:]
    params, args = jax.tree.map(
        lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, (params, args)
    )
    regex = {resnet: "^stages_1_1/|^head"}.get(build, "^blocks_1|^norm|^head")
    mask = gnp.masks.by_path(regex)
    shared = gnp.value_and_grad(loss, 0.1, 0.8, mask=mask, scope=scope, has_aux=True)

    def other(params, *args):
        return unshared(loss, params, mask(params), 0.8, scope, *args)

    found, expected = (run(fun, params, *args) for fun in (shared, other))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * max(1, np.abs(b).max()))


def test_the_loss_is_traced_once():
    loss, params, args = plain(2)
    traces = 0

    def counted(params, *args):
        nonlocal traces
        traces += 1
        return loss(params, *args)

    mask = gnp.masks.by_path("^head")
    jax.jit(gnp.value_and_grad(counted, 0.1, 0.8, mask=mask, has_aux=True)).lower(params, *args)
    assert traces == 1


def stacked(layers, selected):
    """Residual layers under `lax.scan`, and a mask for the last of them and the head."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "embed": jax.random.normal(keys[0], (16, 64)) / 4,
        "blocks": {
            "kernel": jax.random.normal(keys[1], (layers, 64, 64)) / 8,
            "bias": jnp.zeros((layers, 64)),
        },
        "head": jax.random.normal(keys[2], (64, 3)) / 8,
    }

    def layer(x, block):
        return x + jnp.tanh(x @ block["kernel"] + block["bias"]), None

    def loss(params, x, labels):
        x, _ = jax.lax.scan(layer, x @ params["embed"], params["blocks"], unroll=layers)
        return cross_entropy(x @ params["head"], labels)

    x = jax.random.normal(KEY, (512, 16))
    mask = gnp.masks.stacked("^blocks/", last=selected) | gnp.masks.by_path("^head")
    return loss, params, (x, jnp.arange(512) % 3), mask


@pytest.mark.exhaustive(but=["3"])
@pytest.mark.parametrize("selected", [1, 3, 8])
def test_last_layers_of_a_scan(selected):
    """Unrolled, since XLA counts the body of a loop once, however often it runs."""
    loss, params, args, mask = stacked(8, selected)
    gradient = gnp.value_and_grad(loss, 0.1, 0.8, mask=mask)
    whole = flops(jax.value_and_grad(loss), params, *args)
    assert flops(gradient, params, *args) <= (1 + selected / 8 + 0.03) * whole
    counted = gnp.masks.cost(loss, params, mask, *args)
    assert abs(counted - (1 + selected / 8)) < 0.05


def loops(jaxpr):
    """The lengths of all scans, inside jitted functions as well."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn.params["length"]
        for param in eqn.params.values():
            if hasattr(param, "jaxpr") and eqn.primitive.name in ("jit", "pjit"):
                yield from loops(param.jaxpr)


def test_a_scan_is_cut_in_two():
    """Forward and backward over the first layers once, over the last ones twice."""
    loss, params, args, mask = stacked(8, 3)
    gradient = gnp.value_and_grad(loss, 0.1, 0.8, mask=mask)
    lengths = sorted(loops(jax.make_jaxpr(gradient)(params, *args).jaxpr))
    assert lengths == [3, 3, 3, 3, 5, 5]
