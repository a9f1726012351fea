"""Misuse: every message says what is wrong; the calls of a new user are in test_wrong_calls."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gnp_optax as gnp

PARAMS = {"body": jnp.ones((2, 2)), "head": jnp.ones(2)}
HEAD = gnp.masks.by_path("head")


def loss(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def named_loss(params):
    return jnp.sum(params["body"] ** 2) + jnp.sum(params["head"] ** 2)


def update(tx, params=PARAMS, **extra_args):
    grads = jax.tree.map(jnp.ones_like, params)
    return tx.update(grads, tx.init(params), params, **extra_args)


def core(*args, fun=loss, params=PARAMS, **kwargs):
    return gnp.value_and_grad(fun, *(args or (0.1, 0.5)), **kwargs)(params)


def by_sam(wrap, **extra_args):
    return lambda: update(wrap(gnp.sam(0.1)), value_fn=named_loss, **extra_args)


gr = functools.partial(gnp.gradient_regularization, 0.1, 0.5)
inject = optax.inject_hyperparams(gnp.gradient_regularization)


def batch_loss(params, x, **kwargs):
    return jnp.mean(x @ params["body"])


def accumulated(micro_batches):
    def fun(params, x, *args, **kwargs):
        return batch_loss(params, x)

    return gnp.batching.accumulate(fun, micro_batches)


def grouped(m, **kwargs):
    return gnp.batching.m_sharpness(gnp.value_and_grad(batch_loss, 0.1, 0.5), m, **kwargs)


def _state_of_multi_steps():
    return (
        optax.MultiSteps(optax.identity(), 2)
        .init(PARAMS)
        ._replace(inner_opt_state=gnp.sam(0.1).init(PARAMS))
    )


CASES = {
    # One gradient a step.
    "momentum_rho": (lambda: gnp.momentum_sam(-0.1), ValueError, "rho must be finite and not neg"),
    "momentum_rho_later": (
        lambda: gnp.momentum_sam(lambda step: -0.1).init(PARAMS),
        ValueError,
        r"rho\(step\) must be finite and not negative",
    ),
    "momentum_decay": (lambda: gnp.momentum_sam(0.1, 1.0), ValueError, "decay must be less than 1"),
    "momentum_mask": (
        lambda: gnp.momentum_sam(0.1, mask=gnp.masks.by_path("x")).init(PARAMS),
        ValueError,
        "selects none of the parameters",
    ),
    "momentum_without_params": (
        lambda: gnp.momentum_sam(0.1).update(PARAMS, gnp.momentum_sam(0.1).init(PARAMS)),
        ValueError,
        r"tx.update\(grads, opt_state, params\)",
    ),
    "momentum_wrong_state": (
        lambda: gnp.momentum_sam(0.1).update(PARAMS, gnp.sam(0.1).init(PARAMS), PARAMS),
        TypeError,
        "has GradientRegularizationState where MomentumSAMState should be",
    ),
    "momentum_other_gradient": (
        lambda: gnp.momentum_sam(0.1).update(
            {"body": PARAMS["body"]}, gnp.momentum_sam(0.1).init(PARAMS), PARAMS
        ),
        ValueError,
        "another structure than the parameters",
    ),
    "momentum_masked": (
        lambda: optax.masked(gnp.momentum_sam(0.1), {"body": True, "head": False}).init(PARAMS),
        ValueError,
        "optax.MaskedNode",
    ),
    "perturbed_two": (
        lambda: gnp.perturbed(
            PARAMS, optax.chain(gnp.momentum_sam(0.1), gnp.momentum_sam(0.2)).init(PARAMS)
        ),
        ValueError,
        "There are 2 states of gnp.momentum_sam",
    ),
    "perturbed_other_parameters": (
        lambda: gnp.perturbed({"body": PARAMS["body"]}, gnp.momentum_sam(0.1).init(PARAMS)),
        ValueError,
        "not the parameters that the optimizer state was made for",
    ),
    "perturbed_other_shapes": (
        lambda: gnp.perturbed(
            {"body": jnp.ones(7), "head": PARAMS["head"]}, gnp.momentum_sam(0.1).init(PARAMS)
        ),
        ValueError,
        "not the parameters that the optimizer state was made for",
    ),
    "momentum_missing_gradient": (
        lambda: gnp.momentum_sam(0.1).update(
            {**PARAMS, "head": None}, gnp.momentum_sam(0.1).init(PARAMS), PARAMS
        ),
        ValueError,
        "The gradient has nothing for 'head'",
    ),
    "perturbed_dtype": (
        lambda: gnp.perturbed(PARAMS, gnp.momentum_sam(0.1).init(PARAMS), perturb_dtype="int32"),
        TypeError,
        "perturb_dtype must be a floating-point type",
    ),
    "friendly_in_the_core": (
        lambda: core(direction=gnp.directions.friendly()),
        ValueError,
        "Use the transformation",
    ),
    "friendly_decay": (lambda: gnp.directions.friendly(decay=1), ValueError, "less than 1"),
    "surrogate_gap": (lambda: gnp.gsam(0.1, -1.0), ValueError, "surrogate_gap must be finite"),
    # Curvature, stacked layers, budgets.
    "curvature": (lambda: gr(curvature="hessian"), ValueError, "'exact'"),
    "curvature_core": (lambda: core(curvature=True), ValueError, "'finite_difference'"),
    "stacked_too_many": (
        lambda: core(mask=gnp.masks.stacked("head", last=3)),
        ValueError,
        "selects 3 stacked layers, but 'head' has the shape",
    ),
    "stacked_none": (lambda: gnp.masks.stacked("head", last=0), ValueError, "at least 1"),
    "stacked_regex": (lambda: gnp.masks.stacked("(", last=1), ValueError, "regular expression"),
    "rows_of_another_length": (
        lambda: core(mask={"body": False, "head": np.array([True, False, True])}),
        ValueError,
        "among 3 stacked layers, but a leaf under it has the shape",
    ),
    "rows_of_integers": (
        lambda: core(mask={"body": False, "head": np.array([1, 0])}),
        TypeError,
        "NumPy array of bools",
    ),
    "rows_traced": (
        lambda: jax.jit(lambda rows: core(mask={"body": False, "head": rows}))(
            np.array([True, False])
        ),
        TypeError,
        "is traced",
    ),
    "budget_without_cost": (
        lambda: gnp.masks.top_k_layers(PARAMS, 1, budget=1.2),
        ValueError,
        "cost=lambda mask: gnp.masks.cost",
    ),
    "cost_without_budget": (
        lambda: gnp.masks.top_k_layers(PARAMS, 1, cost=lambda mask: 1.0),
        ValueError,
        "budget=1.2",
    ),
    "cost_no_function": (
        lambda: gnp.masks.top_k_layers(PARAMS, 1, budget=1.2, cost=1.1),
        TypeError,
        "a function from a mask",
    ),
    "budget_of_one": (
        lambda: gnp.masks.top_k_layers(PARAMS, 1, budget=1.0, cost=lambda mask: 1.0),
        ValueError,
        "more than 1",
    ),
    "budget_too_small": (
        lambda: gnp.masks.top_k_layers(
            {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(2)}},
            1,
            budget=1.1,
            cost=lambda mask: 1.3 if "b" in mask.paths else 1.5,
        ),
        ValueError,
        "The cheapest is 'b', which costs 1.300",
    ),
    "no_k_and_no_budget": (
        lambda: gnp.masks.top_k_layers(PARAMS, None),
        ValueError,
        "needs a budget",
    ),
    # Wrappers in the wrong place.
    "multi_transform": (
        by_sam(
            lambda t: optax.multi_transform(
                {"a": optax.chain(t, optax.sgd(0.1)), "b": optax.sgd(0.1)},
                {"body": "a", "head": "b"},
            )
        ),
        ValueError,
        "optax.partition or optax.multi_transform is wrapped around",
    ),
    "lookahead": (
        lambda: (lambda tx, params: tx.update(PARAMS, tx.init(params), params))(
            optax.lookahead(optax.chain(gnp.sam(0.1), optax.sgd(0.1)), 5, 0.5),
            optax.LookaheadParams.init_synced(PARAMS),
        ),
        TypeError,
        "optax.lookahead",
    ),
    "a plain GradientTransformation": (
        by_sam(lambda t: optax.chain(optax.GradientTransformation(t.init, t.update))),
        TypeError,
        "Put the regularization outside",
    ),
    "inject_hyperparams, mask that returns a bool": (
        lambda: inject(
            r=0.1, alpha=0.5, mask=lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p)
        ).init(PARAMS),
        ValueError,
        r"static_args=\('mask',\)",
    ),
    "inject_hyperparams, matrices": (
        lambda: inject(r=0.1, alpha=0.5, mask=gnp.masks.matrices()).init(PARAMS),
        ValueError,
        r"static_args=\('mask',\)",
    ),
    "inject_hyperparams, layers": (
        lambda: optax.inject_hyperparams(gnp.layerwise_gradient_regularization)(
            0.1, 0.5, gnp.masks.layers("head")
        ).init(PARAMS),
        ValueError,
        r"static_args=\('mask',\)",
    ),
    "state of another kind": (
        lambda: gr().update(PARAMS, {"step": 0}, PARAMS, value_fn=loss),
        TypeError,
        r"state has dict.*tx.init\(params\)",
    ),
    "integer parameters": (
        lambda: gr().init({"count": jnp.array(1)}),
        ValueError,
        "None of the parameters is floating point",
    ),
    "MultiSteps around, as a transformation": (
        by_sam(lambda t: optax.MultiSteps(t, 2).gradient_transformation()),
        ValueError,
        "optax.MultiSteps is wrapped around",
    ),
    "MultiSteps in a chain, around": (
        by_sam(lambda t: optax.chain(optax.MultiSteps(t, 2).gradient_transformation())),
        ValueError,
        "optax.MultiSteps is wrapped around",
    ),
    "MultiSteps around, state from elsewhere": (
        lambda: optax.MultiSteps(gnp.sam(0.1), 2).update(
            PARAMS, _state_of_multi_steps(), PARAMS, value_fn=loss
        ),
        ValueError,
        "optax.MultiSteps is wrapped around",
    ),
    # Batches in parts.
    "accumulate: not divisible": (
        lambda: accumulated(3)(PARAMS, jnp.ones((4, 2))),
        ValueError,
        "4 examples cannot be divided into 3 micro-batches",
    ),
    "accumulate: batch in a closure": (
        lambda: accumulated(2)(PARAMS),
        ValueError,
        r"value_fn=lambda params: loss_fn\(params, x, y\)",
    ),
    "accumulate: a key among the examples": (
        lambda: accumulated(2)(PARAMS, jnp.ones((4, 2)), jax.random.key(0)),
        ValueError,
        r"args\[1\]: \(\)\). Pass what belongs to no example by keyword",
    ),
    "accumulate: labels by keyword": (
        lambda: accumulated(2)(PARAMS, jnp.ones((4, 2)), y=jnp.ones(4)),
        ValueError,
        "keyword argument 'y' has 4 rows, as many as the batch. Pass it by position",
    ),
    "accumulate: arguments of other lengths": (
        lambda: accumulated(2)(PARAMS, jnp.ones((4, 2)), jnp.ones(3)),
        ValueError,
        "theirs differ",
    ),
    "accumulate: no examples": (
        lambda: accumulated(2)(PARAMS, jnp.ones((0, 2))),
        ValueError,
        "an empty batch",
    ),
    "accumulate: gradient of the inputs": (
        lambda: jax.grad(accumulated(2), argnums=1)(PARAMS, jnp.ones((4, 2))),
        TypeError,
        "but not to its other arguments",
    ),
    "accumulate: no micro-batches": (lambda: accumulated(0), ValueError, "at least 1"),
    "accumulate: loss per example": (
        lambda: gnp.batching.accumulate(lambda p, x: x[:, 0], 2)(PARAMS, jnp.ones((4, 2))),
        TypeError,
        r"shape \(2,\)",
    ),
    "m_sharpness: m does not divide the batch": (
        lambda: grouped(3)(PARAMS, jnp.ones((4, 2))),
        ValueError,
        "4 examples has no groups of 3",
    ),
    "m_sharpness: parallel does not divide the groups": (
        lambda: grouped(2, parallel=3)(PARAMS, jnp.ones((4, 2))),
        ValueError,
        "2 groups of m=2, of which 3 at a time",
    ),
    "m_sharpness: has_aux without aux": (
        lambda: grouped(2, has_aux=True)(PARAMS, jnp.ones((4, 2))),
        TypeError,
        "the same has_aux to both",
    ),
    # Types.
    "perturb_dtype: an integer type": (
        lambda: gr(perturb_dtype="int32"),
        TypeError,
        "floating-point type, such as 'float32'",
    ),
    "perturb_dtype: no type": (lambda: core(perturb_dtype="wide"), TypeError, "'wide'"),
    "perturb_dtype: behind inject_hyperparams": (
        lambda: inject(r=0.1, alpha=0.5, perturb_dtype=jnp.float32).init(PARAMS),
        TypeError,
        "write the name",
    ),
    "perturb_dtype: 64 bits": (
        lambda: gr(perturb_dtype="float64"),
        ValueError,
        "jax_enable_x64",
    ),
    "perturb_dtype: with exact curvature": (
        lambda: gr(perturb_dtype="float32", curvature="exact"),
        ValueError,
        "would have no effect",
    ),
    # The loss.
    "loss per example": (
        lambda: update(gnp.sam(0.1), value_fn=lambda p: p["head"] ** 2),
        TypeError,
        r"shape \(2,\).*loss.mean\(\)",
    ),
    "loss of shape (1,)": (
        lambda: update(gnp.sam(0.1), value_fn=lambda p: loss(p)[None]),
        TypeError,
        r"shape \(1,\)",
    ),
    "has_aux without aux": (
        lambda: update(gnp.sam(0.1, has_aux=True), value_fn=loss),
        TypeError,
        r"pair \(loss, aux\)",
    ),
    "integer loss": (
        lambda: update(gnp.sam(0.1), value_fn=lambda p: jnp.array(1)),
        TypeError,
        "int32",
    ),
    "complex loss": (
        lambda: update(gnp.sam(0.1), value_fn=lambda p: loss(p) + 0j),
        TypeError,
        "complex64",
    ),
    "loss that returns nothing": (lambda: update(gnp.sam(0.1), value_fn=print), TypeError, "None"),
    "core: loss per example": (
        lambda: core(fun=lambda p: p["head"]),
        TypeError,
        r"shape \(2,\)",
    ),
    "core: aux without has_aux": (
        lambda: core(fun=lambda p: (loss(p), p)),
        TypeError,
        "has_aux=True",
    ),
    "core: has_aux without aux": (lambda: core(has_aux=True), TypeError, r"pair \(loss, aux\)"),
    "gradient of another structure": (
        lambda: gr().update({"body": 1.0}, gr().init(PARAMS), PARAMS, value_fn=loss),
        ValueError,
        "another structure than the parameters",
    ),
    # Masks.
    "mask selects nothing": (
        lambda: gr(mask=gnp.masks.by_path("tail")).init(PARAMS),
        ValueError,
        r"by_path\('tail'\) selects none.*'body', 'head'",
    ),
    "mask of False": (
        lambda: gr(mask={"body": False, "head": False}).init(PARAMS),
        ValueError,
        "selects none",
    ),
    "mask=False": (lambda: gr(mask=False), ValueError, "inject_hyperparams"),
    "array mask": (
        lambda: gr(mask={"body": jnp.ones(2), "head": True}),
        TypeError,
        "must be made of Python bools",
    ),
    "traced mask": (
        lambda: jax.jit(lambda m: core(mask={"body": m, "head": True}))(True),
        TypeError,
        "traced.*static argument",
    ),
    "mask of another structure": (
        lambda: gr(mask={"body": True, "tail": False}).init(PARAMS),
        ValueError,
        "no prefix of the parameters",
    ),
    "dict mask on FrozenDict": (
        lambda: gr(mask={"body": {"w": True}}).init(_frozen()),
        ValueError,
        "no prefix of the parameters.*by_path",
    ),
    "broken regex": (lambda: gnp.masks.by_path("("), ValueError, "no regular expression"),
    "regex of another type": (lambda: gnp.masks.by_path(3), ValueError, "no regular expression"),
    "unknown layer": (
        lambda: gr(mask=gnp.masks.layers("tail")).init({"head": {"w": jnp.ones(2)}}),
        ValueError,
        "'tail'.*They have 'head'",
    ),
    "too many layers": (
        lambda: gnp.masks.top_k_layers({"a": {"w": jnp.ones(1)}}, 2),
        ValueError,
        "k=2.*has 1: 'a'",
    ),
    "no layers": (lambda: gnp.masks.top_k_layers(PARAMS, 0), ValueError, "at least 1"),
    "k is no integer": (lambda: gnp.masks.top_k_layers(PARAMS, 1.5), TypeError, "integer"),
    "traced gradients": (
        lambda: jax.jit(lambda g: gnp.masks.top_k_layers(g, 1))(PARAMS),
        TypeError,
        "static_argnames='mask'",
    ),
    "gradients not finite": (
        lambda: gnp.masks.top_k_layers({"a": {"w": jnp.array([jnp.nan])}}, 1),
        ValueError,
        "not finite: 'a'",
    ),
    # Numbers.
    "negative r": (lambda: gnp.sam(-0.1), ValueError, "rho must be finite and not negative"),
    "negative alpha": (
        lambda: gnp.gradient_regularization(0.1, -0.1),
        ValueError,
        "alpha must be finite and not negative",
    ),
    "r is nan": (lambda: gnp.sam(float("nan")), ValueError, "finite"),
    "r is an array": (lambda: gnp.sam(jnp.ones(2)), TypeError, "real scalar"),
    "r is a string": (lambda: gnp.sam("0.1"), TypeError, "'0.1'"),
    "r is a bool": (lambda: gnp.sam(True), TypeError, "real scalar"),
    "r is None": (lambda: gnp.sam(None), TypeError, "None"),
    "a schedule that is negative": (
        lambda: update(gnp.sam(lambda step: -0.1), value_fn=loss),
        ValueError,
        r"r\(step\)",
    ),
    "core: negative r": (lambda: core(-0.1, 0.5), ValueError, "r must be finite"),
    "negative eta": (lambda: gnp.asam(0.5, eta=-1.0), ValueError, "eta"),
    "negative warmup": (lambda: gnp.schedules.zero_warmup(0.5, -1), ValueError, "warmup_steps"),
    "negative delay": (
        lambda: gnp.schedules.delayed(gnp.schedules.r_warmup(0.5, 1), -1),
        ValueError,
        "warmup_steps",
    ),
    "a number that is delayed": (
        lambda: gnp.schedules.delayed(0.5, 10),
        TypeError,
        r"zero_warmup\(0.5, warmup_steps\)",
    ),
    "negative r in a warmup": (lambda: gnp.schedules.r_warmup(-0.5, 1), ValueError, "r must be"),
    "every 0 steps": (lambda: gnp.schedules.every(0, 0.5), ValueError, "at least 1"),
    # The rest.
    "unknown scope": (lambda: gr(scope="some"), ValueError, "'all'.*'masked'"),
    "core: direction with state": (
        lambda: core(direction=optax.trace(0.9)),
        ValueError,
        "gnp.gradient_regularization",
    ),
    "adaptive direction without params": (
        lambda: gnp.directions.adaptive().update(PARAMS, optax.EmptyState()),
        ValueError,
        "pass them",
    ),
    "an unknown name": (lambda: gnp.smaller, AttributeError, "smaller"),
}


def _frozen():
    from flax.core import FrozenDict

    return FrozenDict({"body": {"w": jnp.ones(2)}})


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, kind, pattern = CASES[case]
    with pytest.raises(kind, match=f"(?s){pattern}"):
        call()


def test_a_mask_that_fits_works_through_masked():
    """`optax.masked` with nothing masked out takes no parameters away."""
    tx = optax.masked(gnp.sam(0.1), {"body": True, "head": True})
    got, _ = update(tx, value_fn=loss)
    expected, _ = update(gnp.sam(0.1), value_fn=loss)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_an_error_of_the_loss_itself_is_not_rewritten():
    def broken(params):
        raise KeyError("no such layer")

    for params in (PARAMS, jnp.ones(3)):
        with pytest.raises(KeyError, match="no such layer"):
            update(gnp.sam(0.1), params, value_fn=broken)


def test_flatten_around_adds_a_note_to_the_error_of_the_loss():
    with pytest.raises(TypeError) as caught:
        update(optax.flatten(gnp.sam(0.1)), value_fn=named_loss)
    (note,) = [note for note in caught.value.__notes__ if "optax.flatten" in note]
    assert "optax.chain(gnp.gradient_regularization(r, alpha), optax.flatten(...))" in note


def test_what_called_us_is_not_kept_alive():
    """To find `MultiSteps` around, the callers are looked at, but not their variables."""

    def train():
        batch = jnp.zeros(1000)
        kept = weakref.ref(batch)
        update(gnp.sam(0.1), value_fn=loss)
        del batch
        gc.collect()
        return kept() is not None

    assert not train()
    with jax.checking_leaks():
        jax.jit(lambda p: update(gnp.sam(0.1), jax.tree.map(lambda w: w * 2, p), value_fn=loss))(
            PARAMS
        )
