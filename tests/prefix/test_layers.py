"""Sharing however a loop comes to its layers: the cost of the same model over a concatenation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models.unshared import assert_same_tree, unshared

import gnp_optax as gnp

LAYERS = 4
tree_map = jax.tree.map


def layer(h, p):
    return h + jnp.tanh(h @ p["kernel"] + p["bias"])


def step(h, p):
    return layer(h, p), None


def at(blocks, i):
    return tree_map(lambda w: w[i], blocks)


def of_blocks(run):
    """A loss whose layers are run by `run(blocks, h)`."""

    def loss(params, x):
        h = run(params["blocks"], x @ params["embed"])
        return -jnp.mean(jax.nn.log_softmax(h @ params["head"])[:, 0])

    return loss


def over(prepare):
    """A loss with a scan over the layers, as `prepare` hands them over."""
    return of_blocks(lambda blocks, h: lax.scan(step, h, prepare(blocks))[0])


over_a_concatenation = over(lambda blocks: blocks)


def over_a_list(blocks):
    return tree_map(lambda *layers: jnp.stack(layers), *blocks)


def over_a_list_along_another_axis(blocks):
    stacks = tree_map(lambda *layers: 2 * jnp.stack(layers, axis=-1), *blocks)
    return tree_map(lambda w: jnp.moveaxis(w, -1, 0) / 2, stacks)


def sharded(blocks):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    return tree_map(lambda w: lax.with_sharding_constraint(w, spec), blocks)


def behind_a_barrier(blocks, h):
    blocks, h = lax.optimization_barrier((blocks, h))
    return lax.scan(step, h, blocks)[0]


def normalized(blocks):
    kernel = blocks["kernel"]
    kernel = kernel / jnp.linalg.norm(kernel, axis=(1, 2), keepdims=True)
    scale = jnp.linspace(1, 2, LAYERS)
    return {**blocks, "kernel": kernel * scale[:, None, None]}


def prepared_one_by_one(blocks):
    def prepare(kernel):
        centred = kernel - jnp.mean(kernel, axis=0)
        return jnp.where(jnp.abs(centred) > 1e-4, centred, 0.0).T.reshape(-1)

    kernel = jax.vmap(prepare)(blocks["kernel"])
    return {**blocks, "kernel": kernel.reshape(blocks["kernel"].shape).swapaxes(1, 2)}


def in_groups(blocks, size):
    return tree_map(lambda w: w.reshape(-1, size, *w.shape[1:]), blocks)


def in_pairs(blocks, h):
    def two(h, pair):
        return layer(layer(h, at(pair, 0)), at(pair, 1)), None

    return lax.scan(two, h, in_groups(blocks, 2))[0]


def scan_of_scans(inner, blocks, h):
    return lax.scan(inner, h, in_groups(blocks, 2))[0]


def inner_scan(h, group):
    return lax.scan(step, h, group)


def in_groups_and_back(blocks):
    return tree_map(lambda w: w.reshape(-1, *w.shape[2:]), in_groups(blocks, 2))


def backwards(blocks, h):
    flipped = tree_map(lambda w: w[::-1], blocks)
    return lax.scan(step, h, flipped, reverse=True)[0]


def by_index(blocks, h):
    return lax.fori_loop(0, LAYERS, lambda i, h: layer(h, at(blocks, i)), h)


def by_taking(blocks, h):
    def one(h, i):
        return layer(h, tree_map(lambda w: jnp.take(w, i, axis=0), blocks)), None

    return lax.scan(one, h, jnp.arange(LAYERS))[0]


def by_index_in_checkpoints(blocks, h):
    @jax.checkpoint
    def one(h, i):
        pick = functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
        return layer(h, tree_map(pick, blocks)), None

    return lax.scan(one, h, jnp.arange(LAYERS))[0]


def by_two_indices(blocks, h):
    def inner(i, j, h):
        return layer(h, at(blocks, 2 * i + j))

    return lax.fori_loop(0, 2, lambda i, h: lax.fori_loop(0, 2, lambda j, h: inner(i, j, h), h), h)


def carried(params, x):
    """All parameters are carried, and the layers are scanned over."""

    def one(carry, p):
        h, params = carry
        return (layer(h, p), params), None

    (h, params), _ = lax.scan(one, (x @ params["embed"], params), params["blocks"])
    return -jnp.mean(jax.nn.log_softmax(h @ params["head"])[:, 0])


def carried_with_their_index(params, x):
    def one(carry):
        i, h, params = carry
        return i + 1, layer(h, at(params["blocks"], i)), params

    carry = 0, x @ params["embed"], params
    one = jax.jit(one)
    _, h, params = lax.fori_loop(0, LAYERS, lambda _, carry: one(carry), carry)
    return -jnp.mean(jax.nn.log_softmax(h @ params["head"])[:, 0])


MODELS = {
    "list": over(over_a_list),
    "list along another axis": over(over_a_list_along_another_axis),
    "checkpointed scan": of_blocks(
        lambda blocks, h: jax.checkpoint(lambda h, p: lax.scan(step, h, p)[0])(h, blocks)
    ),
    "whole loss in a checkpoint": jax.checkpoint(
        of_blocks(lambda blocks, h: lax.scan(jax.checkpoint(step), h, blocks)[0])
    ),
    "sharded": over(sharded),
    "barrier": of_blocks(behind_a_barrier),
    "carried": carried,
    "carried with their index": carried_with_their_index,
    "pairs": of_blocks(in_pairs),
    "normalized": over(normalized),
    "prepared one by one": over(prepared_one_by_one),
    "by index": of_blocks(by_index),
    "by taking": of_blocks(by_taking),
    "by index in checkpoints": of_blocks(by_index_in_checkpoints),
    "by two indices": of_blocks(by_two_indices),
    "scan of scans": of_blocks(functools.partial(scan_of_scans, inner_scan)),
    "scan of checkpointed scans": of_blocks(
        functools.partial(scan_of_scans, jax.checkpoint(inner_scan))
    ),
    "in groups and back": over(in_groups_and_back),
    "backwards": of_blocks(backwards),
}


def parameters(name, width):
    keys = jax.random.split(jax.random.key(0), 4)
    blocks = {
        "kernel": jax.random.normal(keys[0], (LAYERS, width, width)) / width**0.5,
        "bias": jax.random.normal(keys[1], (LAYERS, width)) / 4,
    }
    if "list" in name:
        blocks = [at(blocks, i) for i in range(LAYERS)]
    embed, head = jax.random.normal(keys[2], (3, width)), jax.random.normal(keys[3], (width, 3))
    return {"embed": embed, "blocks": blocks, "head": head}


def mask(name, last=1):
    if "list" in name:
        blocks = "|".join(f"^blocks_{i}/" for i in range(LAYERS - last, LAYERS))
        return gnp.masks.by_path(f"{blocks}|^head")
    return gnp.masks.stacked("^blocks/", last=last) | gnp.masks.by_path("^head")


def cost(name, loss, last=1):
    params = jax.eval_shape(lambda: parameters(name, 64))
    return gnp.masks.cost(loss, params, mask(name, last), jax.ShapeDtypeStruct((512, 3), "float32"))


@functools.cache
def cost_over_a_concatenation(last=1):
    return cost("", over_a_concatenation, last)


@pytest.mark.parametrize("name", MODELS)
def test_costs_what_a_loop_over_a_concatenation_costs(name):
    found, expected = cost(name, MODELS[name]), cost_over_a_concatenation()
    if name == "whole loss in a checkpoint":
        # Of what is computed again in the backward pass, the last layer is a smaller share.
        assert found < expected
    else:
        assert abs(found - expected) < 0.03


@pytest.mark.exhaustive(but=["list", "by two indices"])
@pytest.mark.parametrize(
    "name",
    [
        "list",
        "by two indices",
        "whole loss in a checkpoint",
        "prepared one by one",
        "scan of checkpointed scans",
        "in groups and back",
    ],
)
@pytest.mark.usefixtures("x64")
def test_same_numbers_as_without_sharing(name):
    """Of the others, test_programs.py has the like."""
    params, x = parameters(name, 3), jnp.linspace(-1, 1, 12).reshape(4, 3)
    found, expected = (
        jax.jit(transform(MODELS[name], 0.1, 0.7, mask=chosen))(params, x)
        for transform, chosen in [(gnp.value_and_grad, mask(name)), (unshared, mask(name)(params))]
    )
    assert_same_tree(found, expected)


def test_the_perturbed_layers_need_not_be_the_last_of_their_leaf():
    """The first layer of the kernels that is perturbed decides, or of the biases."""
    params = parameters("", 64)
    flags = {"kernel": np.array([0, 0, 0, 1], bool), "bias": np.array([0, 0, 1, 0], bool)}
    chosen = {"embed": False, "blocks": flags, "head": True}
    x = jnp.zeros((512, 3))
    for name in ("sharded", "by index", "pairs", "backwards"):
        assert gnp.masks.cost(MODELS[name], params, chosen, x) < 1.54


def test_a_loop_whose_first_layer_is_perturbed_is_left_whole():
    params = parameters("", 64)
    chosen = {"embed": False, "blocks": np.array([True, False, False, False]), "head": False}
    x = jnp.zeros((512, 3))
    for name in ("sharded", "by index", "carried"):
        assert 1.95 < gnp.masks.cost(MODELS[name], params, chosen, x) < 2.03


def test_a_loop_that_only_hands_on_what_is_perturbed_is_shared():
    def loss(params, x):
        def one(carry, x):
            h, params = carry
            return (jnp.tanh(h @ params["blocks"]["kernel"][0]) + x, params), h

        h = x @ params["embed"]
        (h, params), outputs = lax.scan(one, (h, params), jnp.stack([h, 2 * h]))
        return jnp.sum((h + outputs[1]) @ params["head"])

    chosen = {"embed": False, "blocks": False, "head": True}
    assert gnp.masks.cost(loss, parameters("", 64), chosen, jnp.zeros((512, 3))) < 1.1


@pytest.mark.parametrize("last", [1, 2])
def test_a_group_of_layers_that_is_perturbed_in_part_is_cut_itself(last):
    found = cost("scan of scans", MODELS["scan of scans"], last)
    assert abs(found - cost_over_a_concatenation(last)) < 0.03


def sequence_to_sequence(project_at_once, params, x):
    """A decoder whose projection is in its loop, or behind it."""
    h, _ = step(x @ params["embed"], at(params["blocks"], 0))
    project = lambda h: jax.nn.log_softmax(h @ params["head"])  # noqa: E731

    @jax.jit
    def decode(h, word):
        h = layer(h + word, at(params["blocks"], 1))
        return h, h if project_at_once else project(h)

    _, found = lax.scan(decode, h, jnp.linspace(0, 1, 6))
    return -jnp.mean((project(found) if project_at_once else found)[..., 0])


def test_what_a_loop_computes_without_a_perturbed_leaf_is_shared():
    found, expected = (
        gnp.masks.cost(
            functools.partial(sequence_to_sequence, at_once),
            jax.eval_shape(lambda: parameters("", 64)),
            gnp.masks.by_path("^head"),
            jax.ShapeDtypeStruct((512, 3), "float32"),
        )
        for at_once in (False, True)
    )
    assert abs(found - expected) < 0.03


def adapted(params, x):
    """The head after some steps of gradient descent, in each of which there are the features."""

    def loss(head):
        h = layer(layer(x @ params["embed"], at(params["blocks"], 0)), at(params["blocks"], 1))
        return -jnp.mean(jax.nn.log_softmax(h @ head)[:, 0])

    step = lambda head, _: (head - 0.1 * jax.grad(loss)(head), None)  # noqa: E731
    return loss(lax.scan(step, params["head"], length=5)[0])


def test_what_is_the_same_in_all_iterations_is_computed_once():
    """Even once where the plain gradient computes it in each."""
    params, x = jax.eval_shape(lambda: parameters("", 64)), jnp.zeros((512, 3))
    assert gnp.masks.cost(adapted, params, gnp.masks.by_path("^head"), x) < 1


def test_a_loop_that_saves_no_product_is_left_as_it_is():
    def loss(params, x):
        grow = lambda h, _: ((h[0] + 1, jnp.tanh(h[1] @ params["head"].T * h[0])), None)  # noqa: E731
        (_, h), _ = lax.scan(grow, (0, x), length=3)
        return jnp.sum(h)

    params, x = parameters("", 3), jnp.ones((4, 3))
    chosen = gnp.masks.by_path("^head")
    (refusal,) = gnp.masks.explain(loss, params, chosen, x).not_cut
    assert refusal.why == "its first iteration uses a perturbed leaf"
