"""Diagnostics against dense Hessians, closed forms and one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from models import linen as models_linen
from models.eight_devices import run_on_eight_devices
from models.problems import Quadratic, two_layers

import gnp_optax as gnp
from gnp_optax import diagnostics
from gnp_optax.diagnostics import _layout
from gnp_optax.diagnostics._embedding import Embedding, signs

KEY = jax.random.key(0)
PARAMS, LOSS, X, Y = two_layers()  # 30 parameters, 8 examples


def dense(params, loss, *args, select=lambda path: True):
    """The Hessian of the leaves whose path is selected, in the order of the leaves."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda v: loss(unravel(v), *args)))(flat)
    flags = [
        np.full(leaf.size, select(jax.tree_util.keystr(path)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    ]
    chosen = np.flatnonzero(np.concatenate(flags))
    return np.asarray(hessian)[np.ix_(chosen, chosen)]


HESSIAN = dense(PARAMS, LOSS, X, Y)


def quadratic_loss(w, hessian, b):
    return w @ hessian @ w / 2 + b @ w


def close(got, expected, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


# Eigenvalues


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_largest_eigenvalues(seed):
    found = diagnostics.hessian_eigenvalues(
        LOSS, PARAMS, X, Y, k=3, num_matvecs=30, key=jax.random.key(seed)
    )
    values, vectors = np.linalg.eigh(HESSIAN)
    close(found.eigenvalues, values[:-4:-1])
    assert jax.tree.map(jnp.shape, found.eigenvectors) == {"body": (3, 4, 5), "head": (3, 5, 2)}
    for i in range(3):
        one = jax.flatten_util.ravel_pytree(jax.tree.map(lambda v, i=i: v[i], found.eigenvectors))
        assert abs(one[0] @ vectors[:, -1 - i]) == pytest.approx(1, abs=1e-3)
    assert (np.asarray(found.residuals) < 1e-4 * values[-1]).all()


@pytest.mark.parametrize("scale", [1.0, 1e-15])
def test_of_low_rank_the_products_are_rounding_errors_in_the_end(scale):
    """A fifth of the dimensions has no curvature, to be found among errors of any size."""
    values, rng = np.r_[np.arange(1.0, 25), np.zeros(6)] * scale, np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    hessian = jnp.asarray(basis * values @ basis.T, jnp.float32)
    measure = jax.jit(
        lambda key: diagnostics.hessian_eigenvalues(
            quadratic_loss, jnp.zeros(30), hessian, jnp.zeros(30), k=3, num_matvecs=30, key=key
        )
    )
    found = [measure(jax.random.key(seed)) for seed in range(50)]
    close(np.stack([x.eigenvalues for x in found]) / scale, [[24.0, 23.0, 22.0]] * 50)
    assert np.max([x.residuals for x in found]) < 1e-4 * scale


def test_residual_is_the_distance_from_an_eigenpair():
    found = diagnostics.hessian_eigenvalues(LOSS, PARAMS, X, Y, num_matvecs=3)
    vector, _ = jax.flatten_util.ravel_pytree(jax.tree.map(lambda v: v[0], found.eigenvectors))
    expected = np.linalg.norm(HESSIAN @ vector - found.eigenvalues[0] * vector)
    assert expected > 1e-3
    close(found.residuals[0], expected, rtol=1e-3)


def test_block_of_a_mask():
    found = diagnostics.hessian_eigenvalues(
        LOSS, PARAMS, X, Y, k=2, num_matvecs=10, mask=gnp.masks.by_path("head")
    )
    block = dense(PARAMS, LOSS, X, Y, select=lambda path: "head" in path)
    close(found.eigenvalues, np.linalg.eigvalsh(block)[:-3:-1])
    assert not np.any(found.eigenvectors["body"])
    sampled = diagnostics.hessian_trace(
        LOSS, PARAMS, X, Y, key=KEY, num_samples=200, mask={"body": False, "head": True}
    )
    assert abs(sampled.trace - np.trace(block)) < 4 * sampled.standard_error


def test_some_of_the_stacked_layers():
    scales = np.arange(1.0, 7.0).reshape(3, 2)

    def loss(params):
        return jnp.sum(jnp.asarray(scales, jnp.float32) * params["stack"] ** 2) / 2

    found = diagnostics.hessian_eigenvalues(
        loss, {"stack": jnp.ones((3, 2))}, k=2, mask={"stack": np.array([True, True, False])}
    )
    close(found.eigenvalues, [4.0, 3.0])
    assert not np.any(found.eigenvectors["stack"][:, 2])
    along_the_second = diagnostics.hessian_eigenvalues(
        lambda params: loss({"stack": params["stack"].T}),
        {"stack": jnp.ones((2, 3))},
        k=2,
        mask={"stack": np.array([[True, True, False]])},
    )
    close(along_the_second.eigenvalues, [4.0, 3.0])
    assert not np.any(along_the_second.eigenvectors["stack"][:, :, 2])


def test_some_layers_are_not_sharded_along_the_axis_that_stacks_them():
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    layers = _layout.Layers(axis=1, flags=(False, True))
    specs = (P("model", "model", None), P("model"))
    layout = _layout.Layout((layers, True), mesh, specs)
    parts = _layout.divided(layout, [jnp.ones((3, 2, 4)), jnp.ones(2)])
    found = [sharding.spec for sharding in _layout.shardings_of(layout, parts)]
    assert found == [P("model", None, None), P("model")]
    assert [x.shape for x in parts.divide([jnp.ones((3, 2, 4)), jnp.ones(2)])[0]] == [
        (3, 1, 4),
        (2,),
    ]


def test_complex_parameters_are_two_real_ones():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    hessian = root + root.T

    def loss(params):
        z = params["z"]
        return quadratic_loss(
            jnp.concatenate([z.real, z.imag, params["w"]]), jnp.asarray(hessian), jnp.zeros(6)
        )

    params = {"z": jnp.ones(2, jnp.complex64), "w": jnp.ones(2)}
    found = diagnostics.hessian_eigenvalues(loss, params, k=6)
    close(found.eigenvalues, np.linalg.eigvalsh(hessian)[::-1])
    z, w = found.eigenvectors["z"][0], found.eigenvectors["w"][0]
    vector = np.concatenate([z.real, z.imag, w])
    close(hessian @ vector, found.eigenvalues[0] * vector, atol=1e-4)


def diagonal_loss(w, diagonal):
    return jnp.sum(diagonal * w**2) / 2


@pytest.mark.parametrize("diagonal", [[2, 2, 2, 2, 2], [3, 0, 0, 0, 0], [2, 2, 1, 1, 1]])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_where_the_krylov_space_ends_early(diagonal, seed):
    """A found eigenvalue is one, and its vector is normal; what can't be found is NaN."""
    found = diagnostics.hessian_eigenvalues(
        diagonal_loss, jnp.ones(5), jnp.array(diagonal, float), k=3, key=jax.random.key(seed)
    )
    values = np.asarray(found.eigenvalues)
    assert values[0] == pytest.approx(max(diagonal), rel=1e-5)
    real = ~np.isnan(values)
    close(values[real], np.sort(diagonal)[::-1][:3][real])
    close(np.linalg.norm(found.eigenvectors, axis=1)[real], np.ones(real.sum()))
    vectors = np.asarray(found.eigenvectors)
    apart = np.linalg.norm(vectors * diagonal - values[:, None] * vectors, axis=1)
    close(np.asarray(found.residuals)[real], apart[real])


@pytest.mark.parametrize(
    "measure",
    [diagnostics.hessian_eigenvalues, functools.partial(diagnostics.hessian_spectrum, key=KEY)],
    ids=["eigenvalues", "spectrum"],
)
def test_one_vector_is_kept_for_each_product(measure):
    size, num_matvecs = 100_000, 60
    compiled = (
        jax.jit(lambda w: measure(lambda w: jnp.sum(w**4), w, num_matvecs=num_matvecs))
        .lower(jax.ShapeDtypeStruct((size,), jnp.float32))
        .compile()
    )
    vectors = compiled.memory_analysis().temp_size_in_bytes / (4 * size)
    assert num_matvecs < vectors < num_matvecs + 10


@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_hessian_of_any_size(scale):
    values = np.array([3.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    for num_matvecs in (2, 6):
        found = diagnostics.hessian_eigenvalues(
            diagonal_loss, jnp.ones(6), jnp.array(values * scale), k=2, num_matvecs=num_matvecs
        )
        vectors = np.asarray(found.eigenvectors)
        got = np.asarray(found.eigenvalues, float) / scale
        apart = np.linalg.norm(vectors * values - got[:, None] * vectors, axis=1)
        close(np.asarray(found.residuals, float) / scale, apart, atol=1e-5)
    close(got, [3.0, 2.0])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_vectors_of_different_keys_are_independent(impl):
    embedding = Embedding([jnp.ones((100, 30))], [None])
    drawn = [embedding.random(jax.random.key(seed, impl=impl), signs) for seed in range(6)]
    products = np.stack(drawn) @ np.stack(drawn).T / 3000
    assert np.abs(products - np.eye(6)).max() < 0.1


def test_linear_loss_has_no_curvature():
    found = diagnostics.hessian_eigenvalues(jnp.sum, jnp.ones(4))
    assert found.eigenvalues.tolist() == [0.0]
    spectrum = diagnostics.hessian_spectrum(jnp.sum, jnp.ones(4), key=KEY)
    assert not spectrum.eigenvalues.any()
    close(spectrum.weights.sum(axis=1), np.ones(4))


def test_half_precision_parameters_keep_vectors_in_float32():
    params, x, y = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (PARAMS, X, Y))
    found = diagnostics.hessian_eigenvalues(LOSS, params, x, y, num_matvecs=10)
    top = np.linalg.eigvalsh(HESSIAN)[-1]
    assert found.eigenvectors["body"].dtype == jnp.float32
    assert float(found.eigenvalues[0]) == pytest.approx(top, rel=0.1)


@pytest.mark.usefixtures("x64")
def test_double_precision():
    q = Quadratic()
    found = diagnostics.hessian_eigenvalues(q.loss, q.params, k=2)
    close(found.eigenvalues, np.linalg.eigvalsh(q.hessian)[:-3:-1], rtol=1e-10, atol=0)


def test_precision_of_the_loss_is_its_own():
    seen = []

    def loss(w):
        seen.append(jax.config.jax_default_matmul_precision)
        return jnp.sum(w**2)

    with jax.default_matmul_precision("tensorfloat32"):
        diagnostics.hessian_eigenvalues(loss, jnp.ones(3))
    assert set(seen) == {"tensorfloat32"}


# Trace and spectrum


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_trace(seed):
    found = diagnostics.hessian_trace(LOSS, PARAMS, X, Y, key=jax.random.key(seed), num_samples=200)
    assert abs(found.trace - np.trace(HESSIAN)) < 4 * found.standard_error
    # The variance of v' H v over vectors of signs.
    variance = 2 * (np.sum(HESSIAN**2) - np.sum(np.diag(HESSIAN) ** 2))
    assert float(found.standard_error) == pytest.approx(np.sqrt(variance / 200), rel=0.3)


def test_trace_of_a_diagonal_hessian_is_exact():
    found = diagnostics.hessian_trace(
        lambda w: jnp.sum(jnp.arange(5.0) * w**2) / 2, jnp.ones(5), key=KEY, num_samples=1
    )
    assert found.trace == 10
    assert np.isnan(found.standard_error)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_moments_of_the_spectrum(seed):
    """A quadrature of m nodes is exact for polynomials of degree 2 m - 1, for its own vector."""
    found = diagnostics.hessian_spectrum(
        LOSS, PARAMS, X, Y, key=jax.random.key(seed), num_matvecs=6, num_samples=200
    )
    assert found.eigenvalues.shape == found.weights.shape == (200, 6)
    close(found.weights.sum(axis=1), np.ones(200))
    for power in (1, 2):
        each = np.sum(found.weights * found.eigenvalues**power, axis=1)
        expected = np.trace(np.linalg.matrix_power(HESSIAN, power)) / 30
        assert abs(each.mean() - expected) < 4 * each.std() / np.sqrt(200)


def test_spectrum_in_all_dimensions_is_exact():
    q = Quadratic(sizes=(("w", 6),))
    found = diagnostics.hessian_spectrum(q.loss, q.params, key=KEY, num_samples=2)
    for row in found.eigenvalues:
        close(row, np.linalg.eigvalsh(q.hessian), rtol=1e-3, atol=1e-3)


def test_density_integrates_to_one_and_has_the_mean_of_the_spectrum():
    rng = np.random.default_rng(0)
    spectrum = diagnostics.Spectrum(
        jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.dirichlet(np.ones(5), size=3))
    )
    grid = jnp.linspace(-6.0, 6.0, 1201)
    density = diagnostics.spectral_density(spectrum, grid, width=0.2)
    assert float(jnp.trapezoid(density, grid)) == pytest.approx(1, abs=1e-4)
    mean = np.sum(np.asarray(spectrum.weights) * spectrum.eigenvalues) / 3
    assert float(jnp.trapezoid(density * grid, grid)) == pytest.approx(float(mean), abs=1e-3)


# Sharpness


@pytest.mark.parametrize("batch_size", [None, 3])
def test_sharpness_of_one_step(batch_size):
    found = diagnostics.sharpness(LOSS, PARAMS, X, Y, rho=0.3, batch_size=batch_size)
    loss, grads = jax.value_and_grad(LOSS)(PARAMS, X, Y)
    g, unravel = jax.flatten_util.ravel_pytree(grads)
    moved = jax.tree.map(jnp.add, PARAMS, unravel(0.3 * g / jnp.linalg.norm(g)))
    perturbed, tilde = jax.value_and_grad(LOSS)(moved, X, Y)
    t, _ = jax.flatten_util.ravel_pytree(tilde)
    cosine = g @ t / jnp.linalg.norm(g) / jnp.linalg.norm(t)
    expected = (loss, perturbed, perturbed - loss, jnp.linalg.norm(g), 0.3, cosine)
    close(tuple(found), expected)


def test_adaptive_sharpness_under_a_mask():
    found = diagnostics.sharpness(
        LOSS,
        PARAMS,
        X,
        Y,
        rho=0.1,
        direction=gnp.directions.adaptive(0.01),
        mask={"body": False, "head": True},
    )
    loss, grads = jax.value_and_grad(LOSS)(PARAMS, X, Y)
    t, g = np.abs(PARAMS["head"]) + 0.01, np.asarray(grads["head"])
    moved = {**PARAMS, "head": PARAMS["head"] + 0.1 * t**2 * g / np.linalg.norm(t * g)}
    close(found.surrogate_gap, LOSS(moved, X, Y) - loss)
    close(found.grad_norm, np.linalg.norm(g))


def test_adaptive_sharpness_does_not_change_with_the_scales_of_layers():
    direction = gnp.directions.adaptive(0.0)
    rescaled = {"body": 4 * PARAMS["body"], "head": PARAMS["head"] / 4}
    gaps = [
        diagnostics.sharpness(LOSS, p, X, Y, rho=0.1, direction=direction).surrogate_gap
        for p in (PARAMS, rescaled)
    ]
    close(gaps[0], gaps[1])


def largest_in_ball(hessian, b, rho):
    """The maximum of `b'd + d'Hd/2` over the ball, by the secular equation."""
    values, vectors = np.linalg.eigh(hessian)
    c = vectors.T @ b
    low, high = values[-1], values[-1] + np.linalg.norm(b) / rho
    for _ in range(100):
        middle = (low + high) / 2
        outside = np.linalg.norm(c / (middle - values)) > rho
        low, high = (middle, high) if outside else (low, middle)
    d = vectors @ (c / (high - values))
    return b @ d + d @ hessian @ d / 2


@pytest.mark.parametrize("eta", [None, 0.1])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_worst_case_of_a_quadratic(seed, eta):
    q = Quadratic(seed)
    given = [jnp.asarray(x, jnp.float32) for x in (q.vector, q.hessian, q.b)]
    found = diagnostics.worst_case_sharpness(quadratic_loss, *given, rho=0.5, steps=60, eta=eta)
    t = np.ones(8) if eta is None else np.abs(q.vector) + eta
    hessian, b = t[:, None] * q.hessian * t, t * q.gradient(q.vector)
    close(found.surrogate_gap, largest_in_ball(hessian, b, 0.5), rtol=1e-3)
    delta = np.asarray(found.perturbation)
    assert np.linalg.norm(delta / t) == pytest.approx(0.5, rel=1e-4)
    close(found.perturbed_loss, q.loss(q.tree(q.vector + delta)), atol=1e-4)


@pytest.mark.parametrize("eta", [None, 0.01])
def test_worst_case_is_no_less_than_one_step(eta):
    direction = gnp.directions.normalized() if eta is None else gnp.directions.adaptive(eta)
    for rho in (0.01, 0.3, 10.0):
        one = diagnostics.sharpness(LOSS, PARAMS, X, Y, rho=rho, direction=direction)
        first = diagnostics.worst_case_sharpness(LOSS, PARAMS, X, Y, rho=rho, steps=1, eta=eta)
        worst = diagnostics.worst_case_sharpness(LOSS, PARAMS, X, Y, rho=rho, steps=5, eta=eta)
        close(first.surrogate_gap, one.surrogate_gap)
        assert worst.surrogate_gap >= first.surrogate_gap


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_worst_case_at_a_minimum(seed):
    """The gradient is zero, but the largest eigenvalue tells how the loss grows."""
    hessian = Quadratic(seed).hessian
    at = jnp.zeros(8), jnp.asarray(hessian, jnp.float32), jnp.zeros(8)
    found = diagnostics.worst_case_sharpness(
        quadratic_loss, *at, rho=1.0, steps=120, key=jax.random.key(seed)
    )
    close(found.surrogate_gap, np.linalg.eigvalsh(hessian)[-1] / 2, rtol=1e-2)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_radius_profile(batch_size):
    """Each radius against `sharpness`, and the correction against the dense Hessian."""
    radii = jnp.array([0.01, 0.1, 1.0])
    found = diagnostics.radius_profile(LOSS, PARAMS, X, Y, radii=radii, batch_size=batch_size)
    gradient, unravel = jax.flatten_util.ravel_pytree(jax.grad(LOSS)(PARAMS, X, Y))
    flat, _ = jax.flatten_util.ravel_pytree(PARAMS)
    norm = np.linalg.norm(gradient)
    for i, r in enumerate(radii):
        one = diagnostics.sharpness(LOSS, PARAMS, X, Y, rho=r)
        close(found.surrogate_gap[i], one.surrogate_gap, rtol=1e-3)
        close(found.cosine[i], one.cosine)
        moved = unravel(flat + r * gradient / norm)
        tilde, _ = jax.flatten_util.ravel_pytree(jax.grad(LOSS)(moved, X, Y))
        correction, curved = np.asarray(tilde - gradient), r * HESSIAN @ gradient / norm
        close(found.correction[i], np.linalg.norm(correction) / norm, rtol=1e-3)
        common = correction @ curved / max(correction @ correction, curved @ curved)
        close(found.curvature[i], common, rtol=1e-3)
    close(found.loss, LOSS(PARAMS, X, Y))
    close(found.grad_norm, norm)
    assert found.moved.tolist() == [1, 1, 1]


def test_radius_profile_of_a_quadratic_is_curvature_alone():
    q = Quadratic(1)
    given = [jnp.asarray(x, jnp.float32) for x in (q.vector, q.hessian, q.b)]
    radii = np.array([0.1, 1.0, 10.0])
    found = diagnostics.radius_profile(quadratic_loss, *given, radii=radii)
    g = q.gradient(q.vector)
    norm, d = np.linalg.norm(g), g / np.linalg.norm(g)
    close(found.curvature, np.ones(3))
    close(found.surrogate_gap, radii * norm + radii**2 * (d @ q.hessian @ d) / 2, rtol=1e-3)
    close(found.correction, radii * np.linalg.norm(q.hessian @ d) / norm, rtol=1e-3)


def test_radius_profile_of_a_quartic_under_a_mask_and_a_direction():
    """`g = w^3`, `H = 3 w^2`, on one of two leaves, along a gradient that is not normalized."""
    params = {"body": jnp.array([3.0]), "head": jnp.array([1.0, 2.0])}
    w, radii = np.array([1.0, 2.0]), np.array([0.01, 0.5])
    found = diagnostics.radius_profile(
        lambda p: sum(jnp.sum(x**4) for x in p.values()) / 4,
        params,
        radii=radii,
        direction=gnp.directions.unnormalized(),
        mask=gnp.masks.by_path("head"),
    )
    for i, r in enumerate(radii):
        correction, curved = (w + r * w**3) ** 3 - w**3, r * 3 * w**2 * w**3
        common = correction @ curved / max(correction @ correction, curved @ curved)
        close(found.curvature[i], common)
        close(found.correction[i], np.linalg.norm(correction) / np.linalg.norm(w**3))
    assert found.curvature[1] < 0.5 < 0.9 < found.curvature[0]


def test_radius_profile_tells_what_is_lost_in_rounding():
    """Of 1 in bfloat16 the next number is 1 + 2^-7; what does not move has no curvature."""
    w = jnp.array([1.0, 1.0, 0.01, 1.0], jnp.bfloat16)

    def loss(w):
        return jnp.sum((w.astype(jnp.float32)[:3] + 1) ** 2) / 2  # the last has no gradient

    found = diagnostics.radius_profile(loss, w, radii=[0.001, 0.1])
    close(found.moved, [1 / 3, 1])
    assert found.curvature[0] < 0.3
    close(found.curvature[1], 1, rtol=0.1)


def test_complex_parameters_have_a_radius_profile():
    """`|z|^4 / 4`, as it is of two real numbers."""
    flat = jnp.array([3.0, 4.0])
    radii = jnp.array([0.1, 1.0])
    real = diagnostics.radius_profile(lambda w: jnp.sum(w**2) ** 2 / 4, flat, radii=radii)
    z = jax.lax.complex(*flat)
    found = diagnostics.radius_profile(lambda z: jnp.abs(z) ** 4 / 4, z, radii=radii)
    close(found, real)


def test_sharpness_of_groups():
    found = diagnostics.m_sharpness(LOSS, PARAMS, X, Y, rho=0.2, m=2)
    each = [
        diagnostics.sharpness(LOSS, PARAMS, X[i : i + 2], Y[i : i + 2], rho=0.2).surrogate_gap
        for i in range(0, 8, 2)
    ]
    close(found.by_group, jnp.stack(each))
    close(found.mean, np.mean(each))


# Layers


def test_layers_and_their_norms():
    loss = lambda p, x, y: LOSS(p["net"], x, y) + jnp.sum(p["net"]["bias"] ** 2)  # noqa: E731
    params = {"net": {**PARAMS, "bias": jnp.ones(3)}, "head": {"unused": jnp.ones(2)}}
    grads = jax.jit(jax.grad(loss))(params, X, Y)
    total = np.sqrt(sum(np.sum(np.square(g)) for g in grads["net"].values()))
    found = diagnostics.layer_gradient_norms(loss, params, X, Y)
    assert found.paths == ("head", "net")
    close(found.norms, jnp.array([0.0, total]))
    of_grads = diagnostics.norms_by_layer(grads)
    assert of_grads.paths == found.paths
    close(of_grads.norms, found.norms)
    bias = diagnostics.layer_gradient_norms(loss, params, X, Y, mask=gnp.masks.by_path("bias"))
    assert bias.paths == ("net",)
    close(bias.norms[0], np.linalg.norm(grads["net"]["bias"]))


# Landscapes


def test_filters_of_a_random_direction():
    params = {
        "conv": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 4))),
        "scale": jnp.ones(4),
        "steps": jnp.arange(3),
    }
    direction = diagnostics.random_direction(KEY, params)
    for j in range(4):
        lengths = [np.linalg.norm(tree["conv"][..., j]) for tree in (direction, params)]
        assert lengths[0] == pytest.approx(lengths[1], rel=1e-5)
    assert not direction["scale"].any()
    assert direction["steps"].dtype == params["steps"].dtype
    other = diagnostics.random_direction(jax.random.key(1), params)
    assert abs(np.vdot(other["conv"], direction["conv"])) < 0.5 * np.sum(params["conv"] ** 2)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_line_surface_and_path(batch_size):
    keys = jax.random.split(KEY)
    a, b = (diagnostics.random_direction(key, PARAMS) for key in keys)
    x, y = jnp.array([-1.0, 0.0, 0.5]), jnp.array([0.0, 0.3])

    def at(s, t):
        return LOSS(jax.tree.map(lambda w, u, v: w + s * u + t * v, PARAMS, a, b), X, Y)

    surface = diagnostics.loss_surface(
        LOSS, PARAMS, X, Y, directions=(a, b), x=x, y=y, batch_size=batch_size
    )
    close(surface.losses, np.array([[at(s, t) for s in x] for t in y]))
    line = diagnostics.loss_along(
        LOSS, PARAMS, X, Y, direction=b, distances=y, batch_size=batch_size
    )
    close(line.losses, np.array([at(0, t) for t in y]))
    end = jax.tree.map(lambda w, u: w + u, PARAMS, a)
    path = diagnostics.loss_between(LOSS, PARAMS, end, X, Y, positions=x, batch_size=batch_size)
    close(path.losses, np.array([at(s, 0) for s in x]))


def test_positions_between_two_solutions_by_default():
    path = diagnostics.loss_between(jnp.sum, jnp.zeros(2), jnp.ones(2))
    close(path.positions, np.linspace(0, 1, 21))
    close(path.losses, 2 * np.linspace(0, 1, 21))


# What all of them share

MEASUREMENTS = {
    "hessian_eigenvalues": {"num_matvecs": 4},
    "hessian_trace": {"key": KEY, "num_samples": 2},
    "hessian_spectrum": {"key": KEY, "num_matvecs": 3, "num_samples": 2},
    "sharpness": {"rho": 0.1},
    "worst_case_sharpness": {"rho": 0.1, "steps": 3},
    "radius_profile": {"radii": jnp.array([0.1, 0.2])},
    "m_sharpness": {"rho": 0.1, "m": 4},
    "layer_gradient_norms": {},
    "loss_along": {"direction": PARAMS, "distances": jnp.arange(2.0)},
    "loss_surface": {"directions": (PARAMS, PARAMS), "x": jnp.arange(2.0), "y": jnp.arange(2.0)},
}


def numbers(found):
    """The arrays of a result; of eigenvectors, whose sign is free, the absolute values."""
    if isinstance(found, diagnostics.Eigenpairs):
        found = found._replace(eigenvectors=jax.tree.map(jnp.abs, found.eigenvectors))
    return [leaf for leaf in jax.tree.leaves(found) if not isinstance(leaf, str)]


def bar(capsys):
    """Batches counted, and their number, as the bar showed last."""
    shown = capsys.readouterr().err.rpartition("\r")[2]
    return shown.split("| ")[1].split(" ")[0].split("/") if shown else None


@pytest.mark.exhaustive(but=["sharpness"])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_batches_bar_and_compilation(name, capsys):
    """In batches, of which the last is smaller, with a bar; and no second time compiled."""
    traces = []

    def loss(params, x, y):
        traces.append(None)
        return LOSS(params, x, y), {"aux": x}

    measure = getattr(diagnostics, name)
    options = {"has_aux": True, "progress": True, **MEASUREMENTS[name]}
    if name != "m_sharpness":
        options["batch_size"] = 3
    got = measure(loss, PARAMS, X, Y, **options)
    done, total = bar(capsys)
    assert done == total
    assert int(total) % (4 if name == "m_sharpness" else 3) == 0
    close(numbers(got), numbers(measure(LOSS, PARAMS, X, Y, **MEASUREMENTS[name])), 1e-3, 1e-4)
    assert bar(capsys) is None
    count = len(traces)
    measure(loss, jax.tree.map(lambda w: w + 1, PARAMS), X, Y, **options)
    assert len(traces) == count > 0


@pytest.mark.parametrize("name", ["hessian_trace", "sharpness", "loss_along"])
def test_inside_jit(name):
    measure = functools.partial(getattr(diagnostics, name), LOSS, **MEASUREMENTS[name])
    got = jax.jit(lambda *given: numbers(measure(*given)))(PARAMS, X, Y)
    close(got, numbers(measure(PARAMS, X, Y)), rtol=1e-3, atol=1e-4)


def test_bar_closes_after_an_error(capsys):
    def loss(w):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        diagnostics.sharpness(loss, jnp.ones(2), rho=0.1, progress=True)
    assert capsys.readouterr().err.endswith("\n")
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda w: diagnostics.sharpness(jnp.sum, w, rho=0.1, progress=True))(jnp.ones(2))


def test_bar_says_that_it_compiles(capsys):
    """On the first call alone, and until the first batch is done."""

    def loss(w):
        return jnp.sum(w**2)

    shown = []
    for _ in range(2):
        diagnostics.sharpness(loss, jnp.ones(2), rho=0.1, progress=True)
        shown.append(capsys.readouterr().err)
    assert "compiling:   0%" in shown[0]
    assert "compiling" not in shown[0].rpartition("\r")[2] + shown[1]


def test_linen_network():
    model = models_linen.MLP(2)

    def loss(params, x):
        return jnp.mean(model.apply({"params": params}, x[:, :2]) ** 2)

    params = model.init(KEY, X[:, :2])["params"]
    mask = gnp.masks.by_path("^down/")
    found = diagnostics.hessian_eigenvalues(loss, params, X, mask=mask, batch_size=5)
    block = dense(params, loss, X, select=lambda path: "down" in path)
    close(found.eigenvalues[0], np.linalg.eigvalsh(block)[-1])
    assert diagnostics.layer_gradient_norms(loss, params, X).paths == ("down", "up")


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        for name in ("hessian_trace", "worst_case_sharpness"):
            getattr(diagnostics, name)(LOSS, PARAMS, X, Y, **MEASUREMENTS[name])


ERRORS = {
    "no loss": (
        TypeError,
        "takes the loss function first",
        lambda: diagnostics.sharpness(PARAMS, X, rho=0.1),
    ),
    "vector": (
        TypeError,
        "must return a scalar",
        lambda: diagnostics.sharpness(lambda w: w, jnp.ones(2), rho=0.1),
    ),
    "aux": (
        TypeError,
        "has_aux=True",
        lambda: diagnostics.hessian_trace(lambda w: (w, 1), 1.0, key=KEY),
    ),
    "rho": (ValueError, "rho must be finite", lambda: diagnostics.sharpness(jnp.sum, X, rho=-1.0)),
    "radii": (
        ValueError,
        "radii must be positive",
        lambda: diagnostics.radius_profile(jnp.sum, X, radii=[0.0, 0.1]),
    ),
    "one radius": (
        ValueError,
        "must be a vector",
        lambda: diagnostics.radius_profile(jnp.sum, X, radii=0.1),
    ),
    "state": (
        ValueError,
        "has a state",
        lambda: diagnostics.sharpness(jnp.sum, X, rho=0.1, direction=optax.trace(0.9)),
    ),
    "direction": (
        TypeError,
        "with parentheses",
        lambda: diagnostics.sharpness(jnp.sum, X, rho=0.1, direction=gnp.directions.normalized),
    ),
    "mask": (
        ValueError,
        "selects none",
        lambda: diagnostics.hessian_trace(
            LOSS, PARAMS, X, Y, key=KEY, mask=gnp.masks.by_path("tail")
        ),
    ),
    "k": (
        ValueError,
        "have 30 dimensions",
        lambda: diagnostics.hessian_eigenvalues(LOSS, PARAMS, X, Y, k=31),
    ),
    "k and num_matvecs": (
        ValueError,
        "must be more than k|at least k",
        lambda: diagnostics.hessian_eigenvalues(LOSS, PARAMS, X, Y, k=5, num_matvecs=4),
    ),
    "num_matvecs": (
        ValueError,
        "num_matvecs=30 gives",
        lambda: diagnostics.hessian_spectrum(LOSS, PARAMS, X, Y, key=KEY, num_matvecs=31),
    ),
    "key": (
        TypeError,
        "one random key",
        lambda: diagnostics.hessian_trace(LOSS, PARAMS, X, Y, key=0),
    ),
    "batch_size": (
        ValueError,
        "at least 1",
        lambda: diagnostics.sharpness(LOSS, PARAMS, X, Y, rho=0.1, batch_size=0),
    ),
    "examples": (
        ValueError,
        "theirs differ",
        lambda: diagnostics.sharpness(LOSS, PARAMS, X, Y[:3], rho=0.1, batch_size=2),
    ),
    "m": (
        ValueError,
        "no groups of 3",
        lambda: diagnostics.m_sharpness(LOSS, PARAMS, X, Y, rho=0.1, m=3),
    ),
    "width": (
        ValueError,
        "must be positive",
        lambda: diagnostics.spectral_density(diagnostics.Spectrum(X, X), X[0], 0.0),
    ),
    "structure": (
        ValueError,
        "tree like the parameters",
        lambda: diagnostics.loss_along(LOSS, PARAMS, X, Y, direction=X, distances=X[0]),
    ),
    "shape": (
        ValueError,
        r"v\[0\]",
        lambda: diagnostics.loss_along(
            LOSS, PARAMS, X, Y, direction=jax.tree.map(lambda w: w[None], PARAMS), distances=X[0]
        ),
    ),
    "distances": (
        ValueError,
        "must be a vector",
        lambda: diagnostics.loss_along(LOSS, PARAMS, X, Y, direction=PARAMS, distances=1.0),
    ),
    "one direction": (
        TypeError,
        "a pair of trees",
        lambda: diagnostics.loss_surface(LOSS, PARAMS, X, Y, directions=PARAMS, x=X[0], y=X[0]),
    ),
    "integers": (
        ValueError,
        "None of the parameters",
        lambda: diagnostics.layer_gradient_norms(jnp.sum, jnp.arange(3)),
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error(case):
    error, message, call = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


# Eight devices

MEASURE = """
from gnp_optax import diagnostics as d

key = jax.random.key(0)

def placed(mesh, specs):
    return jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), params, specs)

def measured(params, x, y, loss=loss):
    found = d.hessian_eigenvalues(loss, params, x, y, num_matvecs=20)
    vectors = jax.tree.map(jnp.abs, found.eigenvectors)
    line = dict(direction=d.random_direction(key, params), distances=np.arange(2.0))
    return jax.device_get((
        found._replace(eigenvectors=vectors),
        d.hessian_trace(loss, params, x, y, key=key, num_samples=3),
        d.hessian_spectrum(loss, params, x, y, key=key, num_matvecs=4, num_samples=2),
        d.sharpness(loss, params, x, y, rho=0.1, batch_size=16),
        d.loss_along(loss, params, x, y, **line),
    ))

def agree(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, expected)
"""


@pytest.mark.exhaustive
def test_the_same_numbers_on_eight_devices():
    """Leaves that are sharded over both axes of the mesh, over one, and over none."""
    run_on_eight_devices(
        MEASURE
        + """
square = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
specs = {"body": {"kernel": P("model", "data"), "bias": P("data")},
         "head": {"kernel": P(("data", "model"), None), "bias": P()}}
got = measured(placed(square, specs), *put_on(square, (x, y), P("data")))
agree(got, measured(params, x, y))
"""
    )


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="jax.set_mesh came later")
def test_meshes_with_explicit_axes():
    """As `jax.make_mesh` makes them, with a loss that gathers the parameters itself."""
    run_on_eight_devices(
        MEASURE
        + """
def gathering(params, x, y):
    return loss(jax.tree.map(lambda w: jax.sharding.reshard(w, P()), params), x, y)

expected = d.hessian_eigenvalues(loss, params, x, y).eigenvalues
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
specs = {"body": {"kernel": P(None, "data"), "bias": P("data")},
         "head": {"kernel": P("data", None), "bias": P()}}
sharded, data = placed(mesh, specs), put((x, y), P("data"))
with jax.set_mesh(mesh):
    found = d.hessian_eigenvalues(gathering, sharded, *data)
    agree(found.eigenvalues, expected)
    assert found.eigenvectors["body"]["kernel"].sharding.mesh == mesh
    direction = d.random_direction(key, sharded)
    jax.tree.map(lambda w, v, u: w + v[0] + u, sharded, found.eigenvectors, direction)
    line = d.loss_along(gathering, sharded, *data, direction=direction, distances=jnp.zeros(1))
    agree(line.losses[0], loss(params, x, y))
"""
    )


@pytest.mark.exhaustive
def test_no_device_holds_a_vector_of_the_whole_model():
    """Each has its eighth of the Krylov vectors, also of parameters that all of them have."""
    run_on_eight_devices(
        MEASURE
        + """
from gnp_optax.diagnostics import _dataset, _lanczos, _layout

width, num_matvecs = 192, 64
keys = jax.random.split(key, 2)
params = {"body": jax.random.normal(keys[0], (width, width)) / width**0.5,
          "head": jax.random.normal(keys[1], (width, 8)) / width**0.5}
x, y = jnp.ones((32, width)), jnp.ones((32, 8))

def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["body"]) @ params["head"] - y) ** 2)

def memory(params, args):
    objective = _dataset.Objective(loss, False, None, _layout.layout_of(None, params))
    lowered = _lanczos.eigenpairs.lower(
        objective, None, params, args, key, k=1, num_matvecs=num_matvecs)
    return lowered.compile().memory_analysis().temp_size_in_bytes

vectors = 4 * num_matvecs * sum(w.size for w in params.values())
for specs in ({"body": P(None, "data"), "head": P("data")}, {"body": P(), "head": P()}):
    share = memory(placed(mesh, specs), put((x, y), P("data"))) / vectors
    print(share)
    assert share < 0.25, share
"""
    )
