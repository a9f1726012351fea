"""Flax training steps with BatchNorm and Dropout: state and random streams advance exactly once."""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import gnp_optax as gnp
import gnp_optax.nnx as gnp_nnx
from gnp_optax.linen import TrainState

X = jax.random.normal(jax.random.key(0), (16, 4))
Y = jax.random.normal(jax.random.key(1), (16, 1))


def assert_same(one, two):
    def check(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)

    jax.tree.map(check, one, two)


def differ(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


# linen


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, name="body")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(1, name="head")(x)


class BatchNormState(TrainState):
    batch_stats: dict


def linen_state(tx, kind=BatchNormState):
    model = Model()
    variables = model.init(jax.random.key(0), X, train=False)
    return kind.create(apply_fn=model.apply, tx=tx, **variables)


def linen_loss(state, key, params):
    logits, changed = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats},
        X,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    return ((logits - Y) ** 2).mean(), changed["batch_stats"]


@jax.jit
def plain_linen_step(state, key):
    loss_fn = functools.partial(linen_loss, state, key)
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


@functools.partial(jax.jit, static_argnames=("alpha",))
def core_linen_step(state, key, alpha):
    loss_fn = functools.partial(linen_loss, state, key)
    grad_fn = gnp.value_and_grad(loss_fn, 0.1, alpha, has_aux=True)
    (loss, stats), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


@jax.jit
def composed_linen_step(state, key):
    loss_fn = functools.partial(linen_loss, state, key)
    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, batch_stats=stats, value_fn=loss_fn, value=loss)
    return state, loss


def test_linen_core_leaves_the_statistics_of_one_clean_pass():
    state, key = linen_state(optax.adamw(1e-2)), jax.random.key(3)
    plain, plain_loss = plain_linen_step(state, key)
    regularized, loss = core_linen_step(state, key, alpha=0.8)
    assert_same(regularized.batch_stats, plain.batch_stats)
    assert loss == plain_loss
    assert differ(regularized.params, plain.params)


def test_linen_core_with_zero_weight_is_bit_for_bit_the_plain_step():
    state, key = linen_state(optax.adamw(1e-2)), jax.random.key(3)
    plain, _ = plain_linen_step(state, key)
    got, _ = core_linen_step(state, key, alpha=0.0)
    assert_same((got.params, got.opt_state), (plain.params, plain.opt_state))


def composed(alpha):
    return optax.chain(gnp.gradient_regularization(0.1, alpha, has_aux=True), optax.adamw(1e-2))


def test_linen_train_state_leaves_the_statistics_of_one_clean_pass():
    key = jax.random.key(3)
    plain, plain_loss = plain_linen_step(linen_state(optax.adamw(1e-2)), key)
    got, loss = composed_linen_step(linen_state(composed(0.8)), key)
    expected, _ = core_linen_step(linen_state(optax.adamw(1e-2)), key, alpha=0.8)
    assert_same(got.batch_stats, plain.batch_stats)
    assert loss == plain_loss
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        got.params,
        expected.params,
    )


def test_linen_train_state_with_zero_weight_is_bit_for_bit_the_plain_step():
    key = jax.random.key(3)
    plain, _ = plain_linen_step(linen_state(optax.adamw(1e-2)), key)
    got, _ = composed_linen_step(linen_state(composed(0.0)), key)
    assert_same(got.params, plain.params)


def test_linen_both_passes_drop_the_same_units():
    """With r = 0 the second pass is the first again, dropout included: g~ = g."""
    state = linen_state(optax.sgd(1.0))
    for key in jax.random.split(jax.random.key(4), 3):
        loss_fn = functools.partial(linen_loss, state, key)
        _, grads = gnp.value_and_grad(loss_fn, 0.0, 1.0, has_aux=True)(state.params)
        expected = jax.grad(loss_fn, has_aux=True)(state.params)[0]
        assert_same(grads, expected)


def test_linen_train_state_compiles_no_more_often_than_that_of_flax():
    def compilations(step, state):
        step.clear_cache()
        for i in range(4):
            state, _ = step(state, jax.random.key(i))
        return step._cache_size()

    class PlainState(train_state.TrainState):
        batch_stats: dict

    theirs = compilations(plain_linen_step, linen_state(optax.adamw(1e-2), PlainState))
    assert compilations(composed_linen_step, linen_state(composed(0.8))) == theirs


def test_linen_train_state_takes_value_fn_for_a_plain_optimizer_too():
    """So that the baseline needs no other training step."""
    key = jax.random.key(3)
    plain, _ = plain_linen_step(linen_state(optax.sgd(0.1)), key)
    got, _ = composed_linen_step(linen_state(optax.sgd(0.1)), key)
    assert_same(got.params, plain.params)
    assert got.tx is not None


def test_linen_train_state_refuses_what_nobody_takes():
    tx = optax.GradientTransformation(optax.identity().init, optax.identity().update)
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=tx)
    with pytest.raises(TypeError, match="'batch', which is neither a field"):
        state.apply_gradients(grads=state.params, batch={})


def test_linen_train_state_refuses_a_misspelt_field():
    state = linen_state(composed(0.8))
    with pytest.raises(TypeError, match="Did you mean 'batch_stats'"):
        state.apply_gradients(grads=state.params, value_fn=None, batch_stat=state.batch_stats)


def test_linen_train_state_takes_multi_steps():
    """An object with `init` and `update` that is no `GradientTransformation`."""
    params = {"w": jnp.array([3.0, 4.0])}
    tx = optax.MultiSteps(optax.polyak_sgd(), 1)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(grads=params, value=jnp.array(12.5))
    np.testing.assert_allclose(state.params["w"], [1.5, 2.0], rtol=1e-6)


def test_linen_train_state_can_be_mixed_with_another():
    class Hundredfold(train_state.TrainState):
        def apply_gradients(self, *, grads, **kwargs):
            state = super().apply_gradients(grads=grads, **kwargs)
            return state.replace(step=100 * state.step)

    class Both(TrainState, Hundredfold):
        pass

    state = Both.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=optax.sgd(0.1))
    assert state.apply_gradients(grads=state.params).step == 100


def test_linen_train_state_keeps_its_optimizer():
    tx = optax.chain(gnp.sam(0.1), optax.sgd(0.1))
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(1)}, tx=tx)
    after = state.apply_gradients(grads=state.params, value_fn=lambda p: jnp.sum(p["w"] ** 2))
    assert after.tx is tx
    assert int(after.step) == 1


# NNX


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.body(x)))))


def nnx_loss(model, x, y):
    return ((model(x) - y) ** 2).mean()


def nnx_run(value_and_grad, steps=1, loss=nnx_loss, jit=True):
    """Train; return the model's parameters, all its other variables, and the last loss."""
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    def step(model, optimizer, x, y):
        value, grads = value_and_grad(loss)(model, x, y)
        optimizer.update(model, grads)
        return value

    step = nnx.jit(step) if jit else step
    for _ in range(steps):
        value = step(model, optimizer, X, Y)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return params, rest, value


def regularized(alpha, **kwargs):
    return lambda loss: gnp_nnx.value_and_grad(loss, 0.1, alpha, **kwargs)


@pytest.mark.parametrize("jit", [True, False])
def test_nnx_statistics_and_streams_are_those_of_one_clean_pass(jit):
    plain_params, plain_rest, plain_value = nnx_run(nnx.value_and_grad, jit=jit)
    params, rest, value = nnx_run(regularized(0.8), jit=jit)
    assert_same(rest, plain_rest)
    assert value == plain_value
    assert differ(params, plain_params)


def test_nnx_with_zero_weight_is_bit_for_bit_the_plain_step():
    got, expected = nnx_run(regularized(0.0), steps=3), nnx_run(nnx.value_and_grad, steps=3)
    assert_same(got, expected)


def test_nnx_equals_the_core_on_the_split_model():
    """An independent second pass: clones of the model, made before the first."""
    model = NNXModel(nnx.Rngs(0))
    _, params, _ = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(jnp.copy, params)

    def loss(params):
        clone = NNXModel(nnx.Rngs(0))
        nnx.update(clone, params)
        return nnx_loss(clone, X, Y)

    _, expected = gnp.value_and_grad(loss, 0.1, 0.8)(params)
    _, got = gnp_nnx.value_and_grad(nnx_loss, 0.1, 0.8)(model, X, Y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, expected)


def test_nnx_shared_random_stream_advances_once():
    """An `nnx.Rngs` that is an argument of its own is a variable like any other."""

    def noisy(model, rngs, x):
        return (model(x + jax.random.normal(rngs.noise(), x.shape)) ** 2).mean()

    one, two = nnx.Rngs(noise=1), nnx.Rngs(noise=1)
    value, _ = gnp_nnx.value_and_grad(noisy, 0.1, 0.8)(NNXModel(nnx.Rngs(0)), one, X)
    expected, _ = nnx.value_and_grad(noisy)(NNXModel(nnx.Rngs(0)), two, X)
    assert value == expected
    assert_same(nnx.state(one), nnx.state(two))


def test_nnx_returns_what_flax_returns():
    def loss(model, x, y):
        return nnx_loss(model, x, y), {"mean": x.mean()}

    (value, aux), grads = gnp_nnx.value_and_grad(loss, 0.1, 0.8, has_aux=True)(
        NNXModel(nnx.Rngs(0)), X, y=Y
    )  # by keyword, which Flax's own does not take
    (expected, theirs), their_grads = nnx.value_and_grad(loss, has_aux=True)(
        NNXModel(nnx.Rngs(0)), X, Y
    )
    assert value == expected
    assert_same(aux, theirs)
    assert jax.tree.structure(grads) == jax.tree.structure(their_grads)


def test_nnx_differentiates_what_the_filter_names():
    wrt = nnx.All(nnx.Param, nnx.PathContains("head"))
    _, grads = gnp_nnx.value_and_grad(nnx_loss, 0.1, 0.8, wrt=wrt)(NNXModel(nnx.Rngs(0)), X, Y)
    assert list(grads) == ["head"]
    with pytest.raises(ValueError, match="no variables to differentiate"):
        gnp_nnx.value_and_grad(nnx_loss, 0.1, 0.8, wrt=nnx.Cache)(NNXModel(nnx.Rngs(0)), X, Y)


def test_nnx_checks_its_arguments_when_it_is_made():
    with pytest.raises(ValueError, match="r must be finite and not negative"):
        gnp_nnx.value_and_grad(nnx_loss, -0.1, 0.8)


def nnx_composed_run(steps, value_fn_of=gnp_nnx.value_fn, wrt=nnx.Param):
    """As `nnx_run`, with the transformation."""
    model = NNXModel(nnx.Rngs(0))
    tx = optax.chain(gnp.gradient_regularization(0.1, 0.8), optax.adamw(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer, x, y):
        value_fn = value_fn_of(nnx_loss, model, x, y=y)
        of = nnx.value_and_grad(nnx_loss, argnums=nnx.DiffState(0, wrt))
        value, grads = of(model, x, y)
        optimizer.update(model, grads, value_fn=value_fn)
        return value

    for _ in range(steps):
        value = step(model, optimizer, X, Y)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return params, rest, value


def test_nnx_transformation_takes_the_loss_of_the_parameters():
    """In training: both passes drop the same units, and statistics and streams advance once."""
    params, rest, value = nnx_composed_run(steps=3)
    expected, expected_rest, expected_value = nnx_run(regularized(0.8), steps=3)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, params, expected)
    assert_same(nnx.filter_state(rest, nnx.RngCount), nnx.filter_state(expected_rest, nnx.RngCount))
    statistics = (nnx.filter_state(r, nnx.BatchStat) for r in (rest, expected_rest))
    jax.tree.map(close, *statistics)
    close(value, expected_value)


def test_nnx_value_fn_needs_the_filter_of_the_optimizer():
    head = nnx.All(nnx.Param, nnx.PathContains("head"))
    with pytest.raises(ValueError, match=r"'body/bias'.*given 'head/bias'.*wrt=optimizer\.wrt"):
        nnx_composed_run(1, wrt=head)
    nnx_composed_run(1, functools.partial(gnp_nnx.value_fn, wrt=head), wrt=head)


def test_nnx_value_fn_leaves_the_model_as_it_is():
    model, same = NNXModel(nnx.Rngs(0)), NNXModel(nnx.Rngs(0))
    value_fn = gnp_nnx.value_fn(nnx_loss, model, X, Y)
    first, second = (value_fn(nnx.state(model, nnx.Param)) for _ in range(2))
    assert first == second == nnx_loss(NNXModel(nnx.Rngs(0)), X, Y)
    assert_same(nnx.state(model), nnx.state(same))


def test_nnx_returns_a_report():
    def loss(model, x, y):
        return nnx_loss(model, x, y), x.mean()

    gradient = gnp_nnx.value_and_grad(loss, 0.1, 0.8, has_aux=True, return_report=True)
    (value, _), _, report = nnx.jit(gradient)(NNXModel(nnx.Rngs(0)), X, Y)
    g = nnx.jit(nnx.grad(nnx_loss))(NNXModel(nnx.Rngs(0)), X, Y)
    squares = (np.sum(np.square(x)) for x in jax.tree.leaves(g))
    np.testing.assert_allclose(report.grad_norm, np.sqrt(sum(squares)), rtol=1e-5)
    assert gnp.report_as_dict(report)["sam/perturbed"] == 1
    assert report.perturbed_loss > value


# SAM at one gradient a step.


def test_linen_train_state_knows_the_perturbed_parameters():
    tx = optax.chain(gnp.momentum_sam(0.2), optax.adamw(1e-2))
    state = TrainState.create(apply_fn=None, params={"w": jnp.array([3.0, 4.0])}, tx=tx)

    @jax.jit
    def step(state):
        grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(state.perturbed_params)
        return state.apply_gradients(grads=grads)

    np.testing.assert_array_equal(state.perturbed_params["w"], state.params["w"])
    for _ in range(3):
        state = step(state)
        expected = gnp.perturbed(state.params, state.opt_state)
        np.testing.assert_array_equal(state.perturbed_params["w"], expected["w"])
        assert differ(expected, state.params)


def nnx_momentum_run(jit, mask=None):
    model = NNXModel(nnx.Rngs(0))
    tx = optax.chain(gnp.momentum_sam(0.2, mask=mask), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer, x, y):
        there = gnp_nnx.perturbed(model, optimizer)
        value, grads = nnx.value_and_grad(nnx_loss)(there, x, y)
        optimizer.update(model, grads)
        return value

    step = nnx.jit(step) if jit else step
    for _ in range(3):
        value = step(model, optimizer, X, Y)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    return params, rest, value


@pytest.mark.parametrize("mask", [None, gnp.masks.by_path("kernel")])
def test_nnx_momentum_sam_equals_the_core_and_advances_the_rest_once(mask):
    params, rest, value = nnx_momentum_run(jit=True, mask=mask)
    eager_params, eager_rest, eager_value = nnx_momentum_run(jit=False, mask=mask)
    np.testing.assert_allclose(value, eager_value, rtol=1e-5)
    _, plain_rest, _ = nnx_run(nnx.value_and_grad, steps=3)
    counts = [nnx.filter_state(r, nnx.RngCount) for r in (rest, eager_rest, plain_rest)]
    assert_same(counts[0], counts[2])
    assert_same(counts[1], counts[2])

    # The same by hand, on the split model; `nnx.merge` of Flax before 0.12 always copies.
    has_copy = "copy" in inspect.signature(nnx.merge).parameters
    copies = {"copy": True} if has_copy else {}
    model = NNXModel(nnx.Rngs(0))
    graphdef, expected, others = nnx.split(model, nnx.Param, ...)
    expected = nnx.to_pure_dict(expected)
    tx = optax.chain(gnp.momentum_sam(0.2, mask=mask), optax.sgd(0.1))
    opt_state = tx.init(expected)

    def loss(params, others):
        state = nnx.State(params)
        rebuilt = nnx.merge(graphdef, state, others, **copies)
        value = nnx_loss(rebuilt, X, Y)
        return value, nnx.split(rebuilt, nnx.Param, ...)[2]

    for _ in range(3):
        there = gnp.perturbed(expected, opt_state)
        (_, others), grads = jax.value_and_grad(loss, has_aux=True)(there, others)
        updates, opt_state = tx.update(grads, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
    for got in (params, eager_params):
        pure = nnx.to_pure_dict(got)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), pure, expected)


def test_nnx_perturbed_without_the_transformation():
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"no state of gnp\.momentum_sam"):
        gnp_nnx.perturbed(model, optimizer)


def test_nnx_perturbed_shares_variables_in_containers():
    class Module(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(2, 2, rngs=rngs)
            kept = [nnx.BatchStat(jnp.zeros(2))]
            self.kept = nnx.List(kept) if hasattr(nnx, "List") else kept

        def __call__(self, x):
            x = self.body(x)
            kept = self.kept[0]  # Flax before 0.12 sets its value
            kept.set_value(x.mean(0)) if hasattr(kept, "set_value") else setattr(
                kept, "value", x.mean(0)
            )
            return x

    model = Module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, gnp.momentum_sam(0.1), wrt=nnx.Param)
    there = gnp_nnx.perturbed(model, optimizer)
    there(jnp.ones((3, 2)))
    assert differ(model.kept[0][...], jnp.zeros(2))


def test_linen_perturbed_params_leave_the_scales_of_fp8():
    params = {
        "params": {"w": jnp.array([3.0, 4.0])},
        "_overwrite_with_gradient": {"s": jnp.ones(1)},
    }
    state = TrainState.create(apply_fn=None, params=params, tx=gnp.momentum_sam(0.5, 0.0))
    state = state.apply_gradients(grads=params)
    moved = state.perturbed_params
    assert moved["_overwrite_with_gradient"] is state.params["_overwrite_with_gradient"]
    assert differ(moved["params"], state.params["params"])
