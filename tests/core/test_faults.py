"""NaN and infinity in either pass, interrupted runs, and regularization switched on or off."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from models.problems import two_layers

import gnp_optax as gnp

HEAD = gnp.masks.by_path("head")
FORMS = ("transformation", "functional")
CONFIGS = {
    "number": {"r": 0.1, "alpha": 0.8},
    "SAM": {"r": 0.1, "alpha": 1.0},
    "schedules": {"r": gnp.schedules.r_warmup(0.1, 2), "alpha": gnp.schedules.zero_warmup(0.8, 2)},
    "layer-wise, all": {"r": 0.1, "alpha": 0.8, "mask": HEAD, "scope": "all"},
    "layer-wise, masked": {"r": 0.1, "alpha": 0.8, "mask": HEAD, "scope": "masked"},
    "exact": {"r": 0.1, "alpha": 0.8, "curvature": "exact"},
}
NONE = (0.0, 0.0)
FIRST = [(jnp.nan, 0.0), (jnp.inf, 0.0)]
SECOND = [(0.0, jnp.nan), (0.0, jnp.inf)]
ADAM = optax.adam(1e-2)


def trainer(form, optimizer, loss, *, r=None, alpha=None, around=lambda tx: tx, **options):
    """The first carry, and the step of (carry, *batch); a carry is everything a run has to save."""
    tx = optax.with_extra_args_support(optimizer)
    if form == "transformation":
        tx = around(optax.chain(gnp.gradient_regularization(r, alpha, **options), optimizer))

    @jax.jit
    def step(carry, *batch):
        params, state, t, rng = carry["params"], carry["state"], carry["t"], carry["rng"]
        rng, key = jax.random.split(rng)

        def value_fn(params):
            return loss(params, key, *batch)

        if form == "functional":
            now = [x(t) if callable(x) else x for x in (r, alpha)]
            _, grads = gnp.value_and_grad(value_fn, *now, **options)(params)
        else:
            grads = jax.grad(value_fn)(params)
        updates, state = tx.update(grads, state, params, value_fn=value_fn)
        params = optax.apply_updates(params, updates)
        return {"params": params, "state": state, "t": t + 1, "rng": rng}

    def start():
        params = two_layers()[0]
        t = jnp.zeros([], jnp.int32)
        return {"params": params, "state": tx.init(params), "t": t, "rng": jax.random.key(0)}

    return start, step


def faulty_trainer(*args, at="head", **kwargs):
    """A trainer whose step takes a pair: what the gradient of a leaf gains in either pass."""
    _, loss, x, y = two_layers()

    def faulty(params, key, before, faults):
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)
        moved = jnp.any(jnp.stack([jnp.any(a != b) for a, b in leaves]))
        return loss(params, x, y) + jnp.where(moved, faults[1], faults[0]) * jnp.sum(params[at])

    start, step = trainer(*args, faulty, **kwargs)
    return start(), lambda carry, faults=NONE: step(carry, carry["params"], jnp.asarray(faults))


def guarded(tx):
    return optax.apply_if_finite(tx, max_consecutive_errors=5)


def guard(carry):
    state = carry["state"]
    return state if isinstance(state, optax.ApplyIfFiniteState) else state[1]


def identical(a, b):
    def same(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()  # tells -0.0 from 0.0

    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(same, a, b)


def finite(tree):
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


@pytest.mark.exhaustive(but=["transformation-schedules", "functional-schedules"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_a_fault_in_either_pass_skips_the_step_and_leaves_no_trace(form, config):
    carry, step = faulty_trainer(form, guarded(ADAM), **CONFIGS[config])
    carry = step(step(carry))
    expected = step(carry)
    for faults in FIRST + SECOND * (config != "exact"):  # which has no pass at other parameters
        skipped = step(carry, faults)
        assert int(guard(skipped).total_notfinite) == 1
        if form == "transformation":
            ours = skipped["state"][0]
            assert bool(jnp.isfinite(ours.grad_norm)) == (faults in SECOND)
            assert config == "exact" or not jnp.isfinite(ours.perturbed_loss)
            assert int(ours.step) == 3  # it is before the guard, and counts the step
        identical(skipped["params"], carry["params"])
        identical(guard(skipped).inner_state, guard(carry).inner_state)
        after = step(skipped)
        identical(after["params"], expected["params"])
        identical(guard(after).inner_state, guard(expected).inner_state)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_can_fail_where_nothing_is_computed(form):
    carry, step = faulty_trainer(form, guarded(ADAM), **CONFIGS["schedules"])
    identical(step(carry, SECOND[0]), step(carry))  # zero-warmup: there is no second pass yet
    carry, step = faulty_trainer(form, guarded(ADAM), at="body", **CONFIGS["layer-wise, masked"])
    identical(step(carry, SECOND[0])["params"], step(carry)["params"])  # no g~ for the body
    assert int(guard(step(carry, FIRST[0])).total_notfinite) == 1


@pytest.mark.parametrize("config", ["number", "layer-wise, masked"])
def test_a_guard_around_the_chain_sees_only_the_first_gradient(config):
    carry, step = faulty_trainer("transformation", ADAM, around=guarded, **CONFIGS[config])
    for faults in FIRST:
        identical(step(carry, faults)["params"], carry["params"])
    for faults in SECOND:
        spoiled = step(carry, faults)
        assert int(spoiled["state"].total_notfinite) == 0
        assert not finite(spoiled["params"])
        assert not finite(step(spoiled)["params"])  # for good


def test_zero_nans_drops_elements_and_does_not_stop_infinities():
    optimizer = optax.chain(optax.zero_nans(), optax.sgd(0.1))
    carry, step = faulty_trainer("transformation", optimizer, **CONFIGS["number"])
    identical(step(carry, FIRST[0])["params"], carry["params"])  # a NaN direction spoils all of g~
    got = step(carry, SECOND[0])["params"]
    identical(got["head"], carry["params"]["head"])
    identical(got["body"], step(carry)["params"]["body"])
    assert not finite(step(carry, SECOND[1])["params"])


@pytest.mark.parametrize("alone", [True, False])
def test_a_direction_with_a_state_needs_a_guard_of_its_own(alone):
    direction = optax.chain(optax.trace(0.9), gnp.directions.normalized())
    options = {"direction": direction if alone else guarded(direction), **CONFIGS["number"]}
    carry, step = faulty_trainer("transformation", guarded(ADAM), **options)
    carry = step(step(carry))
    after = step(step(carry, FIRST[0]))
    assert bool(guard(after).last_finite) != alone
    if not alone:
        identical(after["params"], step(carry)["params"])


STEPS = 12
GR = {"r": 0.1, "alpha": 0.8}
ADAMW = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}
WARMUPS = {"r": gnp.schedules.r_warmup(0.1, 8), "alpha": gnp.schedules.zero_warmup(0.8, 4)}


def dropout_loss(params, key):
    _, _, x, y = two_layers()
    hidden = x @ params["body"]
    kept = jax.random.bernoulli(key, 0.8, hidden.shape)
    return jnp.mean((jnp.where(kept, hidden / 0.8, 0) @ params["head"] - y) ** 2)


dropout_gradient = jax.jit(jax.grad(dropout_loss))


@functools.cache
def dropout_trainer(form, **config):
    return trainer(form, optax.adamw(**ADAMW), dropout_loss, **config)


def run(step, carry, steps):
    for _ in range(steps):
        carry = step(carry)
    return carry


def reloaded(path, carry, start):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, carry)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, jax.eval_shape(start))


def scheduled_trainer(form):
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, STEPS))
    return trainer(form, optimizer, dropout_loss, **WARMUPS)


@functools.cache
def uninterrupted(form):
    start, step = scheduled_trainer(form)
    return [run(step, start(), t) for t in range(STEPS + 1)]


@pytest.mark.exhaustive(but=["transformation-3", "functional-3"])
# One step of zero-warmup, one of the other warmup, and one after both.
@pytest.mark.parametrize("at", np.random.default_rng(0).integers([1, 4, 8], [4, 8, 12]).tolist())
@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_run_resumes_bit_for_bit(form, at, tmp_path):
    start, step = scheduled_trainer(form)  # as a new process would
    carry = reloaded(tmp_path / "run", uninterrupted(form)[at], start)
    assert form == "functional" or int(carry["state"][0].step) == int(carry["t"]) == at
    identical(run(step, carry, STEPS - at), uninterrupted(form)[STEPS])


def by_hand(carry, adam, steps, r=0.0, alpha=0.0):
    """AdamW's parameters and moments, continued from a carry with the formulas of the papers."""
    wide = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    w, m, v, rng = wide(carry["params"]), wide(adam.mu), wide(adam.nu), carry["rng"]
    lr, b1, b2, tiny, decay = ADAMW.values()
    for count in range(int(adam.count) + 1, int(adam.count) + 1 + steps):
        rng, key = jax.random.split(rng)
        g = wide(dropout_gradient(w, key))
        norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
        tilde = wide(dropout_gradient({k: w[k] + r * g[k] / norm for k in w}, key))
        for k in w:
            mixed = (1 - alpha) * g[k] + alpha * tilde[k]
            m[k] = b1 * m[k] + (1 - b1) * mixed
            v[k] = b2 * v[k] + (1 - b2) * mixed**2
            adapted = m[k] / (1 - b1**count) / (np.sqrt(v[k] / (1 - b2**count)) + tiny)
            w[k] = w[k] - lr * (adapted + decay * w[k])
    return w, m, v


def assert_continues(carry, adam, expected):
    for a, b in zip((carry["params"], adam.mu, adam.nu), expected, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7), a, b)


def test_switching_the_transformation_on_keeps_the_moments(tmp_path):
    (plain, plain_step), (start, step) = dropout_trainer("plain"), dropout_trainer(FORMS[0], **GR)
    carry = reloaded(tmp_path / "run", run(plain_step, plain(), 5), plain)
    expected = by_hand(carry, carry["state"][0], 4, **GR)
    got = run(step, {**carry, "state": (start()["state"][0], carry["state"])}, 4)
    assert_continues(got, got["state"][1][0], expected)


def test_switching_the_transformation_off_keeps_the_moments(tmp_path):
    (_, plain_step), (start, step) = dropout_trainer("plain"), dropout_trainer(FORMS[0], **GR)
    carry = reloaded(tmp_path / "run", run(step, start(), 5), start)
    expected = by_hand(carry, carry["state"][1][0], 4)
    got = run(plain_step, {**carry, "state": carry["state"][1]}, 4)
    assert_continues(got, got["state"][0], expected)


def test_the_functional_form_switches_without_the_checkpoint_knowing(tmp_path):
    (plain, plain_step), (start, step) = dropout_trainer("plain"), dropout_trainer(FORMS[1], **GR)
    identical(start(), plain())
    for before, after, options in ((plain_step, step, GR), (step, plain_step, {})):
        carry = reloaded(tmp_path / str(len(options)), run(before, plain(), 5), start)
        got = run(after, carry, 4)
        assert_continues(got, got["state"][0], by_hand(carry, carry["state"][0], 4, **options))


def test_warmup_starts_at_the_switch_unless_the_step_is_set():
    plain, plain_step = dropout_trainer("plain")
    start, step = dropout_trainer("transformation", **WARMUPS)
    carry, ours = run(plain_step, plain(), 8), start()["state"][0]
    got = step({**carry, "state": (ours, carry["state"])})
    identical(got["params"], plain_step(carry)["params"])
    got = step({**carry, "state": (ours._replace(step=carry["t"]), carry["state"])})
    assert_continues(got, got["state"][1][0], by_hand(carry, carry["state"][0], 1, **GR))


def test_the_method_can_change_at_any_checkpoint():
    for config in CONFIGS.values():
        identical(*(dropout_trainer(FORMS[0], **options)[0]() for options in (GR, config)))


def test_a_checkpoint_does_not_restore_into_another_structure(tmp_path):
    start, step = dropout_trainer("transformation", **GR)
    start = {
        "with": start,
        "without": dropout_trainer("plain")[0],
        "identity": trainer("plain", optax.chain(optax.identity(), optax.adamw(**ADAMW)), None)[0],
        "momentum": dropout_trainer("transformation", **GR, direction=optax.trace(0.9))[0],
    }
    for saved, target in itertools.permutations(start, 2):
        with pytest.raises(ValueError, match=r"(?i)structure"):
            reloaded(tmp_path / saved / target, start[saved](), start[target])
    with ocp.StandardCheckpointer() as checkpointer:
        shapeless = checkpointer.restore(tmp_path / "with" / "without")
    with pytest.raises(TypeError, match=r"structure of tx\.init"):
        step(shapeless)


# What debugging options see, and states of before.

TRANSFORMATIONS = {
    "constant": lambda: gnp.gradient_regularization(0.1, 0.8),
    "r-warmup": lambda: gnp.gradient_regularization(gnp.schedules.r_warmup(0.1, 2), 0.8),
    "lambda-warmup": lambda: gnp.gradient_regularization(0.1, gnp.schedules.lambda_warmup(0.8, 2)),
    "zero-warmup": lambda: gnp.gradient_regularization(0.1, gnp.schedules.zero_warmup(0.8, 2)),
    "every": lambda: gnp.gradient_regularization(0.1, gnp.schedules.every(2, 0.8)),
    "zero": lambda: gnp.gradient_regularization(0.1, 0),
    "sam": lambda: gnp.sam(0.1),
    "asam": lambda: gnp.asam(0.1),
    "gsam": lambda: gnp.gsam(0.1, 0.3),
    "exact": lambda: gnp.gradient_regularization(0.1, 0.8, curvature="exact"),
    "momentum": lambda: gnp.momentum_sam(gnp.schedules.r_warmup(0.1, 2)),
    "friendly": lambda: gnp.sam(0.1, direction=gnp.directions.friendly()),
}


@pytest.mark.parametrize("option", ["jax_debug_nans", "jax_debug_infs"])
@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_debugging_options_are_silent_on_correct_programs(make, option):
    params, loss, x, y = two_layers()
    tx = optax.chain(make(), optax.adam(1e-3))
    jax.config.update(option, True)
    try:
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, state):
            there = params
            if isinstance(state[0], gnp.MomentumSAMState):
                there = gnp.perturbed(params, state)
            grads = jax.grad(loss)(there, x, y)
            updates, state = optax.with_extra_args_support(tx).update(
                grads, state, params, value_fn=lambda p: loss(p, x, y)
            )
            return optax.apply_updates(params, updates), state

        for _ in range(4):
            params, state = step(params, state)
    finally:
        jax.config.update(option, False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_state_of_before_loads():
    """A pickle names its fields by their order, and lacks the last one."""
    tx, params = gnp.sam(0.1), jnp.array([3.0, 4.0])
    loss = lambda w: jnp.sum(w**2) / 2  # noqa: E731
    _, state = tx.update(params, tx.init(params), params, value_fn=loss)
    before = gnp.GradientRegularizationState(*tuple(state)[:-1])
    assert not before.perturbed
    step = jax.jit(lambda state: tx.update(params, state, params, value_fn=loss)[1])
    jax.tree.map(np.testing.assert_array_equal, step(before), step(state))
    # By name, as Flax and Orbax restore.
    fields = serialization.to_state_dict(state)
    del fields["perturbed"]
    with pytest.raises(ValueError, match="perturbed"):
        serialization.from_state_dict(tx.init(params), fields)
    restored = serialization.from_state_dict(tx.init(params), {**fields, "perturbed": np.False_})
    jax.tree.map(np.testing.assert_array_equal, step(restored), step(state))
