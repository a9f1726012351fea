"""The regularized gradient against closed forms, second-order autodiff and Optax's SAM."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from models.problems import Quadratic, mlp, through_transformation

import gnp_optax as gnp

pytestmark = pytest.mark.usefixtures("x64")

MASKS = [None, {"body": False, "head": True}, {"body": True, "head": False}]


def both_forms(loss, params, r, alpha, **kwargs):
    """The gradient by the functional core and by the transformation."""
    _, core = gnp.value_and_grad(loss, r, alpha, **kwargs)(params)
    tx = gnp.gradient_regularization(r, alpha, **kwargs)
    composed, _ = through_transformation(tx, loss, params)
    return core, composed


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scope", ["all", "masked"])
@pytest.mark.parametrize(("r", "alpha"), [(0.1, 0.8), (0.5, 1.0), (2.0, 0.3), (0.1, 1.7), (0, 0.5)])
def test_quadratic_in_closed_form(r, alpha, mask, scope):
    problem = Quadratic()
    on = problem.selection(*(k for k in problem.sizes if mask is None or mask[k]))
    g = problem.gradient(problem.vector)
    direction = on * g / np.linalg.norm(on * g)
    tilde = problem.gradient(problem.vector + r * direction)
    mixed = (1 - alpha) * g + alpha * tilde
    expected = mixed if scope == "all" else np.where(on, mixed, g)
    for got in both_forms(problem.loss, problem.params, r, alpha, mask=mask, scope=scope):
        np.testing.assert_allclose(problem.flat(got), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scope", ["all", "masked"])
@pytest.mark.parametrize(("r", "alpha"), [(0.1, 3.0), (1e-9, 3e8), (0, 0.5)])
def test_exact_curvature_is_the_gradient_of_the_penalized_loss(mask, scope, r, alpha):
    params, loss, x, y = mlp(dtype=jnp.float64)

    def of_params(params):
        return loss(params, x, y)

    def norm_of_gradient(params):
        grads = jax.grad(of_params)(params)
        kept = [grads[name] for name in grads if mask is None or mask[name]]
        return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(kept)))

    plain = jax.grad(of_params)(params)
    exact = jax.grad(lambda p: of_params(p) + alpha * r * norm_of_gradient(p))(params)
    if scope == "masked" and mask is not None:
        exact = {name: (exact if mask[name] else plain)[name] for name in exact}
    for got in both_forms(of_params, params, r, alpha, mask=mask, scope=scope, curvature="exact"):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


def test_exact_curvature_reports_that_nothing_moved():
    problem = Quadratic()
    tx = gnp.gradient_regularization(0.1, 0.8, curvature="exact")
    _, state = through_transformation(tx, problem.loss, problem.params)
    g = problem.gradient(problem.vector)
    tilde = g + 0.1 * problem.hessian @ g / np.linalg.norm(g)
    assert state.perturbation_norm == 0
    np.testing.assert_allclose(state.perturbed_loss, problem.loss(problem.params), rtol=1e-6)
    cosine = g @ tilde / np.linalg.norm(g) / np.linalg.norm(tilde)
    np.testing.assert_allclose(state.cosine, cosine, rtol=1e-6)


@pytest.mark.parametrize("traced", [False, True])
def test_exact_curvature_in_bfloat16_keeps_what_a_difference_loses(traced):
    """At r = 1e-4 no bfloat16 weight of size 1 moves at all."""
    problem = Quadratic()
    params = jax.tree.map(lambda w: (1 + w / 8).astype(jnp.bfloat16), problem.params)

    def loss(params):
        return problem.loss(jax.tree.map(lambda w: w.astype(jnp.float32), params))

    def correction(curvature):
        def regularized(alpha):
            tx = gnp.gradient_regularization(1e-4, lambda _: alpha, curvature=curvature)
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(loss)(params))
            updates, _ = tx.update(grads, tx.init(params), params, value_fn=loss)
            return jax.tree.map(jnp.subtract, updates, grads)

        run = jax.jit(regularized) if traced else regularized
        return problem.flat(run(jnp.float32(5e3)))

    w = problem.flat(params).astype(np.float64)
    g = problem.gradient(w)
    exact = 0.5 * problem.hessian @ g / np.linalg.norm(g)
    assert np.linalg.norm(correction("exact") - exact) < 0.02 * np.linalg.norm(exact)
    assert np.linalg.norm(correction("finite_difference") - exact) > 0.5 * np.linalg.norm(exact)


@pytest.mark.parametrize("mask", MASKS)
def test_converges_to_the_exact_penalty_at_first_order_in_r(mask):
    params, loss, x, y = mlp(dtype=jnp.float64)
    lam = 0.3

    def of_params(params):
        return loss(params, x, y)

    def norm_of_gradient(params):
        grads = jax.grad(of_params)(params)
        kept = [grads[name] for name in grads if mask is None or mask[name]]
        return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(kept)))

    exact = jax.grad(lambda p: of_params(p) + lam * norm_of_gradient(p))(params)
    errors = []
    for r in (1e-2, 5e-3, 2.5e-3):
        _, got = gnp.value_and_grad(of_params, r, lam / r, mask=mask)(params)
        errors.append(float(optax.tree_utils.tree_norm(jax.tree.map(jnp.subtract, got, exact))))
    assert errors[0] < 0.05 * float(optax.tree_utils.tree_norm(exact))
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.05)


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1, momentum=0.9), optax.adamw(1e-2)], ids=["momentum", "adamw"]
)
def test_sam_equals_that_of_optax_over_20_steps(optimizer):
    start, loss, x, y = mlp(dtype=jnp.float64)
    rho = 0.1
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
    theirs = optax.contrib.sam(optimizer, adversary, opaque_mode=True)
    ours = optax.chain(gnp.sam(rho), optimizer)

    def run(tx, **extra_args):
        params, state = start, tx.init(start)
        for _ in range(20):
            grads = jax.grad(loss)(params, x, y)
            updates, state = tx.update(grads, state, params, **extra_args)
            params = optax.apply_updates(params, updates)
        return params

    expected = run(theirs, grad_fn=lambda params, _: jax.grad(loss)(params, x, y))
    got = run(ours, value_fn=lambda params: loss(params, x, y))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), got, expected)


@pytest.mark.parametrize("eta", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("mask", MASKS)
def test_asam_equals_its_formula(eta, mask):
    problem, rho = Quadratic(), 0.7
    on = problem.selection(*(k for k in problem.sizes if mask is None or mask[k]))
    g = on * problem.gradient(problem.vector)
    t = np.abs(problem.vector) + eta
    eps = rho * t**2 * g / np.linalg.norm(t * g)
    expected = problem.gradient(problem.vector + eps)
    tx = gnp.asam(rho, eta, mask=mask)
    got, state = through_transformation(tx, problem.loss, problem.params)
    np.testing.assert_allclose(problem.flat(got), expected, rtol=0, atol=1e-13)
    np.testing.assert_allclose(state.perturbation_norm, np.linalg.norm(eps), rtol=1e-6)


@pytest.mark.parametrize("scope", ["all", "masked"])
def test_layerwise_equals_its_formula(scope):
    sizes = (("a", 4), ("b", 3), ("c", 5))
    problem, r, alpha = Quadratic(sizes=sizes), 0.3, 0.6
    on = problem.selection("a", "c")
    g = problem.gradient(problem.vector)
    tilde = problem.gradient(problem.vector + r * on * g / np.linalg.norm(on * g))
    mixed = (1 - alpha) * g + alpha * tilde
    expected = mixed if scope == "all" else np.where(on, mixed, g)
    mask = {"a": True, "b": False, "c": True}
    tx = gnp.layerwise_gradient_regularization(r, alpha, mask, scope=scope)
    got, _ = through_transformation(tx, problem.loss, problem.params)
    np.testing.assert_allclose(problem.flat(got), expected, rtol=0, atol=1e-13)


def test_layerwise_defaults_to_the_rule_of_the_paper():
    problem, mask = Quadratic(), {"body": False, "head": True}
    default = gnp.layerwise_gradient_regularization(0.3, 0.6, mask)
    masked = gnp.gradient_regularization(0.3, 0.6, mask=mask, scope="masked")
    got, _ = through_transformation(default, problem.loss, problem.params)
    expected, _ = through_transformation(masked, problem.loss, problem.params)
    np.testing.assert_array_equal(problem.flat(got), problem.flat(expected))


@pytest.mark.parametrize(
    ("r", "alpha"),
    [
        (0.1, 0.8),
        (gnp.schedules.r_warmup(0.1, 5), 0.8),
        (0.1, gnp.schedules.lambda_warmup(0.8, 5)),
        (0.1, gnp.schedules.zero_warmup(0.8, 5)),
        (0.1, gnp.schedules.every(3, 0.8)),
    ],
    ids=["constant", "r-warmup", "lambda-warmup", "zero-warmup", "every"],
)
def test_realised_radius_and_weight_over_12_steps(r, alpha):
    """Both are read off what happened to the parameters and the gradient, not off the schedule."""
    problem = Quadratic()
    frac = np.minimum(1, np.arange(12) / 5)
    radius, weight = np.full(12, 0.1), np.full(12, 0.8)
    if callable(r):
        radius = 0.1 * frac
    if callable(alpha):
        weight = {
            0.0: 0.8 * frac if float(alpha(1)) else 0.8 * (np.arange(12) >= 5),
            0.8: 0.8 * (np.arange(12) % 3 == 0),
        }[round(float(alpha(0)), 6)]

    visited = []

    def loss(params):
        jax.debug.callback(
            lambda w: visited.append(np.asarray(w)), jnp.concatenate([*params.values()])
        )
        return problem.loss(params)

    tx = gnp.gradient_regularization(r, alpha)
    params, state = problem.params, tx.init(problem.params)
    grads = jax.grad(problem.loss)(params)
    step = jax.jit(lambda state: tx.update(grads, state, params, value_fn=loss))
    g = problem.gradient(problem.vector)
    for t in range(12):
        visited.clear()
        updates, state = step(state)
        jax.effects_barrier()
        assert int(state.step) == t + 1
        got = problem.flat(updates)
        if weight[t] == 0:
            assert visited == []
            np.testing.assert_array_equal(got, problem.flat(grads))
            told = [float(x) for x in state[3:]]
            assert told == [0, 0, 1, 0]  # no norm, no loss, cosine 1, not perturbed
            np.testing.assert_allclose(state.grad_norm, np.linalg.norm(g), rtol=1e-6)
            continue
        assert bool(state.perturbed)
        moved = visited[0] - problem.vector
        np.testing.assert_allclose(np.linalg.norm(moved), radius[t], rtol=1e-6, atol=1e-15)
        np.testing.assert_allclose(state.perturbation_norm, radius[t], rtol=1e-6)
        change = problem.gradient(visited[0]) - g
        if radius[t]:
            realised = (got - g) @ change / (change @ change)
            np.testing.assert_allclose(realised, weight[t], rtol=1e-6)


def test_transformation_and_core_give_the_same_parameters_after_20_steps():
    start, loss, x, y = mlp(dtype=jnp.float64)
    r, alpha = gnp.schedules.r_warmup(0.2, 8), gnp.schedules.zero_warmup(0.7, 3)
    optimizer = optax.adamw(1e-2)
    tx = optax.chain(gnp.gradient_regularization(r, alpha), optimizer)

    @jax.jit
    def composed(params, state):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params, value_fn=loss, x=x, y=y)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def functional(params, state, step):
        _, grads = gnp.value_and_grad(loss, r(step), alpha(step))(params, x, y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    one, one_state = start, tx.init(start)
    two, two_state = start, optimizer.init(start)
    for step in range(20):
        one, one_state = composed(one, one_state)
        two, two_state = functional(two, two_state, jnp.asarray(step, jnp.int32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), one, two)


def test_state_reports_what_happened():
    problem, r, alpha = Quadratic(), 0.4, 0.3
    g = problem.gradient(problem.vector)
    moved = problem.vector + r * g / np.linalg.norm(g)
    tilde = problem.gradient(moved)
    tx = gnp.gradient_regularization(r, alpha)
    _, state = through_transformation(tx, problem.loss, problem.params)
    np.testing.assert_allclose(state.grad_norm, np.linalg.norm(g), rtol=1e-6)
    np.testing.assert_allclose(state.perturbation_norm, r, rtol=1e-6)
    np.testing.assert_allclose(state.perturbed_loss, problem.loss(problem.tree(moved)), rtol=1e-6)
    cosine = g @ tilde / np.linalg.norm(g) / np.linalg.norm(tilde)
    np.testing.assert_allclose(state.cosine, cosine, rtol=1e-6)


def test_incoming_updates_are_honoured_as_the_gradient():
    """A gradient that was averaged over devices enters direction and mixture as it is."""
    problem, r, alpha = Quadratic(), 0.4, 0.3
    given = np.random.default_rng(1).normal(size=problem.vector.size)
    tilde = problem.gradient(problem.vector + r * given / np.linalg.norm(given))
    tx = gnp.gradient_regularization(r, alpha)
    state = tx.init(problem.params)
    got, _ = tx.update(problem.tree(given), state, problem.params, value_fn=problem.loss)
    expected = (1 - alpha) * given + alpha * tilde
    np.testing.assert_allclose(problem.flat(got), expected, rtol=0, atol=1e-13)


def test_a_direction_with_state_sees_every_gradient():
    """An average of gradients as ascent direction goes on during zero-warmup."""
    problem = Quadratic()
    direction = optax.chain(optax.ema(0.9, debias=False), gnp.directions.normalized())
    alpha = gnp.schedules.zero_warmup(1.0, 2)
    tx = gnp.gradient_regularization(0.1, alpha, direction=direction)
    given = np.random.default_rng(1).normal(size=(3, problem.vector.size))
    state = tx.init(problem.params)
    update = jax.jit(lambda g, s: tx.update(g, s, problem.params, value_fn=problem.loss))
    for g in given:
        got, state = update(problem.tree(g), state)
    average = 0.1 * (0.81 * given[0] + 0.9 * given[1] + given[2])
    expected = problem.gradient(problem.vector + 0.1 * average / np.linalg.norm(average))
    np.testing.assert_allclose(problem.flat(got), expected, rtol=0, atol=1e-12)


def test_core_returns_value_and_aux_of_the_unperturbed_pass():
    problem = Quadratic()

    def loss(params, scale, *, shift):
        return scale * problem.loss(params) + shift, params["head"]

    fun = gnp.value_and_grad(loss, 0.1, 0.5, has_aux=True)
    (value, aux), _ = fun(problem.params, 2.0, shift=1.0)
    np.testing.assert_allclose(value, 2 * problem.loss(problem.params) + 1, rtol=1e-14)
    np.testing.assert_array_equal(aux, problem.params["head"])


def test_transformation_drops_the_aux():
    problem = Quadratic()
    tx = gnp.sam(0.1)
    expected, _ = through_transformation(tx, problem.loss, problem.params)
    with_aux = gnp.sam(0.1, has_aux=True)
    got, _ = through_transformation(
        with_aux, lambda p: (problem.loss(p), "anything"), problem.params, has_aux=True
    )
    np.testing.assert_array_equal(problem.flat(got), problem.flat(expected))


# The surrogate gap.


def guided(g, tilde, gap):
    """GSAM's algorithm 1."""
    u = tilde / np.linalg.norm(tilde)
    return tilde - gap * (g - u @ g * u)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scope", ["all", "masked"])
@pytest.mark.parametrize("curvature", ["finite_difference", "exact"])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_surrogate_gap_in_closed_form(alpha, curvature, scope, mask):
    """Of a quadratic, on which exact curvature finds the same g~."""
    problem, r, gap = Quadratic(), 0.5, 0.4
    on = problem.selection(*(k for k in problem.sizes if mask is None or mask[k]))
    g = problem.gradient(problem.vector)
    tilde = problem.gradient(problem.vector + r * on * g / np.linalg.norm(on * g))
    receives = np.ones_like(on) if scope == "all" else on
    at = np.flatnonzero(receives)
    expected = g.copy()
    expected[at] = (1 - alpha) * g[at] + alpha * guided(g[at], tilde[at], gap)
    options = {"mask": mask, "scope": scope, "curvature": curvature, "surrogate_gap": gap}
    for got in both_forms(problem.loss, problem.params, r, alpha, **options):
        np.testing.assert_allclose(problem.flat(got), expected, rtol=0, atol=1e-12)


def test_gsam_is_sam_with_a_surrogate_gap():
    params, loss, x, y = mlp(dtype=jnp.float64)
    of_params = lambda p: loss(p, x, y)  # noqa: E731
    got, _ = through_transformation(gnp.gsam(0.1, 0.3), of_params, params)
    _, expected = gnp.value_and_grad(loss, 0.1, 1.0, surrogate_gap=0.3)(params, x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), got, expected)
    none, _ = through_transformation(gnp.gsam(0.1, 0.0), of_params, params)
    sam, _ = through_transformation(gnp.sam(0.1), of_params, params)
    jax.tree.map(np.testing.assert_array_equal, none, sam)


# Derivatives with respect to radius and weight.


@pytest.mark.parametrize("form", ["core", "transformation"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("jit", [False, True])
def test_derivatives_with_respect_to_radius_and_weight(form, alpha, jit):
    """`g~ - g` and `alpha H d`, also at a weight of 0, where a step alone has no second pass."""
    problem, r = Quadratic(), 0.5
    g = problem.gradient(problem.vector)
    direction = g / np.linalg.norm(g)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=g.size))

    def of(r, alpha):
        if form == "core":
            _, got = gnp.value_and_grad(problem.loss, r, alpha)(problem.params)
        else:
            tx = gnp.gradient_regularization(lambda _: r, lambda _: alpha)
            got, _ = through_transformation(tx, problem.loss, problem.params)
        return probe @ jnp.concatenate([*got.values()])

    found = jax.grad(jax.jit(of) if jit else of, argnums=(0, 1))(r, alpha)
    curvature = probe @ problem.hessian @ direction
    np.testing.assert_allclose(found, (alpha * curvature, r * curvature), atol=1e-12)
    at_zero = jax.jacfwd(of)(0.0, 0.3)
    np.testing.assert_allclose(at_zero, 0.3 * curvature, atol=1e-12)


def test_no_second_pass_is_run_where_no_derivative_in_the_weight_is_asked_for():
    visited = []

    def loss(w):
        jax.debug.callback(lambda: visited.append(1))
        return jnp.sum(w**4)

    def of(w, alpha):
        return gnp.value_and_grad(loss, 0.5, alpha)(w)[1].sum()

    for derivative, passes in ((of, 1), (jax.grad(of), 1), (jax.grad(of, argnums=1), 2)):
        visited.clear()
        jax.block_until_ready(jax.jit(derivative)(jnp.array([3.0, 4.0]), 0.0))
        jax.effects_barrier()
        assert len(visited) == passes
