"""Our transformations inside and around Optax's: the right numbers, or an error that helps."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from models.problems import two_layers

import gnp_optax as gnp

HEAD = gnp.masks.by_path("head")
OURS = {
    "gradient_regularization": lambda: gnp.gradient_regularization(
        0.1, gnp.schedules.zero_warmup(0.8, 2)
    ),
    "sam": lambda: gnp.sam(0.1),
    "asam": lambda: gnp.asam(0.5),
    "layerwise": lambda: gnp.layerwise_gradient_regularization(0.1, 0.8, HEAD),
}
CORE = {
    "gradient_regularization": lambda fun, t: gnp.value_and_grad(fun, 0.1, 0.8 * (t >= 2)),
    "sam": lambda fun, t: gnp.value_and_grad(fun, 0.1, 1.0),
    "asam": lambda fun, t: gnp.value_and_grad(
        fun, 0.5, 1.0, direction=gnp.directions.adaptive(0.01)
    ),
    "layerwise": lambda fun, t: gnp.value_and_grad(fun, 0.1, 0.8, mask=HEAD, scope="masked"),
}


def labels(params):
    return {name: "one" if name == "head" else "two" for name in params}


# Each wrapper is given as a pair: the chain that holds our transformation, and the optimizer that
# gives the same when it is fed the gradient of the functional core.
WRAPPERS = {
    "sgd": lambda t: (optax.chain(t, optax.sgd(0.1)), optax.sgd(0.1)),
    "adamw": lambda t: (optax.chain(t, optax.adamw(1e-2)), optax.adamw(1e-2)),
    "muon": lambda t: (optax.chain(t, optax.contrib.muon(1e-2)), optax.contrib.muon(1e-2)),
    "clip after": lambda t: (
        optax.chain(t, optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    ),
    "named_chain": lambda t: (
        optax.named_chain(("gr", t), ("sgd", optax.sgd(0.1))),
        optax.sgd(0.1),
    ),
    "with_extra_args_support": lambda t: (
        optax.chain(optax.with_extra_args_support(t), optax.sgd(0.1)),
        optax.sgd(0.1),
    ),
    "partition after": lambda t: (
        optax.chain(
            t, optax.multi_transform({"one": optax.sgd(0.1), "two": optax.adam(1e-2)}, labels)
        ),
        optax.multi_transform({"one": optax.sgd(0.1), "two": optax.adam(1e-2)}, labels),
    ),
    "masked after": lambda t: (
        optax.chain(t, optax.masked(optax.adam(1e-2), {"body": True, "head": False})),
        optax.masked(optax.adam(1e-2), {"body": True, "head": False}),
    ),
    "flatten after": lambda t: (
        optax.chain(t, optax.flatten(optax.adam(1e-2))),
        optax.flatten(optax.adam(1e-2)),
    ),
    "MultiSteps after": lambda t: (
        optax.chain(t, optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()),
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    ),
    "apply_if_finite after": lambda t: (
        optax.chain(t, optax.apply_if_finite(optax.adam(1e-2), 3)),
        optax.apply_if_finite(optax.adam(1e-2), 3),
    ),
    "apply_if_finite around": lambda t: (
        optax.apply_if_finite(optax.chain(t, optax.adam(1e-2)), 3),
        optax.adam(1e-2),
    ),
    "conditionally_mask around": lambda t: (
        optax.conditionally_mask(optax.chain(t, optax.adam(1e-2)), lambda step: step % 2 == 0),
        None,
    ),
    "schedule_free around": lambda t: (
        optax.contrib.schedule_free(optax.chain(t, optax.sgd(0.1)), 0.1, b1=0.9),
        optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9),
    ),
    "reduce_on_plateau after": lambda t: (
        optax.chain(t, optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
        optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
    ),
    "polyak_sgd after": lambda t: (
        optax.chain(t, optax.polyak_sgd(0.1)),
        optax.polyak_sgd(0.1),
    ),
    "lbfgs after": lambda t: (optax.chain(t, optax.lbfgs()), optax.lbfgs()),
    "backtracking after": lambda t: (
        optax.chain(t, optax.sgd(0.1), optax.scale_by_backtracking_linesearch(4)),
        optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(4)),
    ),
}


def run_composed(tx, steps=4):
    params, loss, x, y = two_layers()

    @jax.jit
    def step(params, state):
        value_fn = functools.partial(loss, x=x, y=y)
        value, grads = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grads, state, params, value_fn=lambda p: loss(p, x, y), value=value, grad=grads
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def run_functional(core, optimizer, steps=4):
    params, loss, x, y = two_layers()
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def step(params, state, t):
        value, plain = jax.value_and_grad(loss)(params, x, y)
        _, grads = core(loss, t)(params, x, y)
        updates, state = optimizer.update(
            grads, state, params, value_fn=lambda p: loss(p, x, y), value=value, grad=plain
        )
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for t in range(steps):
        params, state = step(params, state, jnp.asarray(t))
    return params


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


@pytest.mark.exhaustive(
    but=["clip after-sam", "partition after-layerwise", "MultiSteps after-gradient_regularization"]
)
@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize(
    "wrapper", [name for name in WRAPPERS if name != "conditionally_mask around"]
)
def test_wrapper_gives_the_numbers_of_the_core(ours, wrapper):
    tx, optimizer = WRAPPERS[wrapper](OURS[ours]())
    assert_close(run_composed(tx), run_functional(CORE[ours], optimizer))


def test_conditionally_mask_around_freezes_every_other_step():
    tx, _ = WRAPPERS["conditionally_mask around"](OURS["sam"]())
    assert_close(run_composed(tx, steps=2), run_composed(tx, steps=1))


def test_conditionally_transform_around_really_skips():
    params, loss, x, y = two_layers()
    executed = []

    def value_fn(params):
        jax.debug.callback(lambda: executed.append(1))
        return loss(params, x, y)

    tx = optax.conditionally_transform(gnp.sam(0.1), lambda step: step % 4 == 0)
    grads = jax.grad(loss)(params, x, y)
    state = tx.init(params)
    update = jax.jit(lambda state: tx.update(grads, state, params, value_fn=value_fn))
    for _ in range(8):
        _, state = update(state)
    jax.effects_barrier()
    assert len(executed) == 2


def test_inject_hyperparams_exposes_radius_and_weight():
    plain = gnp.gradient_regularization(gnp.schedules.r_warmup(0.1, 3), 0.8, mask=HEAD)
    injected = optax.inject_hyperparams(gnp.gradient_regularization, static_args=("mask", "scope"))(
        r=gnp.schedules.r_warmup(0.1, 3), alpha=0.8, mask=HEAD
    )
    one = run_composed(optax.chain(plain, optax.sgd(0.1)))
    two = run_composed(optax.chain(injected, optax.sgd(0.1)))
    assert_close(one, two)
    state = injected.init(two_layers()[0])
    assert set(state.hyperparams) == {"r", "alpha"}


def test_multi_steps_after_regularizes_every_micro_batch():
    """m-SAM with the micro-batch as m: the mean of the regularized gradients of both halves."""
    params, loss, x, y = two_layers()
    tx = optax.chain(gnp.sam(0.1), optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    state, got = tx.init(params), params
    for half in (slice(0, 4), slice(4, 8)):
        grads = jax.grad(loss)(got, x[half], y[half])
        updates, state = tx.update(grads, state, got, value_fn=loss, x=x[half], y=y[half])
        got = optax.apply_updates(got, updates)
    core = gnp.value_and_grad(loss, 0.1, 1.0)
    halves = [core(params, x[half], y[half])[1] for half in (slice(0, 4), slice(4, 8))]
    expected = jax.tree.map(lambda w, a, b: w - (a + b) / 2, params, *halves)
    assert_close(got, expected)


def test_extra_args_that_value_fn_names_are_forwarded_and_others_ignored():
    params, loss, x, y = two_layers()
    batch = {"x": x, "y": y}
    tx = gnp.sam(0.1)
    grads = jax.grad(loss)(params, x, y)
    expected = tx.update(grads, tx.init(params), params, value_fn=lambda p: loss(p, x, y))
    for value_fn in (
        loss,
        jax.jit(loss),
        jax.checkpoint(loss),
        functools.partial(loss, y=0.0),  # the extra arg overrides the bound one, as in Optax
        lambda x_, x, y: loss(x_, x, y),
        lambda params, **kwargs: loss(params, x, y),  # **kwargs names nothing
        lambda x, batch=batch: loss(x, **batch),  # the first parameter is the model's parameters
    ):
        got = tx.update(
            grads, tx.init(params), params, value_fn=value_fn, **batch, value=1.0, unknown=2.0
        )
        assert_close(got, expected)


def test_scan_over_steps_and_vmap_over_replicas():
    start, loss, x, y = two_layers()
    tx = optax.chain(
        gnp.gradient_regularization(0.1, gnp.schedules.every(2, 0.8)), optax.adam(0.01)
    )

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, x, y))
        return (optax.apply_updates(params, updates), state), None

    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=4)[0][0]

    expected = run_composed(tx)
    assert_close(jax.jit(train)(start), expected)
    stacked = jax.vmap(train)(jax.tree.map(lambda w: jnp.stack([w, w]), start))
    assert_close(jax.tree.map(lambda w: w[1], stacked), expected)


def test_donated_buffers():
    params, loss, x, y = two_layers()
    tx = optax.chain(gnp.sam(0.1), optax.adam(1e-2))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, x, y))
        return optax.apply_updates(params, updates), state

    state, params = tx.init(params), jax.tree.map(jnp.copy, params)
    for _ in range(4):
        params, state = step(params, state)
    assert_close(params, run_composed(tx))


def test_state_can_be_pickled_and_found_by_name():
    params, *_ = two_layers()
    tx = optax.chain(gnp.sam(0.1), optax.adam(1e-2))
    state = pickle.loads(pickle.dumps(tx.init(params)))
    assert type(state[0]) is gnp.GradientRegularizationState
    assert int(optax.tree_utils.tree_get(state, "step")) == 0
    for name in ("value", "grad", "info", "learning_rate"):
        assert not hasattr(state[0], name)


def test_a_pickle_names_the_public_home():
    """So that it can be loaded wherever the code has moved to."""
    assert pickle.loads(b"cgnp_optax\nGradientRegularizationState\n.") is (
        gnp.GradientRegularizationState
    )
    for name in (name for name in gnp.diagnostics.__all__ if name[0].isupper()):
        pickled = pickle.dumps(getattr(gnp.diagnostics, name), protocol=0)
        assert pickled.startswith(b"cgnp_optax.diagnostics\n"), name


def test_serialization_with_flax_resumes():
    from flax import serialization

    params, *_ = two_layers()
    tx = optax.chain(gnp.sam(0.1), optax.adam(1e-2))
    state = tx.init(params)
    restored = serialization.from_bytes(state, serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
