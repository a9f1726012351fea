"""Beside the rest of Optax and of JAX: the numbers of the formula, or an error that helps."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax import export
from models.problems import mlp, two_layers
from models.unshared import unshared

import gnp_optax as gnp

HEAD = {"body": False, "head": True}
FREEZE = {"body": True, "head": False}


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def trained(tx, *names):
    """Parameters after four steps; by `names` the loss is given too."""
    params, loss, x, y = two_layers()

    def value_fn(params):
        return loss(params, x, y)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(value_fn)(params)
        given = {"value": value, "grad": grads, **dict.fromkeys(names, value_fn)}
        updates, state = tx.update(grads, state, params, value_fn=value_fn, **given)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    return params


def ours():
    return gnp.gradient_regularization(0.1, 0.8, mask=HEAD)


def core(fun):
    return gnp.value_and_grad(fun, 0.1, 0.8, mask=HEAD)


def fed_by_core(optimizer):
    """The optimizer, given the gradient of the core; all else is as in a chain."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(_, state, params, *, value_fn, **kwargs):
        return optimizer.update(
            core(value_fn)(params)[1], state, params, value_fn=value_fn, **kwargs
        )

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


OPTIMIZERS = {
    "momo": lambda: optax.contrib.momo(),
    "momo_adam": lambda: optax.contrib.momo_adam(),
    "prodigy": lambda: optax.contrib.prodigy(),
    "dadapt_adamw": lambda: optax.contrib.dadapt_adamw(),
    "dog": lambda: optax.contrib.dog(0.1),
    "cocob": lambda: optax.contrib.cocob(),
    "ademamix": lambda: optax.contrib.ademamix(1e-2),
    "galore": lambda: optax.contrib.galore(1e-2, rank=1),
    "mechanize": lambda: optax.contrib.mechanize(optax.adam(1e-2)),
    "schedule_free_adamw": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "zoom": lambda: optax.chain(optax.sgd(0.1), optax.scale_by_zoom_linesearch(4)),
    "partition": lambda: optax.partition({True: optax.sgd(0.1), False: optax.adam(1e-2)}, HEAD),
    "freeze": lambda: optax.chain(optax.freeze(FREEZE), optax.adam(1e-2)),
    "selective_transform": lambda: optax.selective_transform(optax.adam(1e-2), freeze_mask=FREEZE),
    "MultiSteps that skips": lambda: optax.MultiSteps(
        optax.adam(1e-2), 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
}
AROUND = {
    "mechanize": optax.contrib.mechanize,
    "partition of one": lambda tx: optax.partition({"all": tx}, "all"),
    "chain of chains": lambda tx: optax.chain(optax.chain(tx), optax.identity()),
}
NEWER = {"galore": optax.contrib, "freeze": optax, "selective_transform": optax}


def named(cases):
    """The cases; what the oldest version of Optax does not have is skipped there."""
    names = {case: case.split()[0] for case in cases}
    return [
        pytest.param(case, marks=pytest.mark.skipif(not hasattr(NEWER[n], n), reason="newer Optax"))
        if n in NEWER
        else case
        for case, n in names.items()
    ]


@pytest.mark.exhaustive(but=["momo", "freeze"])
@pytest.mark.parametrize("name", named(OPTIMIZERS))
def test_optimizer_after_gets_the_gradient_of_the_core(name):
    optimizer = OPTIMIZERS[name]()
    got = trained(optax.chain(ours(), optimizer))
    assert_close(got, trained(fed_by_core(optimizer)))


@pytest.mark.parametrize("name", AROUND)
def test_wrapper_around_gets_the_gradient_of_the_core(name):
    got = trained(AROUND[name](optax.chain(ours(), optax.adam(1e-2))))
    assert_close(got, trained(fed_by_core(AROUND[name](optax.adam(1e-2)))))


@pytest.mark.exhaustive
def test_sophia_takes_the_loss_under_its_own_name():
    tx = optax.contrib.sophia(1e-2, update_interval=2)
    got = trained(optax.chain(ours(), tx), "obj_fn")
    assert_close(got, trained(fed_by_core(tx), "obj_fn"))
    with pytest.raises(ValueError, match="obj_fn must be provided"):
        trained(optax.chain(ours(), tx))


def test_lookahead_takes_the_gradient_of_the_core():
    """It hands on no loss, and has two sets of parameters; the core does not see either."""
    params, loss, x, y = two_layers()
    both = optax.LookaheadParams.init_synced(params)
    tx = optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5)
    state = tx.init(both)
    expected, slow = params, params
    for i in range(4):
        _, grads = core(loss)(both.fast, x, y)
        updates, state = tx.update(grads, state, both)
        both = optax.apply_updates(both, updates)
        _, grads = core(loss)(expected, x, y)
        expected = jax.tree.map(lambda w, g: w - 0.1 * g, expected, grads)
        if i % 2:
            slow = expected = jax.tree.map(lambda s, f: (s + f) / 2, slow, expected)
    assert_close(both, optax.LookaheadParams(expected, slow))


def optax_sam(tx):
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    return optax.contrib.sam(tx, adversary, sync_period=2)


ERRORS = {
    "lookahead after": (
        lambda: optax.chain(gnp.sam(0.1), optax.lookahead(optax.sgd(0.1), 5, 0.5)),
        ValueError,
        "another structure than the parameters.*LookaheadParams",
    ),
    "partition around": (
        lambda: optax.partition({True: ours(), False: optax.sgd(0.1)}, HEAD),
        ValueError,
        "optax.partition.* is wrapped around",
    ),
    "selective_transform around": (
        lambda: optax.selective_transform(ours(), freeze_mask=FREEZE),
        ValueError,
        "optax.partition.* is wrapped around",
    ),
    # Optax's own words: its `sam` takes no extra args, not even those it does not need.
    "sam after": (
        lambda: optax.chain(ours(), optax_sam(optax.sgd(0.1))),
        TypeError,
        "unexpected keyword argument 'value_fn'",
    ),
    "sam around": (
        lambda: optax_sam(optax.chain(ours(), optax.sgd(0.1))),
        TypeError,
        "unexpected keyword argument 'value_fn'",
    ),
    "split_real_and_imaginary around": (
        lambda: optax.contrib.split_real_and_imaginary(ours()),
        TypeError,
        "unexpected keyword argument 'value_fn'",
    ),
    "reduce_on_plateau after, no value": (
        lambda: optax.chain(ours(), optax.contrib.reduce_on_plateau()),
        TypeError,
        "keyword-only argument: 'value'",
    ),
}


@pytest.mark.parametrize("case", named(ERRORS))
def test_message(case):
    make, kind, pattern = ERRORS[case]
    params, loss, x, y = two_layers()
    grads = jax.grad(loss)(params, x, y)
    given = optax.LookaheadParams.init_synced(params) if "lookahead" in case else params

    def update(tx):
        return tx.update(grads, tx.init(given), given, value_fn=lambda p: loss(p, x, y))

    with pytest.raises(kind, match=f"(?s){pattern}"):
        update(make())


def test_conditionally_transform_may_hand_the_loss_to_its_condition():
    params, loss, x, y = two_layers()
    grads = jax.grad(loss)(params, x, y)

    def often(step, *, value_fn, **_):
        return value_fn(params) > jnp.where(step == 0, -jnp.inf, jnp.inf)

    tx = optax.conditionally_transform(gnp.sam(0.1), often, forward_extra_args=True)
    state = tx.init(params)
    for expected in (gnp.value_and_grad(loss, 0.1, 1.0)(params, x, y)[1], grads):
        got, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, x, y))
        assert_close(got, expected)


def test_inject_stateful_hyperparams_is_inject_hyperparams():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        injected = optax.inject_stateful_hyperparams(gnp.sam)(0.1)
    expected = optax.inject_hyperparams(gnp.sam)(0.1)
    one, two = (trained(optax.chain(t, optax.sgd(0.1))) for t in (injected, expected))
    assert_close(one, two)


@pytest.mark.parametrize("guard", ["apply_if_finite", "zero_nans"])
def test_what_comes_after_sees_a_second_gradient_that_is_not_finite(guard):
    params = jnp.array([-3.0, 4.0])
    guards = {
        "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 3),
        "zero_nans": optax.chain(optax.zero_nans(), optax.sgd(0.1)),
    }

    def value_fn(w):
        return jnp.sum(w**2) / 2 + 0 * jnp.sqrt(5.2 - jnp.linalg.norm(w))  # NaN further out

    grads = jax.grad(value_fn)(params)
    assert np.isfinite(grads).all()
    tx = optax.chain(gnp.sam(0.5), guards[guard])
    updates, _ = tx.update(grads, tx.init(params), params, value_fn=value_fn)
    np.testing.assert_array_equal(updates, 0)


# Training in every form that JAX has for it, against the formula in a plain Python loop.
RADIUS = gnp.schedules.r_warmup(0.1, 3)
WEIGHT = gnp.schedules.zero_warmup(0.8, 1)
OPTIMIZER = optax.adamw(1e-2)
FORMS = ("core", "transformation")


def starting(form, params):
    if form == "transformation":
        return params, transformation().init(params)
    return params, (jnp.zeros([], jnp.int32), OPTIMIZER.init(params))


def transformation():
    return optax.chain(gnp.gradient_regularization(RADIUS, WEIGHT, mask=HEAD), OPTIMIZER)


def stepped(form, carry, x, y, transform=gnp.value_and_grad):
    _, loss, *_ = mlp()
    params, state = carry
    if form == "transformation":
        value, grads = jax.value_and_grad(loss)(params, x, y)
        updates, state = transformation().update(grads, state, params, value_fn=loss, x=x, y=y)
    else:
        t, state = state
        gradient = transform(loss, RADIUS(t), WEIGHT(t), mask=HEAD)
        value, grads = gradient(params, x, y)
        updates, state = OPTIMIZER.update(grads, state, params)
        state = t + 1, state
    return (optax.apply_updates(params, updates), state), value


@functools.cache
def by_formula(seed=0, examples=32, steps=4):
    params, _, x, y = mlp(seed)
    step = jax.jit(functools.partial(stepped, "core", transform=unshared))
    carry, values = starting("core", params), []
    for _ in range(steps):
        carry, value = step(carry, x[:examples], y[:examples])
        values.append(value)
    return carry[0], values


def products(text):
    return text.count("stablehlo.dot_general")


@pytest.mark.parametrize("form", FORMS)
def test_scan_over_steps_reads_the_schedules(form):
    params, _, x, y = mlp()

    @jax.jit
    def train(carry, x, y):
        return jax.lax.scan(lambda carry, _: stepped(form, carry, x, y), carry, length=4)

    (got, _), values = train(starting(form, params), x, y)
    expected, expected_values = by_formula()
    assert_close(got, expected)
    assert_close(list(values), expected_values)


@pytest.mark.exhaustive(but=["core"])
@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_seeds(form):
    starts, _, x, y = zip(*[mlp(seed) for seed in (0, 1)], strict=True)
    carry = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(starting(form, p) for p in starts))
    step = jax.jit(jax.vmap(functools.partial(stepped, form)))
    for _ in range(4):
        carry, _ = step(carry, jnp.stack(x), jnp.stack(y))
    for seed in (0, 1):
        assert_close(jax.tree.map(lambda w, i=seed: w[i], carry[0]), by_formula(seed)[0])


@pytest.mark.parametrize("form", FORMS)
def test_donated_buffers_are_used_again(form):
    params, _, x, y = mlp()
    step = jax.jit(functools.partial(stepped, form), donate_argnums=0)
    # Leaves that are not shared, as donating one buffer twice is an error.
    carry = first = jax.tree.map(jnp.array, starting(form, params))
    for _ in range(4):
        carry, _ = step(carry, x, y)  # a buffer that can't be used again is a warning
    assert_close(carry[0], by_formula()[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first[0]))


@pytest.mark.exhaustive(but=["fixed batch-core", "fixed batch-transformation"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("symbolic", [False, True], ids=["fixed batch", "symbolic batch"])
def test_exported_step(form, symbolic):
    params, _, x, y = mlp()
    carry = starting(form, params)
    step = jax.jit(functools.partial(stepped, form))
    (size,) = export.symbolic_shape("examples") if symbolic else (32,)
    batch = [jax.ShapeDtypeStruct((size, a.shape[1]), a.dtype) for a in (x, y)]
    exported = export.export(step)(carry, *batch)
    # Of any size, the prefix is still shared: as many products as in the step itself.
    found = products(exported.mlir_module())
    assert found == products(step.lower(carry, x, y).as_text())
    if form == "core":
        plain = jax.jit(functools.partial(stepped, form, transform=unshared))
        assert found < products(plain.lower(carry, x, y).as_text())
    for examples in (32, 5) if symbolic else (32,):
        got = carry
        for _ in range(4):
            got, _ = exported.call(got, x[:examples], y[:examples])
        assert_close(got[0], by_formula(examples=examples)[0])
