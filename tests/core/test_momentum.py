"""SAM at one gradient a step: closed forms, costs, and the optimizer states that it is found in."""

import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from models.problems import Quadratic, mlp, residual
from models.unshared import assert_same_tree, unshared

import gnp_optax as gnp
from gnp_optax.masks._flops import flops


def state_of(opt_state):
    """The state of `momentum_sam` in a chain that begins with it."""
    return opt_state[0]


def make_step(tx, loss, gradient=jax.value_and_grad, perturb=gnp.perturbed):
    @jax.jit
    def step(params, opt_state, *batch):
        value, grads = gradient(loss)(perturb(params, opt_state), *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def run(tx, params, loss, batch, steps=5, **options):
    step, opt_state = make_step(tx, loss, **options), tx.init(params)
    for _ in range(steps):
        params, opt_state, _ = step(params, opt_state, *batch)
    return params, opt_state


# The numbers.


@pytest.mark.parametrize("mask", [None, {"body": False, "head": True}])
@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("rho", [0.3, lambda step: 0.1 * (step + 1)])
def test_quadratic_in_closed_form_over_five_steps(x64, rho, decay, mask):
    problem = Quadratic()
    on = problem.selection(*(k for k in problem.sizes if mask is None or mask[k]))
    w, m, rate = problem.vector, np.zeros_like(problem.vector), 0.1
    tx = optax.chain(gnp.momentum_sam(rho, decay, mask=mask), optax.sgd(rate))
    params, opt_state = problem.params, tx.init(problem.params)
    step = make_step(tx, problem.loss)
    for t in range(5):
        radius = rho(t) if callable(rho) else rho
        eps = radius * m / (np.linalg.norm(m) or 1)
        np.testing.assert_allclose(
            problem.flat(gnp.perturbed(params, opt_state)), w + eps, rtol=0, atol=1e-13
        )
        g = problem.gradient(w + eps)
        params, opt_state, _ = step(params, opt_state)
        w, m = w - rate * g, on * (decay * m + (1 - decay) * g)
        np.testing.assert_allclose(problem.flat(params), w, rtol=0, atol=1e-13)
        following = rho(t + 1) if callable(rho) else rho
        state = state_of(opt_state)
        assert int(state.step) == t + 1
        np.testing.assert_allclose(state.grad_norm, np.linalg.norm(g), rtol=1e-6)
        np.testing.assert_allclose(state.perturbation_norm, following, rtol=1e-6)


def test_one_leaf_perturbed_along_the_last_gradient_and_the_other_along_the_fresh_one(x64):
    """The composition equals a reference that shares nothing."""
    params, loss, x, y = mlp(dtype=jnp.float64)
    late = gnp.masks.by_path("^head")
    rho, rate = 0.2, 0.1
    tx = optax.chain(gnp.momentum_sam(rho, decay=0.0, mask=~late), optax.sgd(rate))

    def shared(loss):
        return gnp.value_and_grad(loss, rho, 1.0, mask=late)

    got, _ = run(tx, params, loss, (x, y), steps=4, gradient=shared)
    reference = unshared(loss, rho, 1.0, mask={"body": False, "head": True})
    expected, before = params, jax.tree.map(jnp.zeros_like, params["body"])
    for _ in range(4):
        norm = optax.tree.norm(before)
        scale = rho / jnp.where(norm == 0, 1, norm)
        moved = jax.tree.map(lambda w, g, scale=scale: w + scale * g, expected["body"], before)
        _, grads = reference({**expected, "body": moved}, x, y)
        expected = jax.tree.map(lambda w, g: w - rate * g, expected, grads)
        before = grads["body"]
    assert_same_tree(got, expected, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_without_radius_it_is_plain_training_to_the_bit(decay):
    params, loss, x, y = mlp()
    params["body"]["bias"] = -params["body"]["bias"]  # of -0, a sum with 0 would make 0
    rule = optax.adamw(1e-2)
    plain, _ = run(rule, params, loss, (x, y), perturb=lambda params, _: params)
    for rho in (0.0, optax.constant_schedule(0.0)):
        tx = optax.chain(gnp.momentum_sam(rho, decay), rule)
        got, opt_state = run(tx, params, loss, (x, y))
        jax.tree.map(np.testing.assert_array_equal, got, plain)
        unmoved = gnp.perturbed(params, opt_state)
        signs = [jax.tree.map(jnp.signbit, tree) for tree in (unmoved, params)]
        jax.tree.map(np.testing.assert_array_equal, *signs)


def test_a_gradient_of_zero_perturbs_nothing():
    params = {"a": jnp.ones(3), "b": jnp.zeros(())}
    tx = gnp.momentum_sam(0.1)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, gnp.perturbed(params, state), params)
    assert float(state.perturbation_norm) == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_neither_underflow_nor_overflow(size):
    params = jnp.ones(4)
    tx = gnp.momentum_sam(0.5, decay=0.0)
    _, state = tx.update(jnp.full(4, size), tx.init(params), params)
    np.testing.assert_allclose(gnp.perturbed(params, state), 1.25, rtol=1e-6)


def test_leaves_that_cannot_be_perturbed_pass():
    params = {"w": jnp.ones(2), "n": jnp.arange(3), "none": None, "z": jnp.ones(1, jnp.complex64)}
    grads = {"w": jnp.ones(2), "n": None, "none": None, "z": jnp.array([1j], jnp.complex64)}
    tx = gnp.momentum_sam(0.3, decay=0.0)
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates is grads
    moved = gnp.perturbed(params, state)
    assert moved["n"] is params["n"]
    np.testing.assert_allclose(moved["w"], 1 + 0.3 / 3**0.5, rtol=1e-6)
    # The steepest ascent is along the conjugate of what `jax.grad` returns.
    np.testing.assert_allclose(moved["z"], 1 - 0.3j / 3**0.5, rtol=1e-6)


def test_layers_of_a_stack():
    params = {"blocks": jnp.ones((3, 2)), "head": jnp.ones(2)}
    mask = gnp.masks.stacked("^blocks", last=1) | gnp.masks.by_path("^head")
    tx = gnp.momentum_sam(1.0, decay=0.0, mask=~mask)
    _, state = tx.update(params, tx.init(params), params)
    moved = gnp.perturbed(params, state)
    np.testing.assert_allclose(moved["blocks"], [[1.5, 1.5], [1.5, 1.5], [1, 1]])
    assert moved["head"] is params["head"]

    params = {"blocks": jnp.ones((2, 3)), "head": jnp.ones(2)}
    mask = gnp.masks.stacked("^blocks", last=1, axis=1) | gnp.masks.by_path("^head")
    tx = gnp.momentum_sam(1.0, decay=0.0, mask=~mask)
    _, state = tx.update(params, tx.init(params), params)
    moved = gnp.perturbed(params, state)
    np.testing.assert_allclose(moved["blocks"], [[1.5, 1.5, 1], [1.5, 1.5, 1]])


def test_what_bfloat16_loses_is_told_and_can_be_had():
    params = jnp.full(1000, 1.0, jnp.bfloat16)
    tx = gnp.momentum_sam(0.01, decay=0.0)
    grads = jnp.ones(1000, jnp.bfloat16)
    _, state = tx.update(grads, tx.init(params), params)
    assert state.momentum.dtype == jnp.float32
    np.testing.assert_array_equal(gnp.perturbed(params, state), params)  # steps of 3e-4
    assert float(state.perturbation_norm) == 0 < float(state.radius)
    wide = gnp.perturbed(params, state, perturb_dtype="float32")
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(optax.tree.norm(wide - 1), 0.01, rtol=1e-3)

    def loss(w):
        return jnp.sum(gnp.perturbed(w, state, perturb_dtype="float32") ** 2)

    assert jax.grad(loss)(params).dtype == jnp.bfloat16


# What it costs.


def test_flops_memory_and_compilations_are_those_of_plain_training():
    width = 128
    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys]
    x = jax.random.normal(jax.random.key(1), (1024, width))

    def loss(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    rule = optax.adamw(1e-2)
    plain = make_step(rule, loss, perturb=lambda params, _: params)
    tx = optax.chain(gnp.momentum_sam(lambda step: 0.1 + 0.01 * step), rule)
    step = make_step(tx, loss)
    flops = [
        s.lower(params, t.init(params), x).compile().cost_analysis()["flops"]
        for s, t in ((step, tx), (plain, rule))
    ]
    assert flops[0] <= 1.01 * flops[1]

    def size(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    assert size(tx.init(params)) <= size(rule.init(params)) + size(params) + 64
    half = gnp.momentum_sam(0.1, mask=[True, True, False, False])
    assert size(half.init(params)) <= size(params) / 2 + 64
    opt_state = tx.init(params)
    for _ in range(3):
        params, opt_state, _ = step(params, opt_state, x)
    assert step._cache_size() == 1


def test_all_layers_cost_what_a_few_do():
    """Early ones along what is remembered, late ones along the fresh gradient: `1 + q`."""
    depth = 6
    params, loss, x = residual(depth)

    late = gnp.masks.by_path(f"^layer_{depth - 1}$")
    tx = gnp.momentum_sam(0.1, 0.0, mask=~late)

    def plain(params, opt_state, x):
        return jax.value_and_grad(loss)(params, x)[1], opt_state

    def hybrid(params, opt_state, x):
        there = gnp.perturbed(params, opt_state)
        _, grads = gnp.value_and_grad(loss, 0.1, 1.0, mask=late)(there, x)
        return tx.update(grads, opt_state, params)

    costs = [
        jax.jit(f).lower(params, tx.init(params), x).compile().cost_analysis()["flops"]
        for f in (hybrid, plain)
    ]
    assert costs[0] <= (1 + 1 / depth + 0.02) * costs[1]


def test_all_layers_of_a_scanned_language_model_cost_what_the_last_do():
    """The same, with the layers stacked for `lax.scan`; loops are counted by their length."""
    width, depth, length, words = 32, 6, 64, 40
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embedding": jax.random.normal(keys[0], (words, width)),
        "blocks": {
            "mix": jax.random.normal(keys[1], (depth, length, length)) / 8,
            "mlp": jax.random.normal(keys[2], (depth, width, width)) / 6,
        },
        "head": jax.random.normal(keys[3], (width, words)) / 6,
    }
    tokens = jax.random.randint(keys[0], (32, length), 0, words)

    def loss(params, tokens):
        def block(x, layer):
            x = x + jnp.tanh(jnp.einsum("ts,bsw->btw", jnp.tril(layer["mix"]), x))
            return x + jnp.tanh(x @ layer["mlp"]), None

        x, _ = jax.lax.scan(block, params["embedding"][tokens], params["blocks"])
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], tokens)
        return losses.mean()

    late = gnp.masks.stacked("^blocks/", last=1) | gnp.masks.by_path("^head")
    tx = gnp.momentum_sam(0.1, 0.0, mask=~late)

    def plain(params, opt_state, tokens):
        return jax.value_and_grad(loss)(params, tokens)[1], opt_state

    def hybrid(params, opt_state, tokens):
        there = gnp.perturbed(params, opt_state)
        _, grads = gnp.value_and_grad(loss, 0.1, 1.0, mask=late)(there, tokens)
        return tx.update(grads, opt_state, params)

    costs = [flops(f, params, tx.init(params), tokens) for f in (hybrid, plain)]
    q = gnp.masks.cost(loss, params, late, tokens) - 1
    assert q < 0.3
    assert costs[0] <= (1 + q + 0.02) * costs[1]

    # And the numbers are those of two gradients that share nothing.
    state = tx.init(params)._replace(momentum_norm=jnp.float32(1))
    state = state._replace(momentum=jax.tree.map(lambda m: m + 0.01, state.momentum))
    there = gnp.perturbed(params, state)
    _, got = gnp.value_and_grad(loss, 0.1, 1.0, mask=late)(there, tokens)
    _, expected = unshared(loss, 0.1, 1.0, mask=late(params))(there, tokens)
    assert_same_tree(got, expected, rtol=1e-4)


# Where the state is.

WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.sgd(0.1)),
    "named chain": lambda tx: optax.named_chain(("sam", tx), ("sgd", optax.sgd(0.1))),
    "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(tx, optax.sgd(0.1)), 3),
    "MultiSteps": lambda tx: optax.MultiSteps(optax.chain(tx, optax.sgd(0.1)), 1),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(gnp.momentum_sam)(rho=0.1, decay=0.0),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_state_is_found_inside(wrap):
    tx, params = wrap(gnp.momentum_sam(0.1, decay=0.0)), {"w": jnp.array([3.0, 4.0])}
    opt_state = tx.init(params)
    np.testing.assert_array_equal(gnp.perturbed(params, opt_state)["w"], params["w"])
    _, opt_state = jax.jit(tx.update)({"w": jnp.array([0.0, 2.0])}, opt_state, params)
    np.testing.assert_allclose(gnp.perturbed(params, opt_state)["w"], [3, 4.1], rtol=1e-6)


def test_micro_batches_are_perturbed_alike():
    """With `MultiSteps` around, a step is that of the whole batch."""
    params, loss, x, y = mlp()
    tx = optax.chain(gnp.momentum_sam(0.2), optax.adam(1e-2))
    whole, _ = run(tx, params, loss, (x, y), steps=3)
    accumulated = optax.MultiSteps(tx, 4)
    step, opt_state = make_step(accumulated, loss), accumulated.init(params)
    for _ in range(3):
        for i in range(4):
            part = slice(8 * i, 8 * i + 8)
            params, opt_state, _ = step(params, opt_state, x[part], y[part])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, whole)


def test_it_resumes_to_the_bit():
    params, loss, x, y = mlp()
    tx = optax.chain(gnp.momentum_sam(0.2), optax.adam(1e-2))
    expected = run(tx, params, loss, (x, y), steps=7)
    at = run(tx, params, loss, (x, y), steps=int(np.random.default_rng(0).integers(1, 7)))
    params, opt_state = pickle.loads(pickle.dumps(at))
    step = make_step(tx, loss)
    while int(state_of(opt_state).step) < 7:
        params, opt_state, _ = step(params, opt_state, x, y)
    jax.tree.map(np.testing.assert_array_equal, (params, opt_state), expected)


def test_the_state_maps_like_parameters():
    """`optax.tree.map_params`, by which an optimizer state is sharded."""
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    tx = optax.chain(gnp.momentum_sam(0.1), optax.adam(1e-3))
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, tx.init(params))
    jax.tree.map(lambda m: np.testing.assert_array_equal(m, 1), doubled[0].momentum)
    assert int(doubled[0].step) == 0


# What goes wrong without a word.


def test_a_step_that_forgets_is_told():
    params, loss, x, y = mlp()
    tx = optax.chain(gnp.momentum_sam(0.2), optax.adam(1e-2))
    check = gnp.diagnostics.check_perturbed
    with pytest.raises(ValueError, match="before the first step"):
        check(make_step(tx, loss), params, tx.init(params), x, y)
    params, opt_state = run(tx, params, loss, (x, y))
    check(make_step(tx, loss), params, opt_state, x, y)
    with pytest.raises(ValueError, match=r"gnp\.perturbed\(params, opt_state\)"):
        check(make_step(tx, loss, perturb=lambda p, _: p), params, opt_state, x, y)
    with pytest.raises(ValueError, match="No argument of the step"):
        check(make_step(tx, loss), params, (), x, y)


@pytest.mark.parametrize("rule", [optax.sgd(0.0), optax.sign_sgd(0.01)])
def test_a_step_that_perturbs_is_not_accused(rule):
    """Although the parameters end where they would without."""
    params, loss, x, y = mlp()
    tx = optax.chain(gnp.momentum_sam(0.2), rule)
    params, opt_state = run(tx, params, loss, (x, y))
    gnp.diagnostics.check_perturbed(make_step(tx, loss), params, opt_state, x, y)


def test_a_step_that_only_logs_the_perturbed_loss_is_told():
    params, loss, x, y = mlp()
    tx = optax.chain(gnp.momentum_sam(0.2), optax.adam(1e-2))
    params, opt_state = run(tx, params, loss, (x, y))

    def step(params, opt_state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, following = tx.update(grads, opt_state, params)
        logged = {"loss": loss(gnp.perturbed(params, opt_state), x, y), "phase": "train"}
        return optax.apply_updates(params, updates), following, logged

    check = gnp.diagnostics.check_perturbed
    with pytest.raises(ValueError, match=r"gnp\.perturbed\(params, opt_state\)"):
        check(step, params, opt_state, x, y)
    with pytest.raises(ValueError, match="Nothing that the step returns"):
        check(lambda *args: step(*args)[0], params, opt_state, x, y)


def test_a_gradient_that_is_not_finite_is_not_remembered():
    params, tx = jnp.array([3.0, 4.0]), gnp.momentum_sam(0.5)
    _, before = tx.update(params, tx.init(params), params)
    _, after = tx.update(jnp.array([jnp.nan, 1.0]), before, params)
    np.testing.assert_array_equal(gnp.perturbed(params, after), gnp.perturbed(params, before))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_boxed_parameters_under_a_mask(kind):
    leaves = {"a": jnp.ones((2, 2)), "h": jnp.array([3.0, 4.0])}
    if kind == "linen":
        params = {name: nn.Partitioned(w, (None,) * w.ndim) for name, w in leaves.items()}
    else:
        params = nnx.State({name: nnx.Param(w) for name, w in leaves.items()})
    tx = gnp.momentum_sam(0.5, 0.0, mask=gnp.masks.by_path("^h"))
    state = tx.init(params)
    assert len(jax.tree.leaves(state.momentum)) == 1
    _, state = tx.update(params, state, params)
    moved = jax.tree.leaves(gnp.perturbed(params, state))
    np.testing.assert_array_equal(moved[0], leaves["a"])
    np.testing.assert_allclose(moved[1], [3.3, 4.4], rtol=1e-6)


def test_complex_parameters_under_strict_promotion():
    params = jnp.array([3.0 + 4.0j], jnp.complex64)
    tx = gnp.momentum_sam(0.5, 0.0)
    with jax.numpy_dtype_promotion("strict"):
        _, state = tx.update(params, tx.init(params), params)
        np.testing.assert_allclose(gnp.perturbed(params, state), [3.3 + 3.6j], rtol=1e-6)


def test_a_step_that_takes_the_memory_of_its_arguments_can_be_checked():
    params, loss, x, y = mlp()
    tx = optax.chain(gnp.momentum_sam(0.2), optax.adam(1e-2))
    params, opt_state = run(tx, params, loss, (x, y))
    step = jax.jit(make_step(tx, loss), donate_argnums=(0, 1))
    gnp.diagnostics.check_perturbed(step, params, opt_state, x, y)
    step(params, opt_state, x, y)
