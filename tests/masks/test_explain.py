"""What is said of a cost: what is shared, what is not, and why."""

import logging
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from gnp_optax import masks

PARAMS = {"early": jnp.eye(16), "late": jnp.eye(16), "stack": jnp.ones((3, 16, 16))}
X = jnp.ones((256, 16))


@jax.custom_jvp
def activation(x):
    return jnp.tanh(x @ x.T) @ x


@activation.defjvp
def activation_jvp(primals, tangents):
    return jax.jvp(jnp.sin, primals, tangents)


def layer(h, kernel):
    return jnp.tanh(h @ kernel), None


def stopped(h, p):
    return lax.stop_gradient(h @ p["late"])


def branch(p, h):
    return lax.cond(h.sum() > 0, lambda h: h @ p["early"] @ p["late"], lambda h: h, h)


def talkative(p):
    def step(h, kernel):
        jax.debug.callback(lambda: None)
        return h @ kernel, h @ p["late"]

    return step


CALLS = {
    "scan": (
        lambda p, h: lax.scan(lambda h, _: (h @ p["late"], None), h, length=3)[0],
        "a scan of 3 iterations",
        "first iteration",
    ),
    "scan that calls the host": (
        lambda p, h: lax.scan(talkative(p), h, p["stack"])[1][-1],
        "a scan of 3 iterations",
        "it calls the host",
    ),
    "while": (
        lambda p, h: (
            lax.while_loop(
                lambda c: c[1] < 3, lambda c: (c[0] @ c[0].T @ c[0], c[1] + 1), (stopped(h, p), 0)
            )[0]
            + p["late"].sum()
        ),
        "a while_loop",
        "how often it runs is not known",
    ),
    "cond": (branch, "a branch", "on one side of the cut as a whole"),
    "custom": (lambda p, h: activation(h + p["late"].sum()), "derivative of its own", "as a whole"),
    "checkpoint": (
        lambda p, h: jax.checkpoint(lambda h: h @ p["late"] @ p["early"])(h),
        "a checkpoint",
        "no matrix product before",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_not_cut_is_named_with_line_and_reason(name, caplog):
    call, what, why = CALLS[name]

    def loss(p, x):
        return jnp.mean(jax.jit(call)(p, jnp.tanh(x @ p["early"])) ** 2)  # opened, not named

    mask = masks.by_path("^late$")
    with caplog.at_level(logging.DEBUG, logger="gnp_optax"):
        found = masks.explain(loss, PARAMS, mask, X)
    (refusal,) = found.not_cut
    assert what in refusal.what
    assert why in refusal.why
    assert "test_explain.py:" in refusal.where
    assert str(refusal) in str(found)
    assert 0 < found.shared < 1
    told = {record.getMessage() for record in caplog.records if record.name == "gnp_optax"}
    assert told == {f"Not cut, so that both passes compute it whole: {refusal}"}


def test_what_is_cut_is_not_named():
    def loss(p, x):
        h, _ = lax.scan(jax.checkpoint(layer), x, p["stack"])
        return jnp.mean(jax.nn.relu(h @ p["late"]) ** 2)

    mask = masks.stacked("^stack", last=1) | masks.by_path("^late")
    found = masks.explain(loss, jax.eval_shape(lambda: PARAMS), mask, X)
    assert found.not_cut == ()
    assert abs(found.shared - 0.5) < 0.02
    lines = str(found).splitlines()
    assert lines[0] == f"{found.cost:.2f} ordinary gradients a step."
    assert re.match(r"(49|50) % of the loss is computed once, .*test_explain.py:\d", lines[1])
    assert found.cost == masks.cost(loss, PARAMS, mask, X)


def test_a_loss_that_cannot_be_traced_beforehand():
    def loss(p, x):
        return jnp.mean((x @ p["late"]) ** 2) if p["early"][0, 0] > 0 else 0.0

    mask = masks.by_path("^late")
    with pytest.raises(jax.errors.TracerBoolConversionError):
        masks.explain(loss, PARAMS, mask, X)
