"""Prefix sharing on programs of every kind: the numbers of two whole gradients."""

import functools
import inspect
import os
import secrets

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models.unshared import assert_same_tree, unshared

import gnp_optax as gnp

# More of them: PREFIX_EXAMPLES=500 pytest --exhaustive tests/prefix/test_programs.py
EXAMPLES = int(os.environ.get("PREFIX_EXAMPLES", "6"))
# Others each time. A failure prints the seed; with PREFIX_SEED it is drawn again.
SEED = int(os.environ.get("PREFIX_SEED") or secrets.randbits(32))
pytestmark = pytest.mark.usefixtures("x64")

# Layers from and to a (4, 3) array, with parameters "w" (3, 3), "b" (3,), "stack" (2, 3, 3).
LAYERS = {}


def layer(fun):
    LAYERS[fun.__name__] = fun
    return fun


@layer
def dense(p, h):
    return jnp.tanh(h @ p["w"] + p["b"])


@layer
def relu(p, h):
    return jax.nn.relu(h @ p["w"]) + 0.1 * h


@layer
def gelu(p, h):
    return jax.nn.gelu(h @ p["w"] + p["b"])


@layer
def layer_norm(p, h):
    centred = h - h.mean(-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-3) * (1 + p["b"])


@jax.custom_vjp
def halved(x):
    return x


halved.defvjp(lambda x: (x, None), lambda _, g: (0.5 * g,))


@layer
def custom_vjp(p, h):
    return halved(jnp.tanh(h @ halved(p["w"])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def powered(fun, n, x):
    return fun(x) ** n


powered.defvjp(
    lambda fun, n, x: (fun(x) ** n, x),
    lambda fun, n, x, g: (g * n * fun(x) ** (n - 1) * (1 - fun(x) ** 2),),
)


@layer
def custom_vjp_with_nondiff_argnums(p, h):
    return powered(jnp.tanh, 3, h @ p["w"]) + h


@jax.custom_vjp
def product(x, y):
    return x * y


def product_forward(x, y):
    """Keep what the gradient needs: the other factor of each that is differentiated."""
    saved = (y.value if x.perturbed else None, x.value if y.perturbed else None)
    return x.value * y.value, saved


product.defvjp(
    product_forward,
    lambda saved, g: tuple(None if other is None else g * other for other in saved),
    symbolic_zeros=True,
)


@layer
def custom_vjp_with_symbolic_zeros(p, h):
    b = jnp.broadcast_to(p["b"], h.shape)
    return product(h, b) + product(jnp.sign(h), b) + product(jnp.ones_like(h), h)


@jax.custom_jvp
def smooth(x):
    return jnp.log1p(jnp.exp(x))


smooth.defjvp(lambda x, t: (smooth(x[0]), 0.9 * jax.nn.sigmoid(x[0]) * t[0]))


@layer
def custom_jvp(p, h):
    return smooth(h @ p["w"]) - 1


@layer
def checkpoint(p, h):
    return jax.checkpoint(lambda p, h: dense(p, dense(p, h)))(p, h)


@layer
def checkpoint_with_policy(p, h):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(jax.jit(dense), policy=policy, prevent_cse=False)(p, h)


jitted_dense = jax.jit(dense)


@layer
def jit(p, h):
    return jax.jit(lambda p, h: jitted_dense(p, jitted_dense(p, h)) + 1.0)(p, h)


@layer
def jit_with_literals(p, h):
    scaled = jax.jit(lambda x, s: x * s)
    return scaled(scaled(h, np.float32(0.5)) + scaled(p["b"], 2), jnp.asarray(0.5, jnp.bfloat16))


@layer
def scan_over_steps(p, h):
    def step(c, x):
        return jnp.tanh(c @ p["w"] + x), (c.sum(), x)

    h, (sums, _) = lax.scan(step, h, jnp.arange(2.0), reverse=True, unroll=2)
    return h * jnp.cos(sums[0])


@layer
def scan_over_layers(p, h):
    h, sums = lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), h, 2 * p["stack"])
    return h * jnp.cos(sums[1])


@layer
def scan_over_layers_in_bfloat16(p, h):
    stack = p["stack"].astype(jnp.bfloat16)
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), h.astype(jnp.bfloat16), stack)[0] + h


def scanned(h, stack):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), h, stack)[0]


@layer
def scan_over_list(p, h):
    return scanned(h, jnp.stack([*p["stack"], p["w"], 0.5 * p["w"]]))


@layer
def scan_over_nested_list(p, h):
    stack = jnp.stack([p["stack"], jnp.stack([p["w"], p["w"].T])])
    return lax.scan(lambda c, group: (scanned(c, group), None), h, stack)[0]


@layer
def scan_over_pairs(p, h):
    pairs = jnp.concatenate([p["stack"], p["w"][None], p["stack"][:1]]).reshape(2, 2, 3, 3)
    return lax.scan(lambda c, w: (jnp.tanh(c @ w[0]) @ w[1], None), h, pairs)[0]


@layer
def scan_over_normalized_layers(p, h):
    norm = jnp.linalg.norm(p["stack"], axis=(1, 2), keepdims=True)
    return scanned(h, p["stack"] / norm * jnp.array([0.5, 1.5])[:, None, None])


@layer
def scan_over_layers_backwards(p, h):
    stack = p["stack"][::-1].swapaxes(1, 2)
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), h, stack, reverse=True)[0]


@layer
def scan_of_carried_parameters(p, h):
    def step(carry, w):
        h, p = carry
        return (jnp.tanh(h @ w), p), h.sum()

    (h, p), sums = lax.scan(step, (h, p), p["stack"])
    return h * p["b"] + sums[1]


@layer
def scan_by_index(p, h):
    def step(h, i):
        return jnp.tanh(h @ jnp.take(p["stack"], 1 - i, axis=0)) + i, None

    return lax.scan(step, h, jnp.arange(2))[0]


@layer
def partly_known_scan(p, h):
    """Carries of which each depends on another leaf, and a counter."""

    def step(carry, x):
        first, second, i = carry
        first = jnp.tanh(first @ p["w"] + x)
        second = jnp.tanh(second + first * p["b"] * i)
        return (first, second, i + 1), (second.sum() + x, first * i, 2.0)

    carry, (sums, firsts, _) = lax.scan(step, (h, h, 0), jnp.arange(3.0), reverse=True, unroll=2)
    return carry[1] * jnp.cos(sums[1]) + firsts[2] + carry[2]


@layer
def partly_known_scan_of_carried_parameters(p, h):
    def step(carry, w):
        h, p, out = carry
        h, out = jax.checkpoint(lambda h: (dense(p, h), out + jnp.tanh(h @ p["w"] @ w)))(h)
        return (h, p, out), None

    return lax.scan(step, (h, {k: p[k] for k in ("w", "b")}, h), 2 * p["stack"])[0][2]


@layer
def partly_known_scan_of_scans(p, h):
    def step(carry, i):
        h, out = carry
        h = jax.jit(scanned)(h, p["stack"])
        kept = jax.random.bernoulli(jax.random.fold_in(jax.random.key(3), i), 0.7, h.shape)
        inner = lambda c, x: ((c[0] @ p["w"], jnp.sin(c[1] * c[0] + p["b"])), x)  # noqa: E731
        return (h, out + lax.scan(inner, (h, h), length=2)[0][1] * kept), None

    return lax.scan(step, (h, h), jnp.arange(2))[0][1]


@layer
def partly_known_scan_with_inner_gradient(p, h):
    """Features of which only what reads them is adapted."""

    def step(b, _):
        loss = lambda b, h: jnp.sum(jnp.tanh(jnp.tanh(h @ p["w"]) * b))  # noqa: E731
        return b - 0.1 * jax.grad(loss)(b, h), None

    return h * lax.scan(step, p["b"], length=2)[0]


@layer
def partly_known_scan_with_infinite_derivative(p, h):
    def step(h, x):
        h = h @ p["w"] + x
        root = jnp.sqrt(0 * h)
        out = jnp.where(root > p["b"], 0.5 * h, h) + lax.stop_gradient(root * p["b"])
        return h, out * p["b"] * lax.stop_gradient(jnp.sqrt(0 * p["w"].sum()) + 1)

    return lax.scan(step, h, jnp.arange(2.0))[1][1]


@layer
def fori_loop_by_index(p, h):
    return lax.fori_loop(0, 2, lambda i, c: jnp.tanh(c @ p["stack"][i]) * p["b"][i], h)


@layer
def fori_loop_by_index_with_carried_parameters(p, h):
    def step(i, carry):
        h, p = carry
        return jax.checkpoint(lambda h, p: (jnp.tanh(h @ p["stack"][i]), p))(h, p)

    return lax.fori_loop(0, 2, step, (h, p))[0]


@layer
def checkpointed_scan(p, h):
    return jax.checkpoint(lambda p, h: scanned(h, p["stack"]) @ p["w"])(p, h)


@layer
def optimization_barrier(p, h):
    h, stack, w = lax.optimization_barrier((h, p["stack"], p["w"]))
    return scanned(h, stack) @ w


@layer
def sharding_constraint(p, h):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    h, stack = lax.with_sharding_constraint((h, p["stack"]), spec)
    return scanned(h, stack)


@layer
def scan_over_checkpoints(p, h):
    return jax.jit(lambda w, h: lax.scan(jax.checkpoint(lambda c, w: (dense(w, c), None)), h, w))(
        {"w": p["stack"], "b": p["w"][:2]}, h
    )[0]


@layer
def cond(p, h):
    return lax.cond(h.sum() + p["b"].sum() > 0, lambda h: dense(p, h), lambda h: relu(p, h), h)


@layer
def switch(p, h):
    branches = [lambda h: h @ p["w"], jnp.sin, lambda h: h + p["b"]]
    return lax.switch(jnp.argmax(p["w"][0] + h[0]), branches, h)


@layer
def fori_loop(p, h):
    return lax.fori_loop(0, 2, lambda i, c: jnp.tanh(c @ p["w"]) + i, h)


def grown(x):
    """A loop that has no reverse mode."""
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 1.1 * c[1]), (0, x))[1]


@layer
def while_loop_on_stopped_values(p, h):
    return h * grown(lax.stop_gradient(h * p["b"]))


@layer
def while_loop_on_integers(p, h):
    return h * (grown(jnp.argmax(h + p["b"]).astype(float)) + 1)


@layer
def while_loop_that_is_only_compared(p, h):
    return jnp.where(grown(p["b"]) > h, 0.5 * h, h)


@layer
def while_loop_on_signs(p, h):
    return h * grown(jnp.sign(p["b"]) * lax.stop_gradient(h))


@layer
def infinite_derivative_that_is_not_used(p, h):
    root = jnp.sqrt(0 * p["b"])
    return jnp.where(root > h, 0.5 * h, h) + lax.stop_gradient(root * h)


@layer
def dropout(p, h):
    return h * jax.random.bernoulli(jax.random.key(1), 0.7, h.shape) + p["b"]


@layer
def dropout_with_raw_keys(p, h):
    key = jax.random.fold_in(jax.random.PRNGKey(2), jnp.argmax(h))
    return h * jax.random.bernoulli(key, 0.7, h.shape) + p["b"]


@layer
def embedding(p, h):
    return h + p["w"][jnp.argmax(h, -1)] + p["w"][jnp.array([0, 2, 1, 1])]


@layer
def scatter(p, h):
    return jnp.cos(h).at[jnp.array([0, 2])].add(p["b"]).at[-1].set(h[0])


@layer
def one_hot(p, h):
    return jax.nn.one_hot(jnp.argmax(h, -1), 3) @ p["w"] + h


@layer
def sort(p, h):
    return jnp.sort(h + p["b"], 0) + h[jnp.argsort(p["b"] + h[:, 0].sum())[0]]


@layer
def top_k(p, h):
    values, indices = lax.top_k(h @ p["w"], 3)
    return values * jnp.cos(indices)


@layer
def fourier(p, h):
    return jnp.abs(jnp.fft.fft(h) * jnp.exp(1j * p["b"]) + 1) - 1


@layer
def bfloat16(p, h):
    h, w = h.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16)
    return jnp.tanh(h @ w).astype(float)


@layer
def vmap(p, h):
    return jax.vmap(lambda row: lax.cond(row[0] > 0, jnp.sin, jnp.cos, row @ p["w"]))(h)


def on_host(x):
    kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x: np.cos(x), kind, x, vmap_method="sequential")


@layer
def callback_on_stopped_values(p, h):
    return h * on_host(lax.stop_gradient(h + p["b"]))


@layer
def callback_on_rounded_values(p, h):
    return h * on_host(jnp.round(4 * p["b"]) * jax.jit(lax.stop_gradient)(h))


@layer
def straight_through(p, h):
    return h + p["b"] + lax.stop_gradient(jnp.round(4 * h * p["b"]) / 4 - h)


@layer
def linear_solve(p, h):
    return jnp.linalg.solve(3 * jnp.eye(3) + p["w"], h.T).T


@layer
def conjugate_gradients(p, h):
    w = 3 * jnp.eye(3) + p["w"] @ p["w"].T
    return h + jax.scipy.sparse.linalg.cg(lambda x: w @ x, h[0], maxiter=9)[0]


@layer
def inner_gradient(p, h):
    return h + jax.grad(lambda h: jnp.sum(dense(p, h) ** 2))(h)


@layer
def inner_jvp(p, h):
    return jax.jvp(lambda h: dense(p, h), (h,), (jnp.cos(h),))[1] + h


@layer
def associative_scan(p, h):
    return lax.associative_scan(jnp.add, h * p["b"]) + jnp.cumsum(h, 1)


@layer
def named_scope(p, h):
    with jax.named_scope("block"):
        return h @ p["w"] + np.linspace(0, 1, 3)


# What may be around a block of layers.
WRAPPERS = {
    "nothing": lambda block: block,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "checkpointed jit": lambda block: jax.checkpoint(jax.jit(block)),
    "scan": lambda block: lambda p, h: lax.scan(lambda h, _: (block(p, h), h), h, length=2)[0],
    "vmap": lambda block: lambda p, h: jax.vmap(block, (None, 0))(p, h[None])[0],
    "cond": lambda block: lambda p, h: lax.cond(h.sum() > 0, block, lambda p, h: 2 * h, p, h),
}


def block_of(layers):
    def block(params, h):
        for name, index in layers:
            h = LAYERS[name](params[index], h)
        return h

    return block


class Program:
    """Blocks in a row, of layers with one of three sets of parameters; aux of all kinds."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.runs = 0  # of what depends on data alone

    def __call__(self, params, x):
        jax.debug.callback(self.count)
        h, aux = x, {"word": "word", "number": 3.0, "none": None}
        for i, (wrapper, layers) in enumerate(self.blocks):
            h = WRAPPERS[wrapper](block_of(layers))(params, h)
            aux[f"after {i}"] = (h.mean(), jnp.argmax(h), jnp.asarray(i), i)
        aux["params"] = [params[0]["w"], jax.random.fold_in(jax.random.key(0), jnp.argmax(h))]
        return jnp.mean((h - 0.3) ** 2), aux

    def count(self):
        self.runs += 1


def without_word(result):
    """Jitted functions return no strings."""
    (value, aux), grads = result
    return (value, {k: v for k, v in aux.items() if k != "word"}), grads


def exact(blocks):
    """In bfloat16, to mix two gradients and pull back rounds otherwise than to mix them at last."""
    return not any("bfloat16" in name for _, layers in blocks for name, _ in layers)


def parameters():
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 3), "b": (3,), "stack": (2, 3, 3)}
    return [{k: jnp.asarray(rng.normal(size=s) / 2) for k, s in shapes.items()} for _ in range(3)]


def check(blocks, mask, r=0.1, alpha=0.7, scope="all", traced=False):
    """Compare with the formula, and count how often what depends on data alone is computed."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)))
    results, runs = [], []
    for transform in (gnp.value_and_grad, unshared):
        program = Program(blocks)

        def run(params, r, alpha, program=program, transform=transform):
            found = transform(program, r, alpha, mask=mask, scope=scope, has_aux=True)(params, x)
            return without_word(found) if traced else found

        results.append((jax.jit(run) if traced else run)(parameters(), r, alpha))
        jax.effects_barrier()
        runs.append(program.runs)
    assert_same_tree(*results, rtol=1e-12 if exact(blocks) else 2e-2)
    assert runs == [1, 2]


OVER_LAYERS = [name for name in LAYERS if "stack" in inspect.getsource(LAYERS[name])]


@pytest.mark.exhaustive(
    but=[
        "gelu",
        "custom_vjp_with_symbolic_zeros",
        "checkpoint_with_policy",
        "jit",
        "cond",
        "fori_loop",
        "scatter",
        "vmap",
    ]
)
@pytest.mark.parametrize("name", [name for name in LAYERS if name not in OVER_LAYERS])
def test_layer_before_at_and_after_the_cut(name):
    check([("nothing", [(name, 0), (name, 1), (name, 2)])], [False, True, False])


@pytest.mark.exhaustive(but=["scan_over_layers-masked"])
@pytest.mark.parametrize(
    ("name", "scope"), [*((name, "all") for name in OVER_LAYERS), ("scan_over_layers", "masked")]
)
def test_layer_of_which_part_is_perturbed(name, scope):
    part = {"w": False, "b": False, "stack": np.array([False, True])}
    blocks = [("nothing", [(name, 0), (name, 1), (name, 2)])]
    check(blocks, [False, part, False], scope=scope, traced=exact(blocks))


PARTLY_KNOWN = [name for name in LAYERS if name.startswith("partly_known")]


@pytest.mark.exhaustive(but=["partly_known_scan-b", "partly_known_scan_of_scans-b"])
@pytest.mark.parametrize("leaf", ["w", "b", "stack"])
@pytest.mark.parametrize("name", PARTLY_KNOWN)
def test_loop_of_which_part_is_known(name, leaf):
    if leaf == "stack" and "stack" not in inspect.getsource(LAYERS[name]):
        pytest.skip("it has no stack")
    part = {key: key == leaf for key in ("w", "b", "stack")}
    check([("nothing", [(name, 0), (name, 1)])], [False, part, False], traced=True)


def test_derivative_that_asks_what_is_differentiated():
    """JAX differentiates one program with respect to the same arrays each time, or fails."""
    of_stack = {"w": False, "b": False, "stack": np.array([False, True])}
    mask = [{"w": False, "b": True, "stack": False}, False, of_stack]
    layers = [("associative_scan", 1), ("custom_vjp_with_symbolic_zeros", 0)]
    check([("scan", layers)], mask, scope="masked")


@st.composite
def masks(draw):
    """Some leaves selected, but never all."""
    flags = draw(st.lists(st.booleans(), min_size=8, max_size=8))
    stack = np.array(draw(st.sampled_from([[False, True], [True, False], [True, True]])))
    mask = [dict(zip(["w", "b", "stack"], flags[3 * i : 3 * i + 3], strict=False)) for i in (0, 1)]
    if all(flags) or not any(flags):
        stack = np.array([False, True])
    return [*mask, {"w": flags[6], "b": flags[7], "stack": stack}]


layers = st.tuples(st.sampled_from(sorted(LAYERS)), st.integers(0, 2))
blocks = st.tuples(st.sampled_from(sorted(WRAPPERS)), st.lists(layers, min_size=1, max_size=2))


@pytest.mark.exhaustive
@hypothesis.seed(SEED)
@hypothesis.given(
    blocks=st.lists(blocks, min_size=1, max_size=3),
    mask=masks(),
    r=st.sampled_from([0.0, 0.01, 0.3]),
    alpha=st.sampled_from([0.3, 1.0, 1.4]),
    scope=st.sampled_from(["all", "masked"]),
    traced=st.sampled_from([False, False, False, True]),
)
@hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
def test_random_program(blocks, mask, r, alpha, scope, traced):
    hypothesis.note(f"PREFIX_SEED={SEED}")
    hypothesis.assume(not traced or exact(blocks))
    check(blocks, mask, r, alpha, scope, traced)
