"""Gradient accumulation and m-sharpness: the numbers of their definitions, the memory of a part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models.problems import mlp

import gnp_optax as gnp
from gnp_optax import batching
from gnp_optax.masks import _flops

R, ALPHA = 0.1, 0.8
FORMS = {
    "GR": {},
    "SAM": {"alpha": 1.0},
    "layer-wise": {"mask": gnp.masks.by_path("head"), "scope": "masked"},
    "penalty of a layer": {"mask": gnp.masks.by_path("head")},
    "adaptive": {"direction": gnp.directions.adaptive()},
    "exact": {"curvature": "exact"},
    "exact, penalty of a layer": {"curvature": "exact", "mask": gnp.masks.by_path("head")},
}


def regularized(loss, *, alpha=ALPHA, **options):
    return gnp.value_and_grad(loss, R, alpha, **options)


def assert_close(got, expected, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, 1e-13), got, expected)


def counting(loss):
    """The loss, and the number of examples in each of its passes."""
    passes = []

    def counted(params, x, y):
        jax.debug.callback(lambda _: passes.append(len(x)), x[0, 0])
        return loss(params, x, y)

    return counted, passes


def problem():
    params, loss, x, y = mlp(dtype=jnp.float64)
    return params, loss, x, y


# Accumulation


@pytest.mark.exhaustive(but=["layer-wise-False", "exact-True"])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_give_the_numbers_of_the_batch(form, jit, x64):
    params, loss, x, y = problem()
    compute = regularized(batching.accumulate(loss, 4), **FORMS[form])
    got = (jax.jit(compute) if jit else compute)(params, x, y)
    assert_close(got, regularized(loss, **FORMS[form])(params, x, y))


def test_micro_batches_in_the_transformation(x64):
    params, loss, x, y = problem()

    @functools.partial(jax.jit, static_argnums=0)
    def update(loss):
        tx = gnp.gradient_regularization(R, gnp.schedules.zero_warmup(ALPHA, 0))
        grads = jax.grad(loss)(params, x, y)
        return tx.update(grads, tx.init(params), params, value_fn=lambda p: loss(p, x, y))

    assert_close(update(batching.accumulate(loss, 4)), update(loss))


def test_k_micro_batches_take_2_k_passes_and_no_operation_more():
    params, loss, x, y = mlp()
    counted, passes = counting(loss)
    jax.jit(regularized(batching.accumulate(counted, 4)))(params, x, y)
    jax.effects_barrier()
    if jax.__version_info__ >= (0, 7):  # before, JAX drops the callbacks of a custom derivative
        assert passes == [8] * 8

    params = {"body": jnp.ones((256, 256)), "head": jnp.ones((256, 256))}
    x = jnp.ones((1024, 256))

    def wide(params, x):
        return jnp.mean((jnp.tanh(x @ params["body"]) @ params["head"]) ** 2)

    whole, parts = (
        _flops.flops(regularized(loss), params, x) for loss in (wide, batching.accumulate(wide, 4))
    )
    assert parts < 1.02 * whole


def test_micro_batches_are_spread_over_the_batch_and_aux_is_stacked():
    def loss(w, x):
        return jnp.mean(w * x), {"x": x}

    x = jnp.arange(6.0)
    (value, aux), grad = jax.value_and_grad(
        batching.accumulate(loss, 3, has_aux=True), has_aux=True
    )(2.0, x)
    assert (value, grad) == (5.0, 2.5)
    np.testing.assert_array_equal(aux["x"], [[0, 3], [1, 4], [2, 5]])


def test_a_loss_in_micro_batches_is_evaluated_without_a_gradient():
    params, loss, x, y = mlp()
    value = jax.jit(batching.accumulate(loss, 4))
    np.testing.assert_allclose(value(params, x, y), loss(params, x, y), rtol=1e-6)
    assert _flops.flops(value, params, x, y) < 0.7 * _flops.flops(jax.grad(loss), params, x, y)


def test_parameters_that_need_no_gradient_and_arguments_that_are_not_split(x64):
    params, loss, x, y = problem()
    key = jax.random.key(0)

    def noisy(params, x, y, *, key, scale, train):
        assert train is True
        assert isinstance(params["step"], jax.Array)
        noise = jax.random.normal(key, (), x.dtype)
        return scale * loss(params["w"], x + params["step"] * noise, y)

    def gradient(fun):
        def of_weights(w):
            return fun({"w": w, "step": jnp.array(1)}, x, y, key=key, scale=2.0, train=True)

        return regularized(of_weights)(params)

    assert_close(gradient(batching.accumulate(noisy, 4)), gradient(noisy))


def test_a_key_for_each_example():
    keys = jax.random.split(jax.random.key(0), 4)

    def loss(w, keys):
        return jnp.mean(w * jax.vmap(jax.random.normal)(keys))

    np.testing.assert_allclose(
        jax.grad(batching.accumulate(loss, 2))(1.0, keys), jax.grad(loss)(1.0, keys), rtol=1e-6
    )


def test_gradients_add_up_in_float32():
    """In bfloat16, 256 + 1 is 256."""
    x = jnp.ones((512, 1))
    grad = jax.grad(batching.accumulate(lambda w, x: jnp.mean(x * w).astype(jnp.float32), 512))
    assert grad(jnp.ones((), jnp.bfloat16), x) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_strict_promotion(dtype):
    w, x = jnp.ones(2, dtype), jnp.ones((4, 2), dtype)

    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    with jax.numpy_dtype_promotion("strict"):
        got = jax.grad(batching.accumulate(loss, 2))(w, x)
        grouped = batching.m_sharpness(regularized(loss), 2)(w, x)[1]
    assert (got.dtype, grouped.dtype) == (w.dtype, w.dtype)
    np.testing.assert_array_equal(got, jax.grad(loss)(w, x))


def test_what_is_in_a_tree_given_by_keyword_is_not_taken_for_examples():
    def loss(w, x, *, teacher, key):
        return jnp.mean(x @ (w - teacher["w"])) + 0 * jax.random.normal(key)

    given = {"teacher": {"w": jnp.zeros(2)}, "key": jax.random.PRNGKey(0)}
    w, x = jnp.ones(2), jnp.arange(4.0).reshape(2, 2)
    got = jax.grad(batching.accumulate(loss, 2))(w, x, **given)
    np.testing.assert_allclose(got, jax.grad(loss)(w, x, **given))


# m-sharpness


def by_definition(gradient, m, params, x, y):
    groups = [gradient(params, x[i : i + m], y[i : i + m]) for i in range(0, len(x), m)]
    return jax.tree.map(lambda *found: sum(found) / len(found), *groups)


@pytest.mark.exhaustive(but=["layer-wise-2", "GR-1"])
@pytest.mark.parametrize("parallel", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_m_sharpness_is_the_mean_over_groups(form, parallel, x64):
    params, loss, x, y = problem()
    gradient = regularized(loss, **FORMS[form])
    got = jax.jit(batching.m_sharpness(gradient, 8, parallel=parallel))(params, x, y)
    assert_close(got, by_definition(gradient, 8, params, x, y))


def test_one_group_is_the_batch(x64):
    params, loss, x, y = problem()
    gradient = regularized(loss)
    assert_close(batching.m_sharpness(gradient, 32)(params, x, y), gradient(params, x, y))


def test_groups_are_neighbours_and_aux_is_in_their_order():
    def loss(w, x):
        return jnp.mean(w * x), x

    for parallel in (1, 2, 4):
        gradient = batching.m_sharpness(
            regularized(loss, has_aux=True), 2, parallel=parallel, has_aux=True
        )
        (value, aux), grad = gradient(2.0, jnp.arange(8.0))
        assert (value, grad) == (7.0, 3.5)
        np.testing.assert_array_equal(aux, jnp.arange(8.0).reshape(4, 2))


def test_one_group_at_a_time_needs_no_vmap():
    def loss(w, x):
        seen = jax.ShapeDtypeStruct((), x.dtype)
        return jnp.mean(x * w) + jax.pure_callback(lambda x: x.sum(), seen, x)

    value, grad = batching.m_sharpness(regularized(loss), 2)(1.0, jnp.arange(4.0))
    assert (value, grad) == (4.5, 1.5)


def test_groups_of_micro_batches(x64):
    """Both at once: groups larger than what fits into memory."""
    params, loss, x, y = problem()
    gradient = batching.m_sharpness(regularized(batching.accumulate(loss, 4)), 16)
    assert_close(gradient(params, x, y), by_definition(regularized(loss), 16, params, x, y))


def test_m_sharpness_shares_the_prefix():
    params, loss, x, y = mlp()
    counted, passes = counting(loss)
    gradient = batching.m_sharpness(regularized(counted, mask=gnp.masks.by_path("head")), 8)
    jax.jit(gradient)(params, x, y)
    jax.effects_barrier()
    assert passes == [8] * 4


@pytest.mark.parametrize("scheme", ["accumulate", "m_sharpness"])
def test_memory_is_that_of_a_part(scheme):
    width = 64
    params = {f"layer_{i}": jnp.ones((width, width)) for i in range(4)}

    def loss(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    def temporary(batch, **parallel):
        x = jnp.ones((batch, width))
        gradient = {
            "accumulate": lambda: regularized(batching.accumulate(loss, batch // 1024)),
            "m_sharpness": lambda: batching.m_sharpness(regularized(loss), 1024, **parallel),
            "batch": lambda: regularized(loss),
        }[scheme if batch > 1024 else "batch"]()
        return jax.jit(gradient).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    one, four, sixteen = (temporary(n * 1024) for n in (1, 4, 16))
    assert four <= 1.5 * one
    assert sixteen <= 1.5 * one
    if scheme == "m_sharpness":
        assert temporary(16 * 1024, parallel=4) > 2.5 * one


def test_training_with_groups():
    """The whole step is compiled once, whatever optimizer follows."""
    params, loss, x, y = mlp()
    optimizer = optax.adamw(1e-2)
    gradient = batching.m_sharpness(regularized(loss), 8)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        value, grads = gradient(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert len(traces) == 1
    assert values[-1] < 0.8 * values[0]
