"""Low precision: perturbed in a wider type, and float16 with a scaled loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from models.problems import mlp, through_transformation

import gnp_optax as gnp

R = 0.01
MASKS = {"all": {}, "head": {"mask": gnp.masks.by_path("head")}}


def problem(dtype):
    params, loss, x, y = mlp()
    return jax.tree.map(lambda w: w.astype(dtype), params), functools.partial(loss, x=x, y=y)


def by_hand(params, loss, mask=None):
    """SAM's gradient at parameters that are perturbed in float32, and the perturbation's norm."""
    g = jax.grad(loss)(params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), g)
    flags = jax.tree.map(lambda _: True, params) if mask is None else mask(params)
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x, f in zip(*leaves(wide, flags), strict=True) if f))
    moved = jax.tree.map(
        lambda w, x, f: w.astype(jnp.float32) + R * x / norm if f else w, params, wide, flags
    )
    return jax.tree.map(lambda x, w: x.astype(w.dtype), jax.grad(loss)(moved), params)


def leaves(*trees):
    return map(jax.tree.leaves, trees)


@pytest.mark.exhaustive(but=["float16-all"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_perturbed_in_float32(dtype, mask):
    params, loss = problem(dtype)
    options = {**MASKS[mask], "perturb_dtype": "float32"}
    expected = by_hand(params, loss, **MASKS[mask])
    _, core = gnp.value_and_grad(loss, R, 1.0, **options)(params)
    tx = gnp.gradient_regularization(R, 1.0, **options)
    updates, state = through_transformation(tx, loss, params)
    for got in (core, updates):
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(state.perturbation_norm, R, rtol=1e-3)


def test_without_it_most_of_a_small_perturbation_is_lost():
    params, loss = problem("bfloat16")
    _, state = through_transformation(gnp.gradient_regularization(R, 1.0), loss, params)
    assert abs(state.perturbation_norm / R - 1) > 0.02


@pytest.mark.parametrize("form", ["number", "schedule"])
def test_a_type_that_is_not_wider_changes_nothing(form):
    params, loss = problem("float32")
    alpha = 0.8 if form == "number" else gnp.schedules.zero_warmup(0.8, 0)
    results = []
    for dtype in (None, "float32", "bfloat16", jnp.float16):
        tx = gnp.gradient_regularization(R, alpha, perturb_dtype=dtype)
        results.append(through_transformation(tx, loss, params))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, results[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: gnp.sam(R, perturb_dtype=dtype),
        lambda dtype: gnp.layerwise_gradient_regularization(
            R, 1.0, gnp.masks.by_path(""), perturb_dtype=dtype
        ),
        lambda dtype: optax.inject_hyperparams(gnp.gradient_regularization)(
            r=R, alpha=1.0, perturb_dtype=dtype
        ),
    ],
)
def test_every_form_takes_it(make):
    params, loss = problem("bfloat16")
    updates, _ = through_transformation(make("float32"), loss, params)
    jax.tree.map(np.testing.assert_array_equal, updates, by_hand(params, loss))


def test_asam_takes_it():
    params, loss = problem("bfloat16")
    _, state = through_transformation(gnp.asam(R, perturb_dtype="float32"), loss, params)
    _, rounded = through_transformation(gnp.asam(R), loss, params)
    assert state.perturbation_norm != rounded.perturbation_norm


def test_float64_moves_what_float32_can_not(x64):
    params, loss = problem("float32")
    tx = gnp.gradient_regularization(1e-9, 1.0, perturb_dtype="float64")
    _, state = through_transformation(tx, loss, params)
    np.testing.assert_allclose(state.perturbation_norm, 1e-9, rtol=1e-6)
    _, state = through_transformation(gnp.gradient_regularization(1e-9, 1.0), loss, params)
    assert state.perturbation_norm < 5e-10  # only what starts from 0 moves


@jax.jit
def scaled_step(params, opt_state, scale, overflow):
    """The step of the README: float16 with Flax's dynamic scale."""
    _, loss = problem("float16")

    def scaled_loss(params):
        # `overflow` is injected into the perturbed pass alone.
        return scale.scale * (loss(params) + overflow * jnp.sum(params["head"]["bias"] ** 2))

    _, grads = gnp.value_and_grad(scaled_loss, R, 1.0, perturb_dtype="float32")(params)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / scale.scale, grads)
    # Its gradient is `grads`: so the scale sees what the optimizer will, and adapts to it.
    scale, is_finite, _, grads = scale.value_and_grad(
        lambda at: optax.tree.vdot(jax.lax.stop_gradient(grads), at)
    )(grads)
    updates, new_state = optax.adam(1e-2).update(grads, opt_state, params)
    keep = functools.partial(jax.tree.map, functools.partial(jnp.where, is_finite))
    params = keep(optax.apply_updates(params, updates), params)
    return params, keep(new_state, opt_state), scale, grads


def test_float16_with_a_dynamic_scale():
    params, loss = problem("float16")
    single = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    _, expected = gnp.value_and_grad(loss, R, 1.0)(single)
    scale = DynamicScale(scale=jnp.float32(2.0**10))
    state = optax.adam(1e-2).init(params)
    new_params, new_state, new_scale, grads = scaled_step(params, state, scale, 0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 5e-2, 2e-3), grads, expected)
    assert new_scale.scale == scale.scale
    assert int(optax.tree_utils.tree_get(new_state, "count")) == 1

    # The bias is 0 where the first gradient is taken, and not where the second is.
    params, state, skipped, _ = scaled_step(new_params, new_state, new_scale, 1e38)
    assert skipped.scale == new_scale.scale / 2
    for got, kept in ((params, new_params), (state, new_state)):
        jax.tree.map(np.testing.assert_array_equal, got, kept)


FORMS_8 = {
    "functional": {},
    "perturbed in float32": {"perturb_dtype": "float32"},
    "exact": {"curvature": "exact"},
    "surrogate gap": {"surrogate_gap": 0.3},
    "mask": {"mask": gnp.masks.by_path("b")},
}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_leaves_of_eight_bits(dtype):
    """Perturbed in float32 and rounded, up to the ends of their range (448 without infinities)."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": (jax.random.normal(keys[0], (8, 16)) * 100).astype(dtype),
        "b": jax.random.normal(keys[1], (16,)),
    }
    x = jax.random.normal(keys[2], (32, 8))

    def loss(params):
        return jnp.mean(jnp.tanh(x @ (params["a"].astype(jnp.float32) / 100) @ params["b"]) ** 2)

    def numbers(tree):
        return jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.float32)), tree)

    def same(got, expected):
        # Where a number lies in the middle of two, another program may round it the other way.
        difference = optax.tree.norm(jax.tree.map(np.subtract, got, expected))
        assert difference <= 0.01 * optax.tree.norm(expected)

    r, g = 300.0, jax.grad(loss)(params)
    norm = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), g))
    moved = jax.tree.map(
        lambda w, d: (w.astype(jnp.float32) + r * d.astype(jnp.float32) / norm).astype(w.dtype),
        params,
        g,
    )
    expected = numbers(jax.grad(loss)(moved))
    got, state = through_transformation(gnp.sam(r), loss, params)
    same(numbers(got), expected)
    assert float(state.perturbation_norm) > 0
    for options in FORMS_8.values():
        for alpha in (1.0, 0.8, 0.0):
            _, grads = gnp.value_and_grad(loss, r, alpha, **options)(params)
            assert grads["a"].dtype == dtype
            if alpha == 1 and not options:
                same(numbers(grads), expected)
    tx = gnp.momentum_sam(r, decay=0.0)
    _, memory = tx.update(g, tx.init(params), params)
    there = gnp.perturbed(params, memory)
    same(numbers(there), numbers(moved))
