"""Equinox models with BatchNorm, dropout and shared layers, against two passes made by hand."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gnp_optax as gnp
import gnp_optax.equinox as gnp_equinox

R, ALPHA = 0.1, 0.8
X = jax.random.normal(jax.random.key(0), (16, 4))
Y = jax.random.normal(jax.random.key(1), (16, 8))
KEY = jax.random.key(2)
# The oldest version has one kind of BatchNorm, and no argument for it.
HAS_MODE = "mode" in inspect.signature(eqx.nn.BatchNorm.__init__).parameters
params_of = functools.partial(eqx.filter, filter_spec=eqx.is_inexact_array)


class Model(eqx.Module):
    """Its layers are a list, its dropout and activation leaves that are no arrays."""

    layers: list
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    activation: object

    def __init__(self, key):
        one, two = jax.random.split(key)
        self.layers = [eqx.nn.Linear(4, 8, key=one), eqx.nn.Linear(8, 8, key=two)]
        mode = {"mode": "batch"} if HAS_MODE else {}
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", **mode)
        self.dropout = eqx.nn.Dropout(0.5)
        self.activation = jax.nn.relu

    def __call__(self, x, state, key):
        x, state = self.norm(self.layers[0](x), state)
        return self.layers[1](self.dropout(self.activation(x), key=key)), state


def loss_fn(model, state, x, y, key):
    keys = jax.random.split(key, len(x))
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    predictions, state = batched(x, state, keys)
    return ((predictions - y) ** 2).mean(), state


def copy(state):
    """Another `State` with the same arrays, since one can be used once."""
    return jax.tree.map(lambda x: x, state)


MODEL, STATE = eqx.nn.make_with_state(Model)(jax.random.key(3))
PLAIN = eqx.filter_jit(eqx.filter_value_and_grad(loss_fn, has_aux=True))


def plain(model=MODEL):
    return PLAIN(model, copy(STATE), X, Y, KEY)


def regularized(model=MODEL, alpha=ALPHA, jit=True, **kwargs):
    gradient = gnp_equinox.value_and_grad(loss_fn, R, alpha, has_aux=True, **kwargs)
    return (eqx.filter_jit(gradient) if jit else gradient)(model, copy(STATE), X, Y, KEY)


def moved(model, grads, selected=lambda leaf: True):
    """The model at `theta + r g / ||g||`, by hand."""
    length = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads) if selected(g)))
    return eqx.apply_updates(
        model, jax.tree.map(lambda g: R * g / length if selected(g) else 0 * g, grads)
    )


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def assert_close(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)


def test_with_zero_weight_it_is_the_gradient_of_equinox_to_the_bit():
    assert_same(regularized(alpha=0.0), plain())


@pytest.mark.exhaustive(but=["True"])
@pytest.mark.parametrize("jit", [True, False])
def test_gradient_of_two_passes_and_the_state_of_the_clean_one(jit):
    (value, state), g = plain()
    _, tilde = plain(moved(MODEL, g))
    (got, new_state), grads, report = regularized(jit=jit, return_report=True)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    assert_close(new_state, state)
    assert_close(grads, jax.tree.map(lambda g, t: (1 - ALPHA) * g + ALPHA * t, g, tilde))
    assert grads.activation is None
    assert gnp.report_as_dict(report)["sam/perturbed"] == 1


def test_the_state_that_it_is_given_can_be_used_again():
    state = copy(STATE)
    gradient = gnp_equinox.value_and_grad(loss_fn, R, ALPHA, has_aux=True)
    for _ in range(2):
        jax.eval_shape(lambda x: gradient(MODEL, state, x, Y, KEY)[0][0], X)
    state.get(MODEL.norm.batch_state_index if HAS_MODE else MODEL.norm.state_index)


def test_transformation_takes_the_loss_of_the_parameters():
    tx = optax.chain(gnp.gradient_regularization(R, ALPHA, has_aux=True), optax.sgd(1.0))

    @eqx.filter_jit
    def step(model, state, opt_state):
        (_, new_state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(
            model, copy(state), X, Y, KEY
        )
        value_fn = gnp_equinox.value_fn(loss_fn, model, state, X, Y, key=KEY)
        updates, opt_state = tx.update(grads, opt_state, params_of(model), value_fn=value_fn)
        return updates, new_state, opt_state

    updates, state, opt_state = step(MODEL, copy(STATE), tx.init(params_of(MODEL)))
    (_, expected_state), grads = regularized()
    assert_close(jax.tree.map(jnp.negative, updates), grads)
    assert_close(state, expected_state)
    assert gnp.report_as_dict(opt_state)["sam/perturbed"] == 1


def test_masks_are_by_path_or_a_model_of_bools():
    mask = gnp.masks.by_path("^layers_1/weight")
    spec = jax.tree.map(lambda _: False, MODEL)
    spec = eqx.tree_at(lambda m: m.layers[1].weight, spec, replace=True)
    by_path = regularized(mask=mask, scope="masked")
    assert_same(regularized(mask=spec, scope="masked"), by_path)
    _, g = plain()
    _, tilde = plain(moved(MODEL, g, lambda leaf: leaf.shape == (8, 8)))
    expected = (1 - ALPHA) * g.layers[1].weight + ALPHA * tilde.layers[1].weight
    assert_close(by_path[1], eqx.tree_at(lambda m: m.layers[1].weight, g, expected))


def test_what_comes_before_the_mask_is_computed_once():
    model = eqx.nn.MLP(64, 1, 64, 3, key=KEY)
    x = jnp.ones((256, 64))

    def loss(params, x):
        return gnp_equinox.value_fn(lambda m, x: jax.vmap(m)(x).mean(), model, x)(params)

    cost = gnp.masks.cost(loss, params_of(model), gnp.masks.by_path("^layers_3/"), x)
    assert cost < 1.05


class Tied(eqx.Module):
    """An embedding whose weight is that of the last layer, as in a language model."""

    shared: eqx.nn.Shared

    def __init__(self, key):
        one, two = jax.random.split(key)
        pair = (eqx.nn.Embedding(5, 3, key=one), eqx.nn.Linear(3, 5, use_bias=False, key=two))
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def __call__(self, token):
        embedding, linear = self.shared()
        return linear(jnp.tanh(embedding(token)))


def test_a_shared_layer_is_perturbed_once():
    model, tokens = Tied(KEY), jnp.arange(5)

    def loss(model, tokens):
        logits = jax.vmap(model)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[::-1]).mean()

    plain = eqx.filter_jit(eqx.filter_grad(loss))
    g = plain(model, tokens)
    assert len(jax.tree.leaves(g)) == 1
    _, grads = eqx.filter_jit(gnp_equinox.value_and_grad(loss, R, 1.0))(model, tokens)
    assert_close(grads, plain(moved(model, g), tokens))


def test_perturbed_model_of_momentum_sam():
    tx = optax.chain(gnp.momentum_sam(R, decay=0.0), optax.sgd(0.1))
    opt_state = tx.init(params_of(MODEL))
    assert_same(gnp_equinox.perturbed(MODEL, opt_state), MODEL)
    _, g = plain()
    _, opt_state = jax.jit(tx.update)(g, opt_state, params_of(MODEL))
    there = gnp_equinox.perturbed(MODEL, opt_state)
    assert there.activation is MODEL.activation
    assert_close(params_of(there), params_of(moved(MODEL, g)))


def test_perturbed_needs_the_state_of_the_floating_point_arrays():
    class Counting(eqx.Module):
        weight: jax.Array
        count: jax.Array

    model = Counting(jnp.ones(2), jnp.arange(2))
    opt_state = gnp.momentum_sam(R).init(eqx.filter(model, eqx.is_array))
    with pytest.raises(ValueError, match=r"tx\.init.*eqx\.filter\(model, eqx\.is_inexact_array"):
        gnp_equinox.perturbed(model, opt_state)


def test_a_step_is_compiled_once():
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return loss_fn(*args)

    gradient = eqx.filter_jit(gnp_equinox.value_and_grad(counted, R, ALPHA, has_aux=True))
    model, state, seen = MODEL, copy(STATE), set()
    for key in jax.random.split(KEY, 3):
        (_, state), grads = gradient(model, state, X, Y, key)
        model = eqx.apply_updates(model, grads)
        seen.add(traces)
    assert len(seen) == 1


def test_arguments_are_checked_when_it_is_made():
    with pytest.raises(ValueError, match="r must be finite and not negative"):
        gnp_equinox.value_and_grad(loss_fn, -0.1, 0.8)
