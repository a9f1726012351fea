"""One model in two libraries: the same paths, the same selections, the same rule for gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from models import linen as models_linen
from models import nnx as models_nnx

import gnp_optax as gnp
from gnp_optax._core import paths

R, ALPHA = 0.1, 0.8
BLOCKS = ("stages_0_0", "stages_0_1", "stages_1_0", "stages_1_1")
TRANSFORMER_BLOCK = {
    *("norm_1/scale", "norm_1/bias", "norm_2/scale", "norm_2/bias"),
    *("attention/query/kernel", "attention/query/bias", "attention/key/kernel"),
    *("attention/key/bias", "attention/value/kernel", "attention/value/bias"),
    *("attention/out/kernel", "attention/out/bias"),
    *("mlp/up/kernel", "mlp/up/bias", "mlp/down/kernel", "mlp/down/bias"),
}
ATTENTION_KERNELS = {
    *("blocks_0/attention/query/kernel", "blocks_0/attention/key/kernel"),
    *("blocks_0/attention/value/kernel", "blocks_0/attention/out/kernel"),
    *("blocks_1/attention/query/kernel", "blocks_1/attention/key/kernel"),
    *("blocks_1/attention/value/kernel", "blocks_1/attention/out/kernel"),
}
NORM_SCALES = {
    *("blocks_0/norm_1/scale", "blocks_0/norm_2/scale"),
    *("blocks_1/norm_1/scale", "blocks_1/norm_2/scale", "norm/scale"),
}
SELECTIONS = [
    (
        "ResNet",
        r"^stages_1_0/",
        {
            *("stages_1_0/conv_1/kernel", "stages_1_0/conv_2/kernel"),
            *("stages_1_0/norm_1/scale", "stages_1_0/norm_1/bias"),
            *("stages_1_0/norm_2/scale", "stages_1_0/norm_2/bias"),
            "stages_1_0/projection/kernel",
        },
    ),
    ("ResNet", r"conv_\d/kernel$", {f"{b}/conv_{i}/kernel" for b in BLOCKS for i in (1, 2)}),
    (
        "ResNet",
        r"norm(_\d)?/scale$",
        {"stem_norm/scale"} | {f"{b}/norm_{i}/scale" for b in BLOCKS for i in (1, 2)},
    ),
    ("ResNet", r"^head/", {"head/kernel", "head/bias"}),
    ("ViT", r"^blocks_1/", {f"blocks_1/{path}" for path in TRANSFORMER_BLOCK}),
    ("ViT", r"attention/.*kernel", ATTENTION_KERNELS),
    ("ViT", r"norm.*/scale$", NORM_SCALES),
    ("ViT", r"^(head/|positions$)", {"head/kernel", "head/bias", "positions"}),
    ("LanguageModel", r"^blocks_0/", {f"blocks_0/{path}" for path in TRANSFORMER_BLOCK}),
    ("LanguageModel", r"attention/.*kernel", ATTENTION_KERNELS),
    ("LanguageModel", r"norm.*/scale$", NORM_SCALES),
    ("LanguageModel", r"^head/", {"head/kernel"}),
    ("LanguageModel", r"embedding", {"tokens/embedding", "positions/embedding"}),
]

every_architecture = pytest.mark.parametrize("name", ["ResNet", "ViT", "LanguageModel"])


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.exhaustive(but=["ResNet"])
@every_architecture
def test_linen_and_nnx_give_the_same_paths(name):
    linen, nnx_ = paths.leaf_paths(linen_params(name)), paths.leaf_paths(abstract_nnx(name))
    assert sorted(linen) == sorted(nnx_) == sorted(flatten_dict(linen_params(name), sep="/"))


@pytest.mark.parametrize(("name", "regex", "expected"), SELECTIONS)
def test_by_path_selects_the_same_leaves_in_linen_and_nnx(name, regex, expected):
    mask = gnp.masks.by_path(regex)
    assert selected(mask, linen_params(name)) == expected
    assert selected(mask, abstract_nnx(name)) == expected


@pytest.mark.exhaustive(but=["ResNet"])
@every_architecture
def test_top_k_layers_are_those_of_largest_norm_in_linen_and_nnx(name):
    grads = linen_gradient(name, train=False)(linen_params(name))
    nnx_grads = nnx.jit(nnx.grad(nnx_loss))(nnx_model(name, train=False), *batch(name))
    norms = numpy_norms(grads)
    for k in (1, 3, len(norms) - 1):
        layers = sorted(norms, key=norms.get)[-k:]
        expected = {path for path in flat(grads) if path.rpartition("/")[0] in layers}
        mask = gnp.masks.top_k_layers(grads, k)
        assert selected(mask, grads) == expected
        assert selected(gnp.masks.top_k_layers(nnx_grads, k), nnx_grads) == expected
        assert gnp.masks.top_k_layers(nnx_grads, k) == mask


@every_architecture
def test_equal_selections_are_equal_masks_that_print_as_they_are_written(name):
    grads = jax.tree.map(jnp.ones_like, linen_params(name)) | {
        "head": {"kernel": jnp.full(9, 99.0)}
    }
    mask = gnp.masks.top_k_layers(grads, 1)
    again = gnp.masks.top_k_layers(jax.tree.map(lambda g: 2 * g, grads), 1)
    assert mask is not again
    assert (mask, hash(mask)) == (again, hash(again))
    assert repr(mask) == "layers('head')"
    assert mask != gnp.masks.top_k_layers(grads, 2)


@pytest.mark.exhaustive(but=["ResNet"])
@every_architecture
def test_a_step_with_a_static_mask_is_compiled_once_per_selection(name):
    traced = []

    @functools.partial(jax.jit, static_argnames="mask")
    def step(params, mask):
        traced.append(mask)
        loss = functools.partial(linen_loss, name=name, train=True)
        _, grads = gnp.value_and_grad(loss, R, ALPHA, mask=mask)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    params = linen_params(name)
    grads = linen_gradient(name, train=True)(params)
    a, b, a_again = (gnp.masks.top_k_layers(grads, k) for k in (1, 2, 1))
    for mask in (a, b, a_again):
        params = step(params, mask)
    assert traced == [a, b]


@pytest.mark.exhaustive(but=["ResNet"])
@every_architecture
def test_linen_gradient_under_the_masked_scope_differs_at_the_head_only(name):
    params = linen_params(name)
    plain = linen_gradient(name, train=True)
    loss = functools.partial(linen_loss, name=name, train=True)
    mask = gnp.masks.by_path("^head/")
    regularized = gnp.value_and_grad(loss, R, ALPHA, mask=mask, scope="masked")
    _, grads = jax.jit(regularized)(params)
    check_only_the_head_is_regularized(
        flat(grads), lambda p: flat(plain(unflatten_dict(p, sep="/"))), flat(params)
    )


@pytest.mark.exhaustive(but=["ResNet"])
@every_architecture
def test_nnx_gradient_under_the_masked_scope_differs_at_the_head_only(name):
    plain = nnx.jit(nnx.grad(nnx_loss))
    mask = gnp.masks.by_path("^head/")
    regularized = gnp.nnx.value_and_grad(nnx_loss, R, ALPHA, mask=mask, scope="masked")
    _, grads = nnx.jit(regularized)(nnx_model(name, train=True), *batch(name))
    check_only_the_head_is_regularized(
        flat(grads),
        # A new model has the same dropout keys each time.
        lambda p: flat(plain(nnx_model(name, train=True, params=p), *batch(name))),
        flat(linen_params(name)),
    )


def check_only_the_head_is_regularized(grads, gradient, params):
    """Compare with the formula, written with the plain `gradient` of a dictionary of paths."""
    plain = gradient(params)
    head = {path for path in params if path.startswith("head/")}
    norm = np.sqrt(sum(np.sum(np.square(plain[path])) for path in head))
    perturbed = gradient(
        {p: params[p] + R * plain[p] / norm if p in head else params[p] for p in params}
    )
    for path, grad in grads.items():
        expected = plain[path]
        if path in head:
            expected = (1 - ALPHA) * plain[path] + ALPHA * perturbed[path]
            assert np.abs(expected - plain[path]).max() > 1e-3
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6, err_msg=path)
    # Not because they were insensitive: the perturbation does change the other gradients.
    assert any(np.abs(perturbed[p] - plain[p]).max() > 1e-4 for p in params if p not in head)


def batch(name):
    if name == "LanguageModel":
        tokens = jnp.array([[1, 2, 3, 4, 5, 6, 7], [10, 8, 6, 4, 2, 0, 1]])
        return tokens[:, :-1], tokens[:, 1:]
    return jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([0, 2])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def linen_variables(name):
    model = getattr(models_linen, name)()
    return jax.jit(model.init)(jax.random.key(0), batch(name)[0])


def linen_params(name):
    return linen_variables(name)["params"]


def linen_loss(params, name, train):
    inputs, labels = batch(name)
    logits, _ = getattr(models_linen, name)().apply(
        {**linen_variables(name), "params": params},
        inputs,
        train=train,
        rngs={"dropout": jax.random.key(2)},
        mutable=["batch_stats"],
    )
    return cross_entropy(logits, labels)


@functools.cache
def linen_gradient(name, train):
    return jax.jit(jax.grad(functools.partial(linen_loss, name=name, train=train)))


def nnx_loss(model, inputs, labels):
    return cross_entropy(model(inputs), labels)


@functools.cache
def abstract_nnx(name):
    model = nnx.eval_shape(lambda: getattr(models_nnx, name)(rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


def nnx_model(name, train, params=None):
    """Build the model anew, with the parameters of linen unless a dictionary of paths is given."""
    params = flat(linen_params(name)) if params is None else params
    model = getattr(models_nnx, name)(rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    leaves = [params[path] for path in paths.leaf_paths(state)]
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), leaves))
    if train:
        model.train()
    else:
        model.eval()
    return model


def flat(tree):
    return dict(zip(paths.leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def selected(mask, tree):
    return {path for path, chosen in flat(mask(tree)).items() if chosen}


def numpy_norms(grads):
    """Return the norm of every module's own leaves, from the nested dictionary of linen."""
    leaves = {}
    for path, leaf in flatten_dict(grads).items():
        leaves.setdefault("/".join(path[:-1]), []).append(np.ravel(leaf))
    return {module: np.linalg.norm(np.concatenate(parts)) for module, parts in leaves.items()}
