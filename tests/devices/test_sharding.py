"""On eight devices: the numbers of one, and no more communication than the gradients need."""

import re

import jax
import pytest
from models.eight_devices import run_on_eight_devices


@pytest.mark.exhaustive
def test_sharded_batch_and_sharded_parameters():
    out = run_on_eight_devices(
        """
        expected = jax.jit(composed)(params, x, y)[0]
        data = put((x, y), P("data"))
        step = jnp.zeros([], jnp.int32)
        spec = {"body": {"kernel": P(None, "data"), "bias": P("data")},
                "head": {"kernel": P("data", None), "bias": P()}}
        is_spec = lambda s: isinstance(s, P)
        sharded = jax.tree.map(lambda s, w: put(w, s), spec, params, is_leaf=is_spec)
        for placed in (put(params, P()), sharded):
            check(jax.jit(composed)(placed, *data)[0], expected)
            check(jax.jit(core)(placed, *data, step), expected)
        for name, lowered in (
            ("plain", jax.jit(jax.grad(loss)).lower(sharded, *data)),
            ("core", jax.jit(core).lower(sharded, *data, step)),
            ("composed", jax.jit(composed).lower(sharded, *data)),
        ):
            print(name, len(re.findall(r"= \\S+ all-gather\\(", lowered.compile().as_text())))
        """
    )
    gathers = {name: int(n) for name, n in re.findall(r"(\w+) (\d+)", out)}
    # Two gradients, and not a parameter gathered for a norm or a cosine.
    assert gathers["core"] <= 2 * gathers["plain"]
    assert gathers["composed"] <= 2 * gathers["plain"]


@pytest.mark.exhaustive
def test_vectors_of_several_shardings_are_gathered_for_no_norm():
    run_on_eight_devices(
        """
        mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
        vectors = [put_on(mesh, jnp.ones(2**16), P(axis)) for axis in ("x", "y", "x", "y")]

        def step(vectors):
            squares = lambda vectors: sum(jnp.sum(jnp.sin(w)) for w in vectors)
            grads = gnp.value_and_grad(squares, 0.1, 0.7)(vectors)[1]
            return jax.tree.map(lambda w, g: w - 0.1 * g, vectors, grads)

        shardings = [w.sharding for w in vectors]
        compiled = jax.jit(step, out_shardings=shardings).lower(vectors).compile()
        assert "all-gather" not in compiled.as_text()
        check(compiled(vectors), step([jnp.ones(2**16)] * 4))
        """
    )


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="jax.shard_map came later")
def test_perturbation_per_device_inside_shard_map():
    """Each device perturbs by the gradient of its own part of the batch: m-sharpness."""
    run_on_eight_devices(
        """
        parts = [(x[i * 4 : i * 4 + 4], y[i * 4 : i * 4 + 4]) for i in range(8)]
        each = [composed(params, *part)[0] for part in parts]
        expected = jax.tree.map(lambda *g: sum(g) / 8, *each)

        def local(form, params, x, y, step):
            params = jax.tree.map(lambda w: jax.lax.pcast(w, "data", to="varying"), params)
            grads = form(params, x, y, step)
            return jax.tree.map(lambda g: jax.lax.pmean(g, "data"), grads)

        forms = {"core": core, "composed": lambda p, x, y, step: composed_at(p, x, y, step)}

        def composed_at(params, x, y, step):
            state = tx.init(params)._replace(step=step)
            grads = jax.grad(loss)(params, x, y)
            return tx.update(grads, state, params, value_fn=lambda p: loss(p, x, y))[0]

        for name, form in forms.items():
            mapped = jax.shard_map(
                functools.partial(local, form), mesh=mesh,
                in_specs=(P(), P("data"), P("data"), P()), out_specs=P(),
            )
            check(jax.jit(mapped)(params, x, y, jnp.zeros([], jnp.int32)), expected)
        """
    )


@pytest.mark.exhaustive(but=["masked"])
@pytest.mark.parametrize("scope", ["all", "masked"])
def test_prefix_sharing_with_a_sharded_batch(scope):
    """The same numbers as on one device, `1 + q` of the operations, no gathered activation."""
    run_on_eight_devices(
        f"""
        keys = jax.random.split(jax.random.key(0), 7)
        deep = {{f"layer_{{i}}": jax.random.normal(k, (64, 64)) / 8 for i, k in enumerate(keys)}}
        batch = jax.random.normal(jax.random.key(9), (2048, 64))

        def deep_loss(params, x):
            for kernel in params.values():
                x = x - x.mean(axis=0)  # over the devices, as in BatchNorm
                x = x + jnp.tanh(x @ kernel)
            return jnp.mean(x**2)

        mask = gnp.masks.by_path("layer_6")
        shared = gnp.value_and_grad(deep_loss, 0.1, 0.8, mask=mask, scope="{scope}")
        plain = jax.value_and_grad(deep_loss)
        expected = jax.jit(shared)(deep, batch)
        placed = put(deep, P()), put(batch, P("data"))
        compiled = {{name: jax.jit(f).lower(*placed).compile()
                    for name, f in dict(shared=shared, plain=plain).items()}}
        check(compiled["shared"](*placed), expected)
        flops = {{name: c.cost_analysis()["flops"] for name, c in compiled.items()}}
        assert flops["shared"] <= (1 + 1 / 7 + 0.02) * flops["plain"], flops
        for c in compiled.values():
            assert "all-gather" not in c.as_text()
        """
    )


@pytest.mark.exhaustive
def test_m_sharpness_does_not_depend_on_the_devices():
    """The same numbers on 1, 4 and 8 devices; each computes its own groups, and the mean is summed.

    One group at a time would be gathered to be divided over the devices.
    """
    run_on_eight_devices(
        """
        gradient = gnp.value_and_grad(loss, 0.1, 0.8)
        one = gnp.batching.m_sharpness(gradient, 2)
        expected = jax.jit(one)(params, x, y)
        for devices in (1, 4, 8):
            mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
            placed = put_on(mesh, params, P()), *put_on(mesh, (x, y), P("data"))
            for parallel in {1, devices, 16}:
                each = gnp.batching.m_sharpness(gradient, 2, parallel=parallel)
                compiled = jax.jit(each).lower(*placed).compile()
                check(compiled(*placed), expected)
                if parallel >= devices:
                    assert "all-gather" not in compiled.as_text(), (devices, parallel)
        """
    )


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="jax.shard_map came later")
def test_groups_and_micro_batches_inside_shard_map():
    run_on_eight_devices(
        """
        gradient = gnp.value_and_grad(loss, 0.1, 0.8)
        accumulated = gnp.value_and_grad(gnp.batching.accumulate(loss, 2), 0.1, 0.8)
        for local, m in ((gnp.batching.m_sharpness(gradient, 2), 2), (accumulated, 4)):
            def mean(params, x, y):
                params = jax.tree.map(lambda w: jax.lax.pcast(w, "data", to="varying"), params)
                return jax.tree.map(lambda g: jax.lax.pmean(g, "data"), local(params, x, y))

            specs = dict(in_specs=(P(), P("data"), P("data")), out_specs=P())
            got = jax.jit(jax.shard_map(mean, mesh=mesh, **specs))(params, x, y)
            check(got, jax.jit(gnp.batching.m_sharpness(gradient, m))(params, x, y))
        """
    )


@pytest.mark.exhaustive
def test_micro_batches_of_a_sharded_batch():
    """Every device has a share of every micro-batch: nothing of the batch is sent around."""
    run_on_eight_devices(
        """
        expected = jax.jit(gnp.value_and_grad(loss, 0.1, 0.8))(params, x, y)
        placed = put(params, P()), *put((x, y), P("data"))
        gradient = gnp.value_and_grad(gnp.batching.accumulate(loss, 4), 0.1, 0.8)
        compiled = jax.jit(gradient).lower(*placed).compile()
        check(compiled(*placed), expected)
        for sent in ("all-gather", "all-to-all", "collective-permute"):
            assert sent not in compiled.as_text()
        """
    )


@pytest.mark.exhaustive
def test_parameters_sharded_over_the_devices_stay_so():
    """FSDP: the perturbed parameters are sharded as the parameters are, in every form.

    A gradient gathers the parameters. A second one gathers the perturbed ones, and nothing else:
    no norm, mixture or mask gathers any, and with prefix sharing only the suffix does again.
    """
    out = run_on_eight_devices(
        """
        seen = []
        spec = {"body": {"kernel": P(None, "data"), "bias": P("data")},
                "head": {"kernel": P("data", None), "bias": P()}}
        sharded = jax.tree.map(
            lambda s, w: put(w, s), spec, params, is_leaf=lambda s: isinstance(s, P)
        )
        data = put((x, y), P("data"))

        def watched(params, x, y):
            jax.tree.map(lambda w: jax.debug.inspect_array_sharding(
                w, callback=lambda s, w=w: seen.append((w.shape, s))), params)
            return loss(params, x, y)

        forms = {
            "plain": {},
            "all": dict(r=0.1, alpha=0.8),
            "exact": dict(r=0.1, alpha=0.8, curvature="exact"),
            "head": dict(r=0.1, alpha=0.8, mask=gnp.masks.by_path("head")),
            "masked": dict(r=0.1, alpha=0.8, mask=gnp.masks.by_path("head"), scope="masked"),
        }
        for name, options in forms.items():
            def gradient(loss):
                return gnp.value_and_grad(loss, **options) if options else jax.value_and_grad(loss)

            out = None, jax.tree.map(lambda w: w.sharding, sharded)
            step = jax.jit(gradient(loss), out_shardings=out)
            compiled = step.lower(sharded, *data).compile()
            value, grads = compiled(sharded, *data)
            check(grads, jax.jit(gradient(loss))(params, x, y)[1])
            text = compiled.as_text()
            print(name, len(re.findall(r" all-gather(?:-start)?\\(", text)))
        jax.jit(gnp.value_and_grad(watched, 0.1, 0.8)).lower(sharded, *data).compile()
        by_shape = {w.shape: w.sharding for w in jax.tree.leaves(sharded)}
        assert len(seen) >= 4
        for shape, sharding in seen:
            assert sharding.is_equivalent_to(by_shape[shape], len(shape)), (shape, sharding)
        """
    )
    gathers = {name: int(n) for name, n in re.findall(r"(\w+) (\d+)", out)}
    assert gathers["plain"] > 0
    assert gathers["all"] <= 2 * gathers["plain"]
    assert gathers["exact"] <= 2 * gathers["plain"]
    # The head's parameters are two of four, one of them in one piece on every device.
    assert gathers["head"] <= gathers["plain"] + 1
    assert gathers["masked"] <= gathers["plain"] + 1


def test_momentum_sam_on_sharded_parameters():
    """The numbers of one device, the memory sharded as the parameters, no parameter gathered."""
    run_on_eight_devices(
        """
        spec = {"body": {"kernel": P(None, "data"), "bias": P("data")},
                "head": {"kernel": P("data", None), "bias": P()}}
        is_spec = lambda s: isinstance(s, P)
        tx = optax.chain(gnp.momentum_sam(0.2), optax.adam(1e-2))

        @jax.jit
        def step(params, state, x, y):
            grads = jax.grad(loss)(gnp.perturbed(params, state), x, y)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        def run(params, x, y):
            state = jax.jit(tx.init)(params)
            for _ in range(3):
                params, state = step(params, state, x, y)
            return params, state

        sharded = jax.tree.map(lambda s, w: put(w, s), spec, params, is_leaf=is_spec)
        got, state = run(sharded, *put((x, y), P("data")))
        check(got, run(params, x, y)[0])
        kernel = state[0].momentum["body"]["kernel"]
        assert kernel.sharding.is_equivalent_to(sharded["body"]["kernel"].sharding, kernel.ndim)
        """
    )


@pytest.mark.exhaustive
def test_layers_whose_sharding_is_constrained_before_a_scan():
    """Among the devices, the layers that are perturbed are not divided evenly."""
    run_on_eight_devices(
        """
        jax.config.update("jax_enable_x64", True)
        mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
        rng = np.random.default_rng(0)
        kernel, head = (jnp.asarray(rng.normal(size=s)) for s in ((8, 16, 16), (16, 3)))
        params, x = {"kernel": kernel / 4, "head": head}, jnp.asarray(rng.normal(size=(256, 16)))
        mask = gnp.masks.stacked("^kernel", last=3) | gnp.masks.by_path("^head")

        def loss(params, of):
            kernel = params["kernel"]
            if of is not None:
                kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, of))
            h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, kernel)
            return jnp.mean((h @ params["head"]) ** 2)

        def gradient(params, spec):
            compute = gnp.value_and_grad(loss, 0.1, 0.7, mask=mask)
            return jax.jit(compute, static_argnums=1)(params, spec)

        expected = gradient(params, None)
        for spec in (P("a"), P(None, "b"), P(("a", "b"))):
            placed = {**params, "kernel": put_on(mesh, params["kernel"], spec)}
            check(gradient(placed, spec), expected)
            costs = [gnp.masks.cost(loss, params, mask, of=of) for of in (spec, None)]
            assert abs(costs[0] - costs[1]) < 0.03, costs
        """
    )
