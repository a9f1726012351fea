"""Cost, by what is exact: executions, compilations and compiled FLOPs. Never by a clock."""

import jax
import jax.numpy as jnp
import optax
import pytest
from models.problems import mlp, residual

import gnp_optax as gnp

STEPS = 12


class Counter:
    """Counts how often a loss is executed, and how often it is traced."""

    def __init__(self, loss):
        self.loss = loss
        self.executions = 0
        self.traces = 0

    def __call__(self, params, *args):
        self.traces += 1
        jax.debug.callback(self._execute)
        return self.loss(params, *args)

    def _execute(self):
        self.executions += 1


def run_transformation(alpha):
    """Executions of the second pass in 12 steps, and compilations of the step."""
    params, loss, x, y = mlp()
    counted = Counter(loss)
    tx = optax.chain(gnp.gradient_regularization(0.1, alpha), optax.adamw(1e-3))

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params, value_fn=lambda p: counted(p, x, y))
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    jax.effects_barrier()
    return counted.executions, step._cache_size()


def run_core(alpha):
    """The same through the functional core, both passes counted: those of the first taken off."""
    params, loss, x, y = mlp()
    counted = Counter(loss)
    tx = optax.adamw(1e-3)

    @jax.jit
    def step(params, state, t):
        a = alpha(t) if callable(alpha) else alpha
        _, grads = gnp.value_and_grad(counted, 0.1, a)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for t in range(STEPS):
        params, state = step(params, state, jnp.asarray(t, jnp.int32))
    jax.effects_barrier()
    return counted.executions - STEPS, step._cache_size()


@pytest.mark.parametrize("run", [run_transformation, run_core])
@pytest.mark.parametrize(
    ("alpha", "passes"),
    [
        (0.8, STEPS),
        (0, 0),
        (gnp.schedules.zero_warmup(0.8, 5), STEPS - 5),
        (gnp.schedules.lambda_warmup(0.8, 5), STEPS - 1),
        (gnp.schedules.every(3, 0.8), STEPS // 3),
        (gnp.schedules.every(2, gnp.schedules.zero_warmup(0.8, 6)), 3),
    ],
    ids=["constant", "zero", "zero-warmup", "lambda-warmup", "every", "both"],
)
def test_second_passes_executed_with_one_compilation(run, alpha, passes):
    assert run(alpha) == (passes, 1)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0, gnp.schedules.zero_warmup(0.5, 5)])
def test_the_loss_is_traced_once_for_both_passes(alpha):
    params, loss, x, y = mlp()
    counted = Counter(loss)

    def gradient(params, t):
        return gnp.value_and_grad(counted, 0.1, alpha(t) if callable(alpha) else alpha)(
            params, x, y
        )

    jax.jit(gradient).lower(params, jnp.zeros([], jnp.int32))
    assert counted.traces == 1


def flops(fun, *args):
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


def large():
    """Enough examples that arithmetic on the parameters does not count."""
    params, loss, x, y = mlp()
    return params, loss, jnp.tile(x, (64, 1)), jnp.tile(y, (64, 1))


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_two_gradients_a_step_and_nothing_else(alpha):
    params, loss, x, y = large()
    plain = flops(jax.value_and_grad(loss), params, x, y)
    regularized = flops(gnp.value_and_grad(loss, 0.1, alpha), params, x, y)
    assert regularized <= 2.01 * plain


def test_a_plain_step_when_alpha_is_zero():
    params, loss, x, y = large()
    plain = flops(jax.value_and_grad(loss), params, x, y)
    assert flops(gnp.value_and_grad(loss, 0.1, 0.0), params, x, y) == plain


def test_scope_masked_leaves_out_what_it_does_not_use():
    """Only the head's part of the second backward pass is computed."""
    params, loss, x, y = large()
    mask = {"body": False, "head": True}
    everything = flops(gnp.value_and_grad(loss, 0.1, 0.5, mask=mask), params, x, y)
    head = flops(gnp.value_and_grad(loss, 0.1, 0.5, mask=mask, scope="masked"), params, x, y)
    assert head < 0.9 * everything


def test_a_static_mask_compiles_once_per_distinct_selection():
    params, loss, x, y = mlp()

    def gradient(params, mask):
        return gnp.value_and_grad(loss, 0.1, 0.5, mask=mask)(params, x, y)

    step = jax.jit(gradient, static_argnames="mask")
    grads = jax.grad(loss)(params, x, y)
    for mask in [
        gnp.masks.top_k_layers(grads, 1),
        gnp.masks.top_k_layers(jax.tree.map(lambda g: 2 * g, grads), 1),
        gnp.masks.top_k_layers(grads, 2),
        gnp.masks.top_k_layers(grads, 1),
    ]:
        step(params, mask=mask)
    assert step._cache_size() == 2


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1000,)])
def test_small_leaves_share_the_reductions_of_the_norm(shape):
    """Each is compiled, and most leaves of a network are small."""
    leaves = [jnp.ones(shape) for _ in range(40)]
    update = gnp.directions.normalized().update
    ascend = jax.jit(lambda grads: update(grads, optax.EmptyState())[0])
    reductions = [
        ascend.lower(given).as_text().count("stablehlo.reduce(")
        for given in (leaves[:2], leaves, [*leaves, jnp.ones(5)])
    ]
    assert reductions[0] == reductions[1] < reductions[2]


def temporary_bytes(fun, *args):
    compiled = jax.jit(fun).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("shape", [(2**18,), (512, 512)])
def test_large_leaves_are_not_copied_for_the_norm(shape):
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 8
    update = gnp.directions.normalized().update
    temporary = temporary_bytes(lambda grads: update(grads, optax.EmptyState())[0], leaves)
    assert temporary <= 4 * 2**18


@pytest.mark.parametrize("transform", [jax.vmap, lambda f: jax.grad(lambda w: f(w)[0])])
def test_nothing_is_compiled_by_a_second_call_without_jit(transform, caplog):
    """Also where a transformation hands the loss something that it cannot see the values of."""
    compute = transform(gnp.value_and_grad(lambda w: jnp.sum(jnp.sin(w) ** 2), 0.1, 0.5))
    w = jnp.ones((4, 3))
    with jax.log_compiles():
        compute(w)
        assert "Compiling" in caplog.text
        caplog.clear()
        compute(w)
    assert "Compiling" not in caplog.text


def wide():
    """Nearly all memory is that of the parameters: (params, loss of (params, x), x)."""
    params = {f"layer_{i}": jnp.ones((512, 512)) / 512 for i in range(8)}

    def loss(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    return params, loss, jnp.ones((32, 512))


def allowed_bytes(selected):
    """What the plain gradient takes, a perturbed copy of some layers, and 5 percent."""
    params, loss, x = wide()
    plain = temporary_bytes(jax.value_and_grad(loss), params, x)
    return 1.05 * (plain + selected * params["layer_0"].nbytes)


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_memory_of_one_copy_of_the_parameters(alpha):
    """The perturbed ones: the gradient is kept where the result will be."""
    params, loss, x = wide()
    assert temporary_bytes(gnp.value_and_grad(loss, 0.1, alpha), params, x) <= allowed_bytes(8)


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="an older XLA keeps both gradients")
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_memory_of_the_transformation_with_its_report(alpha):
    """One leaf more."""
    params, loss, x = wide()

    def composed(params, x):
        tx = gnp.gradient_regularization(0.1, alpha)
        grads = jax.grad(loss)(params, x)
        return tx.update(grads, tx.init(params), params, value_fn=lambda p: loss(p, x))

    assert temporary_bytes(composed, params, x) <= allowed_bytes(9)


@pytest.mark.parametrize("scope", ["all", "masked"])
def test_memory_of_the_perturbed_layers_alone(scope):
    params, loss, x = wide()
    mask = gnp.masks.by_path("layer_[67]")
    gradient = gnp.value_and_grad(loss, 0.1, 0.5, mask=mask, scope=scope)
    assert temporary_bytes(gradient, params, x) <= allowed_bytes(2)


def test_a_surrogate_gap_behind_a_cut_costs_a_backward_pass_of_the_prefix():
    """And `gnp.masks.cost` knows it: `1 + q`, and half to two thirds of the rest."""
    depth = 6
    params, loss, x = residual(depth)

    def flops(fun):
        return jax.jit(fun).lower(params, x).compile().cost_analysis()["flops"]

    mask, q = gnp.masks.by_path("^layer_5$"), 1 / depth
    for scope, possible in (("all", 1 + q + 2 / 3 * (1 - q)), ("masked", 1 + q)):
        options = {"mask": mask, "scope": scope, "surrogate_gap": 0.3}
        ratio = flops(gnp.value_and_grad(loss, 0.1, 1.0, **options)) / flops(
            jax.value_and_grad(loss)
        )
        assert ratio <= possible + 0.02
        told = gnp.masks.cost(
            loss, params, mask, x, **{k: v for k, v in options.items() if k != "mask"}
        )
        assert abs(told - ratio) <= 0.03
