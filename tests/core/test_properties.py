"""What holds for every tree of parameters, mask, radius and weight."""

import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.problems import through_transformation

import gnp_optax as gnp

# More examples, chosen at random: PROPERTY_EXAMPLES=300 pytest tests/core/test_properties.py
EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "10"))
pytestmark = pytest.mark.usefixtures("x64")

hold = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="PROPERTY_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)

# Few, since without `jit` every operation is compiled for each.
SHAPES = [(), (1,), (2, 3), (0,)]
FULL = ("float32", "float64")
HALF = ("bfloat16", "float16")


def trees(leaf):
    """Nested dicts, lists and tuples of 1 to 5 leaves; some subtrees are empty."""

    def containers(children):
        return (
            st.lists(children, max_size=3)
            | st.lists(children, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from("abcd"), children, max_size=3)
        )

    return st.recursive(leaf, containers, max_leaves=5)


class Spec:
    """Shape and type of a leaf; not a tuple, which would be a subtree."""

    def __init__(self, shape_and_dtype):
        self.shape, self.dtype = shape_and_dtype

    def __repr__(self):
        return f"{self.dtype}{self.shape}"


@st.composite
def parameters(draw, dtypes):
    """Parameters and a mask; a leaf that is selected may be empty."""
    spec = draw(trees(st.tuples(st.sampled_from(SHAPES), st.sampled_from(dtypes)).map(Spec)))
    # A mask that is a single bool is refused: there, None says the same.
    specs, treedef = jax.tree.flatten([spec] if isinstance(spec, Spec) else spec)
    hypothesis.assume(specs)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    leaves = [jnp.asarray(rng.normal(size=s.shape), s.dtype) for s in specs]
    flags = draw(st.lists(st.booleans(), min_size=len(specs), max_size=len(specs)))
    flags[draw(st.integers(0, len(specs) - 1))] = True
    return treedef.unflatten(leaves), treedef.unflatten(flags)


radii = st.floats(0.01, 0.5)
weights = st.floats(0.01, 2.0)
scopes = st.sampled_from(["all", "masked"])
curvatures = st.sampled_from(["finite_difference", "exact"])


def loss(params):
    """Smooth, symmetric in the leaves, and such that each gradient depends on all of them."""
    leaves = [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in jax.tree.leaves(params)]
    total = sum(jnp.sum(jnp.tanh(x)) for x in leaves)
    return total + total**2 / 4 + sum(jnp.sum(x**2) for x in leaves) / 4


def by_transformation(params, r, alpha, **kwargs):
    return through_transformation(gnp.gradient_regularization(r, alpha, **kwargs), loss, params)[0]


def by_core(params, r, alpha, **kwargs):
    return gnp.value_and_grad(loss, r, alpha, **kwargs)(params)[1]


forms = st.sampled_from([by_transformation, by_core])


def second_pass(params, r, fun=loss, grads=None, **kwargs):
    """Where the second gradient was taken, and the state."""
    seen = []

    def value_fn(moved):
        jax.debug.callback(seen.append, moved)
        return fun(moved)

    tx = gnp.gradient_regularization(r, 1.0, **kwargs)
    grads = jax.grad(fun)(params) if grads is None else grads
    _, state = tx.update(grads, tx.init(params), params, value_fn=value_fn)
    jax.effects_barrier()
    (moved,) = seen
    return moved, state


def has_elements(params, mask):
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    return any(x.size for x, selected in pairs if selected)


def assert_close(got, expected, rtol=None):
    """To the rounding of each leaf's type, or to `rtol`; in units of what a gradient is here."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        tolerance = rtol or 32 * max(float(jnp.finfo(x.dtype).eps), 1e-7)
        np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance
        )


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@hypothesis.given(parameters(FULL), radii, st.floats(1e-3, 1e3))
@hold
def test_perturbation_does_not_depend_on_the_scale_of_the_loss(tree, r, scale):
    params, mask = tree
    moved, state = second_pass(params, r, mask=mask)
    scaled_moved, scaled_state = second_pass(params, r, lambda p: scale * loss(p), mask=mask)
    assert_close(scaled_moved, moved, rtol=1e-5)
    np.testing.assert_allclose(
        scaled_state.perturbation_norm, state.perturbation_norm, rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(scaled_state.cosine, state.cosine, rtol=1e-4, atol=1e-5)


@hypothesis.given(parameters(FULL), radii)
@hold
def test_perturbation_has_the_radius_for_its_norm(tree, r):
    params, mask = tree
    moved, state = second_pass(params, r, mask=mask)
    expected = r if has_elements(params, mask) else 0.0
    np.testing.assert_allclose(state.perturbation_norm, expected, rtol=1e-4)
    squares = jax.tree.map(lambda a, b: np.sum((np.float64(a) - np.float64(b)) ** 2), moved, params)
    np.testing.assert_allclose(np.sqrt(sum(jax.tree.leaves(squares))), expected, rtol=1e-4)


@hypothesis.given(parameters((*HALF, "float32")), radii)
@hold
def test_half_precision_has_the_radius_too_when_perturbed_in_float32(tree, r):
    params, mask = tree
    moved, state = second_pass(params, r, mask=mask, perturb_dtype="float32")
    expected = r if has_elements(params, mask) else 0.0
    np.testing.assert_allclose(state.perturbation_norm, expected, rtol=1e-4)
    for x, w, selected in zip(*map(jax.tree.leaves, (moved, params, mask)), strict=True):
        assert x.dtype == (jnp.float32 if selected else w.dtype)


@hypothesis.given(parameters((*FULL, *HALF)), radii, weights, scopes, curvatures, forms)
@hold
def test_linear_in_the_weight(tree, r, alpha, scope, curvature, form):
    params, mask = tree
    kwargs = {"mask": mask, "scope": scope, "curvature": curvature}

    def mixed(g, tilde):
        wide = jnp.promote_types(g.dtype, jnp.float32)
        return ((1 - alpha) * g.astype(wide) + alpha * tilde.astype(wide)).astype(g.dtype)

    expected = jax.tree.map(mixed, jax.grad(loss)(params), form(params, r, 1.0, **kwargs))
    assert_close(form(params, r, alpha, **kwargs), expected)


@hypothesis.given(parameters((*FULL, *HALF)), radii, weights, curvatures)
@hold
def test_leaves_outside_the_mask_keep_their_gradient(tree, r, alpha, curvature):
    params, mask = tree
    kwargs = {"mask": mask, "scope": "masked", "curvature": curvature}

    def unselected(found):
        return [x for x, s in zip(*map(jax.tree.leaves, (found, mask)), strict=True) if not s]

    plain = unselected(jax.grad(loss)(params))
    assert_equal(unselected(by_transformation(params, r, alpha, **kwargs)), plain)
    # Computed in another order, through the boundary.
    assert_close(unselected(by_core(params, r, alpha, **kwargs)), plain)


@hypothesis.given(parameters((*FULL, *HALF)), radii, scopes, st.floats(-3.0, 3.0))
@hold
def test_gradients_outside_the_mask_do_not_perturb(tree, r, scope, factor):
    params, mask = tree
    grads = jax.grad(loss)(params)
    changed = jax.tree.map(lambda g, s: g if s else (factor * g).astype(g.dtype), grads, mask)
    moved, state = second_pass(params, r, grads=grads, mask=mask, scope=scope)
    other_moved, other_state = second_pass(params, r, grads=changed, mask=mask, scope=scope)
    assert_equal(other_moved, moved)
    assert_equal(other_state.perturbation_norm, state.perturbation_norm)
    for x, w, selected in zip(*map(jax.tree.leaves, (moved, params, mask)), strict=True):
        if not selected:
            np.testing.assert_array_equal(x, w)


@hypothesis.given(
    parameters(FULL), radii, weights, scopes, curvatures, forms, st.permutations(range(5))
)
@hold
def test_order_and_names_of_the_leaves_make_no_difference(
    tree, r, alpha, scope, curvature, form, order
):
    leaves, flags = map(jax.tree.leaves, tree)
    order = [i for i in order if i < len(leaves)]
    names = [f"layer_{i}" for i in order]

    def gradient(params, mask):
        return form(params, r, alpha, mask=mask, scope=scope, curvature=curvature)

    expected = jax.tree.leaves(gradient(*tree))
    as_list = gradient([leaves[i] for i in order], [flags[i] for i in order])
    assert_close(as_list, [expected[i] for i in order])
    as_dict = gradient(*(dict(zip(names, x, strict=True)) for x in (leaves, flags)))
    assert_close(as_dict, dict(zip(names, expected, strict=True)))


@hypothesis.given(parameters((*FULL, *HALF)), radii, weights, scopes, curvatures)
@hold
def test_transformation_and_core_agree(tree, r, alpha, scope, curvature):
    params, mask = tree
    kwargs = {"mask": mask, "scope": scope, "curvature": curvature}
    got = by_core(params, r, alpha, **kwargs)
    assert_close(got, by_transformation(params, r, alpha, **kwargs))


@hypothesis.given(parameters((*FULL, *HALF)), weights, scopes, curvatures, forms)
@hold
def test_without_radius_it_is_the_plain_gradient(tree, alpha, scope, curvature, form):
    params, mask = tree
    got = form(params, 0.0, alpha, mask=mask, scope=scope, curvature=curvature)
    assert_close(got, jax.grad(loss)(params))


@hypothesis.given(parameters((*FULL, *HALF)), radii, scopes, curvatures)
@hold
def test_without_weight_it_is_exactly_the_plain_gradient(tree, r, scope, curvature):
    params, mask = tree
    kwargs = {"mask": mask, "scope": scope, "curvature": curvature}
    plain = jax.grad(loss)(params)
    assert_equal(by_transformation(params, r, 0.0, **kwargs), plain)
    assert_equal(by_core(params, r, 0.0, **kwargs), plain)
