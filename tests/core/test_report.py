"""What a step tells: against gradients computed apart, at no further pass, for every logger."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gnp_optax as gnp
import gnp_optax.nnx as gnp_nnx
from gnp_optax.linen import TrainState

R = 0.1
HEAD = gnp.masks.by_path("^head")
PARAMS = {
    "body": jax.random.normal(jax.random.key(0), (3, 8)),
    "head": jax.random.normal(jax.random.key(1), (8, 1)),
}
X = jax.random.normal(jax.random.key(2), (16, 3))


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["body"]) @ params["head"] - 1) ** 2)


def norm(leaves):
    return np.sqrt(sum(np.sum(np.square(x)) for x in leaves))


def by_hand(names, x=X):
    """The report over the leaves of some names, which are perturbed."""
    g = jax.grad(loss_fn)(PARAMS, x)
    length = norm([g[n] for n in names])
    there = {n: w + R * g[n] / length if n in names else w for n, w in PARAMS.items()}
    value, tilde = jax.value_and_grad(loss_fn)(there, x)
    products = sum(np.sum(g[n] * tilde[n]) for n in names)
    cosine = products / length / norm([tilde[n] for n in names])
    return gnp.Report(length, R, value, cosine, True)


def assert_report(got, expected):
    assert [x.dtype for x in got] == [*4 * [jnp.float32], bool]
    np.testing.assert_allclose(got[:4], expected[:4], rtol=1e-4)
    assert bool(got.perturbed) == expected.perturbed


@pytest.mark.parametrize(
    ("mask", "names", "scope"),
    [
        (None, ("body", "head"), "all"),
        (HEAD, ("head",), "all"),
        (HEAD, ("head",), "masked"),
    ],
)
def test_report_of_a_second_pass(mask, names, scope):
    gradient = gnp.value_and_grad(loss_fn, R, 0.8, mask=mask, scope=scope, return_report=True)
    value, grads, report = jax.jit(gradient)(PARAMS, X)
    assert_report(report, by_hand(names))
    plain = gnp.value_and_grad(loss_fn, R, 0.8, mask=mask, scope=scope)
    expected = jax.jit(plain)(PARAMS, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), (value, grads), expected)


@pytest.mark.parametrize("alpha", [0.0, jnp.array(0.0)])
@pytest.mark.parametrize("has_aux", [False, True])
def test_report_of_a_step_without_a_second_pass(alpha, has_aux):
    fun = (lambda p, x: (loss_fn(p, x), "aux")) if has_aux else loss_fn

    def step(alpha):
        found, _, report = gnp.value_and_grad(fun, R, alpha, has_aux=has_aux, return_report=True)(
            PARAMS, X
        )
        return (found[0] if has_aux else found), report

    value, report = jax.jit(step)(alpha) if isinstance(alpha, jax.Array) else step(alpha)
    length = norm(jax.tree.leaves(jax.grad(loss_fn)(PARAMS, X)))
    assert_report(report, gnp.Report(length, 0, value, 1, False))


def test_report_is_that_of_the_transformation():
    tx = gnp.gradient_regularization(R, 0.8)
    grads = jax.grad(loss_fn)(PARAMS, X)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=lambda p: loss_fn(p, X))
    _, _, report = gnp.value_and_grad(loss_fn, R, 0.8, return_report=True)(PARAMS, X)
    assert_report(report, gnp.Report(*state[2:]))


def test_report_is_finite_where_the_gradient_is_zero():
    _, _, report = gnp.value_and_grad(lambda w: jnp.sum(0 * w), R, 1.0, return_report=True)(
        jnp.ones(2)
    )
    assert_report(report, gnp.Report(0, 0, 0, 0, True))


@pytest.mark.exhaustive(but=["2"])
@pytest.mark.parametrize("parallel", [1, 2])
def test_reports_of_groups_and_seeds_are_rows(parallel):
    gradient = gnp.value_and_grad(loss_fn, R, 1.0, return_report=True)
    groups = X.reshape(4, 4, 3)
    of_groups = gnp.batching.m_sharpness(gradient, m=4, parallel=parallel)
    *_, rows = jax.jit(of_groups)(PARAMS, X)
    *_, vmapped = jax.jit(jax.vmap(gradient, (None, 0)))(PARAMS, groups)
    expected = [by_hand(("body", "head"), x) for x in groups]
    for i, each in enumerate(expected):
        assert_report(jax.tree.map(lambda x, i=i: x[i], rows), each)
        assert_report(jax.tree.map(lambda x, i=i: x[i], vmapped), each)
    with pytest.raises(ValueError, match=r"lambda x: x.mean\(0\), report"):
        gnp.report_as_dict(rows)
    means = gnp.report_as_dict(jax.tree.map(lambda x: x.mean(0), rows))
    np.testing.assert_allclose(means["sam/cosine"], rows.cosine.mean(), rtol=1e-6)


@pytest.mark.parametrize("mask", [None, HEAD])
def test_report_costs_no_pass(mask):
    """A few operations for each parameter, and for each example those that sum up the loss."""

    def program(**kwargs):
        gradient = gnp.value_and_grad(loss_fn, R, 1.0, mask=mask, **kwargs)
        return jax.jit(gradient).lower(PARAMS, jnp.ones((256, 3)))

    without, reported = program(), program(return_report=True)
    products = [x.as_text().count("dot_general") for x in (without, reported)]
    assert products[0] == products[1]
    flops = [x.compile().cost_analysis()["flops"] for x in (without, reported)]
    assert flops[1] - flops[0] < 20 * sum(w.size for w in PARAMS.values()) + 4 * 256


# The dictionary.


def sam_state(wrap):
    tx = wrap(gnp.sam(R))
    grads = jax.grad(loss_fn)(PARAMS, X)
    return tx.update(grads, tx.init(PARAMS), PARAMS, value_fn=lambda p: loss_fn(p, X))[1]


WRAPPERS = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(tx, optax.adam(1e-3)),
    "MultiSteps after": lambda tx: optax.chain(
        tx, optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(optax.chain(tx, optax.sgd(0.1)), 3),
    "inject_hyperparams": lambda tx: optax.chain(
        optax.inject_hyperparams(gnp.sam)(R), optax.sgd(0.1)
    ),
}


@pytest.mark.exhaustive(but=["chain", "inject_hyperparams"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_dictionary_of_a_state_in_a_wrapper(name):
    found = gnp.report_as_dict(sam_state(WRAPPERS[name]))
    expected = by_hand(("body", "head"))._asdict()
    assert list(found) == [f"sam/{field}" for field in expected]
    assert all(type(x) is float for x in found.values())
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


def test_dictionary_of_a_train_state_and_of_an_nnx_optimizer():
    expected = gnp.report_as_dict(sam_state(WRAPPERS["chain"]), prefix="")
    tx = optax.chain(gnp.sam(R), optax.sgd(0.1))
    grads = jax.grad(loss_fn)(PARAMS, X)
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    state = state.apply_gradients(grads=grads, value_fn=lambda p: loss_fn(p, X))
    assert gnp.report_as_dict(state, prefix="") == pytest.approx(expected)

    class Model(nnx.Module):
        def __init__(self):
            self.body, self.head = (nnx.Param(PARAMS[name]) for name in ("body", "head"))

    def loss(model, x):
        return loss_fn({"body": model.body[...], "head": model.head[...]}, x)

    model = Model()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    value_fn = gnp_nnx.value_fn(loss, model, X)
    optimizer.update(model, nnx.grad(loss)(model, X), value_fn=value_fn)
    assert gnp.report_as_dict(optimizer.opt_state, prefix="") == pytest.approx(expected)


def test_dictionary_under_jit_is_of_scalars():
    @jax.jit
    def step():
        *_, report = gnp.value_and_grad(loss_fn, R, 1.0, return_report=True)(PARAMS, X)
        return gnp.report_as_dict(report), gnp.report_as_dict(sam_state(WRAPPERS["chain"]))

    for found in step():
        assert {x.shape for x in found.values()} == {()}
        assert found["sam/perturbed"] == 1


def test_dictionary_of_momentum_sam():
    tx = optax.chain(gnp.momentum_sam(R), optax.sgd(0.1))
    grads = jax.grad(loss_fn)(PARAMS, X)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    found = gnp.report_as_dict(state, prefix="msam/")
    expected = {
        "msam/grad_norm": norm(jax.tree.leaves(grads)),
        "msam/perturbation_norm": R,
        "msam/radius": R,
    }
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("number", [0, 2])
def test_dictionary_needs_one_state(number):
    tx = optax.chain(optax.identity(), *[gnp.sam(R), gnp.momentum_sam(R)][:number])
    with pytest.raises(ValueError, match=rf"There are {number} reports or states"):
        gnp.report_as_dict(tx.init(PARAMS))
