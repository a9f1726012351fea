"""What `check_step` says of a step, against closed forms, and which chains it refuses."""

import jax
import jax.numpy as jnp
import optax
import pytest
from models.problems import mlp

import gnp_optax as gnp
from gnp_optax.diagnostics import check_step

SAM = gnp.sam(rho=0.5)
W = jnp.array([3.0, 4.0])


def loss(w):
    return jnp.sum(w**2) / 2


def test_the_numbers_of_a_step():
    """`g~ = (1 + r / ||w||) w`: the loss grows from 25 / 2 to 30.25 / 2, the update is 0.55."""
    found = check_step(optax.chain(SAM, optax.sgd(0.1)), loss, W)
    expected = {
        "loss": 12.5,
        "surrogate_gap": 2.625,
        "cosine": 1.0,
        "grad_norm": 5.0,
        "perturbation_norm": 0.5,
        "update_norm": 0.55,
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected)
    assert (found.is_first, found.perturbed, found.dtypes) == (True, True, ("float32",))
    lines = str(found).splitlines()
    assert "first in its chain    yes" in lines
    assert "second pass           ran" in lines
    assert "perturbation          0.5, in float32" in lines
    assert max(map(len, lines)) < 80


def test_cost_and_batches():
    params, mlp_loss, x, y = mlp()
    tx = optax.chain(gnp.sam(rho=0.5, has_aux=True), optax.sgd(0.1))
    found = check_step(tx, lambda *given: (mlp_loss(*given), x), params, x, y, has_aux=True)
    assert 2 < found.cost < 2.3
    assert found.loss == pytest.approx(float(mlp_loss(params, x, y)))


def test_before_and_after_a_warmup():
    tx = gnp.gradient_regularization(0.5, gnp.schedules.zero_warmup(1.0, 1))
    before = check_step(tx, loss, W)
    assert not before.perturbed
    assert "did not run: alpha is 0" in str(before)
    assert "cosine" not in str(before)
    _, state = tx.update(W, tx.init(W), W, value_fn=loss)
    assert check_step(tx, loss, W, opt_state=state).perturbed


def test_a_perturbation_that_is_lost():
    w = jnp.full(3, 256.0, jnp.bfloat16)
    found = check_step(gnp.sam(rho=0.1), loss, w)
    assert found.perturbation_norm == 0
    assert "0: lost in rounding to bfloat16?" in str(found)


def test_a_clipping_before_that_did_nothing_is_told():
    clip = optax.clip_by_global_norm(1e3)
    found = check_step(optax.chain(optax.chain(clip, SAM), optax.sgd(0.1)), loss, W)
    assert not found.is_first
    assert "no: what is before it left this gradient as it was" in str(found)


def test_deep_in_wrappers():
    sam = optax.inject_hyperparams(gnp.sam)(rho=0.5)
    tx = optax.apply_if_finite(optax.chain(optax.chain(sam), optax.adamw(0.1)), 3)
    found = check_step(tx, loss, W)
    assert found.is_first
    assert found.perturbation_norm == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("before", "norm"),
    [
        (optax.clip_by_global_norm(1.0), "has 1"),
        (optax.add_decayed_weights(1.0), "has 10"),
        (optax.sgd(0.1), "has 0.5"),
        (optax.masked(optax.set_to_zero(), {"a": True, "b": False}), "has 4"),
    ],
    ids=["clipping", "decay", "optimizer", "freezing"],
)
def test_what_changes_the_gradient_before_is_an_error(before, norm):
    params = {"a": W[:1], "b": W[1:]}

    def of_leaves(params):
        return sum(loss(w) for w in params.values())

    with pytest.raises(ValueError, match=rf"norm is 5: .* {norm}\..*Put the regularization first"):
        check_step(optax.chain(before, SAM, optax.sgd(0.1)), of_leaves, params)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.chain(SAM, gnp.gradient_regularization(0.1, 0.5)), "are 2 gradient regularizations"),
        (optax.adamw(1e-3), r"no gradient regularization .* optax.chain\(gnp.sam"),
        (gnp.momentum_sam(rho=0.1), "check_perturbed"),
        (optax.MultiSteps(SAM, 2).gradient_transformation(), "MultiSteps"),
    ],
    ids=["twice", "none", "momentum", "multi-steps"],
)
def test_chains_that_are_refused(tx, message):
    with pytest.raises(ValueError, match=message):
        check_step(tx, loss, W)


def test_nothing_is_changed_and_the_step_is_compiled_once():
    traces = []

    def counted(w):
        traces.append(isinstance(w, jax.core.Tracer))
        return loss(w)

    check_step(optax.chain(SAM, optax.sgd(0.1)), counted, W)
    assert all(traces)
    assert W.tolist() == [3, 4]
