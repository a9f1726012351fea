"""The parts of the comparison: optimizers, networks, checkpoints, and one idea that was tried."""

import dataclasses
import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import tiny

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data import datasets as data
from gnp_optax.experiments.data.loading import load
from gnp_optax.experiments.models.network import Network, model
from gnp_optax.experiments.recipes import RECIPES
from gnp_optax.experiments.training import optimizers
from gnp_optax.experiments.training.checkpoints import Checkpoint, pretrained
from gnp_optax.experiments.training.plain_statistics import plain_statistics
from gnp_optax.experiments.training.records import Records
from gnp_optax.experiments.training.steps import Kind, Scheduled, State
from gnp_optax.experiments.training.trainer import Trainer

TINY = dataclasses.replace(tiny.TINY, epochs=3)


def images(n, side, channels, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, side, side, channels)).astype(np.uint8)
    return data.Split(jnp.asarray(pixels), jnp.asarray(rng.integers(0, 10, n), jnp.int32))


@pytest.fixture(scope="module")
def digits():
    return tiny.digits()


@pytest.fixture(scope="module")
def trainer(digits):
    """Shared, for it has compiled already."""
    return Trainer(TINY, digits)


# Recipes and optimizers.


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_scales_its_warmup_with_its_length(name):
    recipe = RECIPES[name]
    assert recipe.of_epochs(recipe.epochs) == recipe
    longer = recipe.of_epochs(4 * recipe.epochs)
    assert longer.warmup_epochs == 4 * recipe.warmup_epochs
    assert recipe.of_epochs(1).warmup_epochs == 0


def test_the_papers_recipe():
    recipe = RECIPES["vit-s"]
    assert (recipe.epochs, recipe.warmup_epochs, recipe.batch_size) == (300, 40, 256)
    assert (recipe.learning_rate, recipe.weight_decay) == (1e-3, 0.3)
    assert (recipe.width, recipe.depth, recipe.heads, recipe.patch_size) == (384, 12, 6, 4)
    assert (recipe.r, recipe.alpha, recipe.dropout, recipe.class_token) == (0.1, 1.0, 0.1, True)


@pytest.mark.parametrize("warmup_steps", [0, 10, 85])
def test_the_learning_rate_falls_in_steps(warmup_steps):
    config = dataclasses.replace(TINY, decay="steps", learning_rate=1.0)
    schedule = optimizers.learning_rate(config, 90, warmup_steps)
    expected = [0.1 ** ((t >= 60) + (t >= 80)) for t in range(90)]
    for t in range(warmup_steps):
        expected[t] *= t / warmup_steps
    np.testing.assert_allclose([schedule(t) for t in range(90)], expected, rtol=1e-6)


def test_the_weight_decay_of_sgd_is_coupled_and_that_of_rmsprop_is_not():
    params, grads = {"w": jnp.array([2.0])}, {"w": jnp.array([1.0])}
    found = {}
    for name in ("sgd", "rmsprop"):
        config = dataclasses.replace(TINY, optimizer=name, weight_decay=0.5)
        optimizer = optimizers.optimizer(config, 0.1, config.weight_decay)
        first, state = optimizer.update(grads, optimizer.init(params), params)
        second, _ = optimizer.update(grads, state, params)
        found[name] = [float(updates["w"][0]) for updates in (first, second)]
    momentum = [2.0, 0.9 * 2.0 + 2.0]
    np.testing.assert_allclose(found["sgd"], [-0.1 * m for m in momentum], rtol=1e-5)
    rms = np.sqrt([0.1, 0.9 * 0.1 + 0.1])
    np.testing.assert_allclose(found["rmsprop"], [-0.1 * (1 / v + 1) for v in rms], rtol=1e-4)


def at(alpha):
    """What holds at a step: r = 0.1, and a learning rate."""
    return Scheduled(0.1, alpha, 0.1, 0.0, 0.0, False)


# Epochs.


@pytest.mark.exhaustive(but=["mlp"])
@pytest.mark.parametrize(
    ("name", "alpha"),
    [("mlp", [0.0, 0.8, 0.4, 0.8]), ("resnet", [0.8, 0.8, 0.8, 0.8])],
    ids=["mlp", "resnet"],
)
def test_an_epoch_is_its_steps_one_by_one(name, alpha):
    # Adam would divide what is nearly zero, and there the order of a sum decides.
    config = dataclasses.replace(TINY, model=name, width=4, optimizer="sgd")
    loaded = data.whole(
        images(70, 8, 3), images(8, 8, 3, seed=1), scale=255.0, mean=(0.5,), std=(0.2,)
    )
    loaded = loaded._replace(augmented=True)
    trainer = Trainer(config, loaded)
    numbers = np.asarray(alpha, np.float32)
    # r, alpha, learning rate, weight decay, label smoothing.
    scheduled = [numbers / 8, numbers, 0.01 + numbers / 9, numbers / 99, numbers / 4]
    scheduled = Scheduled(*scheduled, numbers > 0, 0 * numbers)
    params, statistics = jax.jit(trainer.network.init)(
        jax.random.key(0), data.Split(*(x[:1] for x in loaded.test))
    )
    opt_state = trainer.steps.optimizer(at(0.0), None).init(params)
    state = State(params, opt_state, jnp.zeros([], jnp.int32), jax.random.key(1), statistics)

    shuffle_key, key = jax.random.split(state.key)
    order = jax.random.permutation(shuffle_key, 70)[:64].reshape(4, 16)
    take = jax.jit(functools.partial(trainer.steps.take, kind=Kind()))
    losses, expected = [], state._replace(key=key)
    for i in range(4):
        augment_key, step_key = jax.random.split(jax.random.fold_in(key, i))
        chosen = data.Split(*(x[order[i]] for x in loaded.train))
        batch = chosen._replace(images=loaded.augment(augment_key, chosen.images))
        loss, _, expected = take(expected, batch, step_key, Scheduled(*(x[i] for x in scheduled)))
        losses.append(loss)

    found, mean_loss, _, _ = trainer.epochs.train(state, trainer.train, scheduled, Kind())
    np.testing.assert_allclose(mean_loss, np.mean(losses), rtol=1e-5)
    both = [x._replace(key=jax.random.key_data(x.key)) for x in (found, expected)]
    assert found.step == 4
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# Networks.


@pytest.mark.exhaustive
def test_batch_statistics_are_those_of_one_clean_pass():
    config = dataclasses.replace(TINY, model="resnet", width=4, epochs=1, warmup_epochs=0)
    loaded = data.whole(
        images(32, 8, 3), images(8, 8, 3, seed=1), scale=255.0, mean=(0.5,), std=(0.2,)
    )
    trainer = Trainer(config, loaded)
    state = trainer._fresh(0, None)
    batch = data.Split(*(x[:16] for x in loaded.train))
    key = jax.random.key(0)
    _, clean = trainer.network.loss(state.params, *batch, state.statistics, key)
    # One group of all examples is the batch.
    steps = dataclasses.replace(trainer.steps, config=dataclasses.replace(config, m=16))
    take = jax.jit(functools.partial(steps.take, kind=Kind()))
    _, _, after = take(state, batch, key, at(0.8))
    for a, b in zip(*map(jax.tree.leaves, (after.statistics, clean)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert np.isfinite(next(trainer.run("sam", [0]))[0]["test_loss"])


@pytest.mark.exhaustive
def test_a_class_token_is_the_only_token_that_reaches_the_head(digits):
    config = dataclasses.replace(TINY, class_token=True, head="normal", depth=1)
    network = Network(model(config, digits), digits)
    params, statistics = network.init(jax.random.key(0), data.Split(*(x[:1] for x in digits.test)))
    assert params["positions"].shape == (1, 5, 8)
    assert np.any(params["head"]["kernel"])
    assert not np.any(model_head(dataclasses.replace(config, head="zero"), digits))
    logits = network.logits(params, statistics, digits.test.images[:2])
    assert logits.shape == (2, 10)


def model_head(config, loaded):
    network = Network(model(config, loaded), loaded)
    example = data.Split(*(x[:1] for x in loaded.test))
    return network.init(jax.random.key(0), example)[0]["head"]["kernel"]


def test_layers_compute_in_bfloat16_and_parameters_stay_float32(digits):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    trainer = Trainer(config, digits)
    state = trainer._fresh(0, None)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    program = str(
        jax.make_jaxpr(trainer.network.loss)(
            state.params, *(x[:4] for x in digits.train), {}, jax.random.key(0)
        )
    )
    assert "bf16" in program


@pytest.mark.exhaustive
def test_a_transformer_learns_a_text_of_one_word(tmp_path):
    (tmp_path / "a.txt").write_text("flat minima " * 200)
    loaded = data.text(tmp_path, 16)
    assert loaded.classes == len(set("flat minima "))
    config = dataclasses.replace(
        TINY, dataset="text", model="gpt", length=16, learning_rate=0.02, probe_examples=16
    )
    trainer = Trainer(config, loaded)
    last = list(trainer.run("gr", [0]))[-1][0]
    assert last["test_error"] < 78  # the most frequent characters are 2 of 12
    ((plain,), *_) = trainer.run("plain", [0])
    assert set(plain["layer_norms"]) == {
        *("", "embedding", "norm", "block_0/norm_1", "block_0/norm_2", "block_0/mlp_in"),
        *("block_0/mlp_out", "block_0/attention/query", "block_0/attention/key"),
        *("block_0/attention/value", "block_0/attention/out"),
    }


def test_every_character_is_followed_by_its_label(tmp_path):
    text = "abcdefghij" * 10
    (tmp_path / "a.txt").write_text(text[:37])
    (tmp_path / "b.txt").write_text(text[37:])
    loaded = data.text(tmp_path, 4)
    both = [np.asarray(x).reshape(-1) for x in loaded.train]
    np.testing.assert_array_equal(both[0][1:], both[1][:-1])
    assert loaded.train.images.shape == (22, 4)  # of 90 characters, one of which follows
    assert loaded.test.images.shape == (2, 4)
    part = data.text(tmp_path, 4, (1, 2))
    np.testing.assert_array_equal(part.train.images, loaded.train.images[1::2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "needs --data-dir"),
        ("short", "too short"),
        ("".join(map(chr, range(32, 332))) * 9, "300 different characters"),
        (b"A byte of no text: \xff." * 9, r"a\.txt is no text in UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used(tmp_path, content, message):
    if content is not None:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.text(tmp_path, 16)


# Checkpoints.


@pytest.mark.exhaustive
def test_an_interrupted_run_goes_on_to_the_same_numbers(trainer, tmp_path, monkeypatch):
    method = "gr-lambda-warmup"
    config = dataclasses.replace(TINY, out=tmp_path, checkpoint_minutes=0)
    whole = list(trainer.run(method, [0]))
    run = trainer.run(method, [0], Checkpoint(config, method, [0]))
    next(run), next(run)
    run.close()
    trained, train = [], trainer.epochs.train
    counted = lambda *args, **kwargs: trained.append(1) or train(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(trainer.epochs, "train", counted)
    resumed = list(trainer.run(method, [0], Checkpoint(config, method, [0])))
    assert len(trained) == 1
    for (a,), (b,) in zip(whole, resumed, strict=True):
        for name in set(a) - {"seconds_per_step", "early"}:
            np.testing.assert_equal(a[name], b[name], name)


def test_the_selections_before_an_interruption_count(trainer, monkeypatch):
    """With two selections before it, and no more allowed, the last of these stays."""
    done = [[{"perturbed_layers": [name]}] for name in ("norm", "head")]
    config = dataclasses.replace(TINY, selections=2)
    monkeypatch.setattr(trainer, "config", config)
    kinds = []
    train = lambda _, __, ___, kind: kinds.append(kind) or stop()  # noqa: E731
    monkeypatch.setattr(trainer.epochs, "train", train)
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(
            trainer._epochs(
                config, "layerwise", Kind(), trainer._fresh(0, None), trainer.train, done
            )
        )
    assert kinds[0].mask.paths == ("head",)


def test_a_checkpoint_of_other_options_is_refused(trainer, tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path)
    state = trainer._fresh(0, None)
    Checkpoint(config, "gr", [0]).save(state, [])
    with pytest.raises(ValueError, match="was made with other options"):
        Checkpoint(dataclasses.replace(config, r=0.2), "gr", [0]).load(state)


def test_a_checkpoint_is_written_when_it_is_time(tmp_path):
    state = type("State", (), {})
    for minutes, expected in ((0.0, 2), (60.0, 0)):
        config = dataclasses.replace(TINY, out=tmp_path, checkpoint_minutes=minutes)
        checkpoint, saved = Checkpoint(config, "gr", [0]), []
        checkpoint.save = lambda *args, saved=saved: saved.append(args)
        for _ in range(2):
            checkpoint.keep(state, [])
        assert len(saved) == expected


# Fine-tuning.


@pytest.mark.exhaustive
def test_fine_tuning_starts_from_what_was_learned_with_a_new_head(digits, tmp_path):
    config = dataclasses.replace(
        TINY, out=tmp_path, epochs=1, warmup_epochs=0, keep_parameters=True, head="normal"
    )
    trainer = Trainer(config, digits)
    list(trainer.run("plain", [0]))
    path = tmp_path / "plain-0-parameters.msgpack"
    fresh = trainer._fresh(1, None)
    start = pretrained(path, fresh)
    for name, layer in start.params.items():
        for a, b in zip(*map(jax.tree.leaves, (layer, fresh.params[name])), strict=True):
            assert np.array_equal(a, b) == (name == "head" or not np.any(a)), name
    few = data.of_classes(digits, (7, 3, 1, 4))
    tuned = Trainer(dataclasses.replace(config, pretrained=path, learning_rate=1e-9), few)
    assert tuned.model.classes == 4
    norms = [next(t.run("plain", [0]))[0]["layer_norms"] for t in (tuned, trainer)]
    assert set(norms[0]) == set(norms[1])
    other = Trainer(dataclasses.replace(config, pretrained=path, width=16), digits)
    with pytest.raises(ValueError, match="holds the parameters of another model"):
        next(other.run("plain", [0]))[0]
    with pytest.raises(FileNotFoundError, match="--pretrained: there is no file"):
        pretrained(tmp_path / "none", fresh)


def test_some_classes_are_numbered_anew(digits):
    few = data.of_classes(digits, (7, 3))
    kept = np.isin(digits.train.labels, (7, 3))
    np.testing.assert_array_equal(few.train.images, digits.train.images[kept])
    expected = (np.asarray(digits.train.labels)[kept] == 3).astype(int)
    np.testing.assert_array_equal(few.train.labels, expected)
    with pytest.raises(ValueError, match="--classes must be some of 0 to 9"):
        data.of_classes(digits, (3, 10))


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_diverged_run_is_never_kept(trainer, tmp_path, monkeypatch, epoch):
    def diverging(config, method, kind, state, train, done):
        for i in range(len(done), TINY.epochs):
            yield {"train_loss": float("nan") if i == epoch else 1.0, "early": {}}, state

    monkeypatch.setattr(trainer, "_epochs", diverging)
    config = dataclasses.replace(TINY, out=tmp_path, checkpoint_minutes=0)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="gr, seed 0: the loss is not finite"):
            list(trainer.run("gr", [0], Checkpoint(config, "gr", [0])))


@pytest.mark.parametrize("damage", ["empty", "bit", "cut", "another type"])
def test_a_damaged_checkpoint_is_set_aside_and_never_trained_on(trainer, tmp_path, damage):
    checkpoint = Checkpoint(dataclasses.replace(TINY, out=tmp_path), "gr", [0])
    fresh = trainer._fresh(0, None)
    checkpoint.save(trainer._fresh(1, None), [[{"epoch": 1}]])
    whole = checkpoint.path.read_bytes()
    random = np.random.default_rng(0)
    for i in range(10):
        content = bytearray(whole)
        content[random.integers(len(whole))] ^= 1 << int(random.integers(8))
        content = {
            "empty": b"",
            "bit": bytes(content),
            "cut": whole[: random.integers(1, len(whole))],
            "another type": flax.serialization.msgpack_serialize(3),
        }[damage]
        checkpoint.path.write_bytes(content)
        with pytest.warns(UserWarning, match=r"gr-seeds-0\.msgpack is damaged.*begins anew"):
            state, done = checkpoint.load(fresh)
        assert state is fresh
        assert done == []
        aside = checkpoint.path.with_name(f"gr-seeds-0.msgpack.damaged-{i}")
        assert aside.read_bytes() == content
        assert not checkpoint.path.exists()


def test_parameters_are_kept_where_a_run_ended_before_it_could(trainer, tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, out=tmp_path, keep_parameters=True, checkpoint_minutes=0)
    monkeypatch.setattr(trainer, "config", config)
    run = lambda: list(trainer.run("gr", [0], Checkpoint(config, "gr", [0])))  # noqa: E731
    first, path = run(), tmp_path / "gr-0-parameters.msgpack"
    kept = path.read_bytes()
    path.unlink()
    assert len(run()) == len(first)
    assert path.read_bytes() == kept


def test_parameters_of_another_file_are_refused(trainer, tmp_path):
    checkpoint = Checkpoint(dataclasses.replace(TINY, out=tmp_path), "gr", [0])
    checkpoint.save(trainer._fresh(0, None), [])
    with pytest.raises(ValueError, match="was not written by --keep-parameters"):
        pretrained(checkpoint.path, trainer._fresh(0, None))


def test_options_on_file_are_those_of_the_same_command(tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path, classes=(3, 7))
    Records(config)
    assert Records(config).runs == {}


def test_another_text_in_the_same_folder_is_another_run(tmp_path):
    found = []
    for text in ("one", "another"):
        (tmp_path / "a.txt").write_text(text)
        found.append(Config(dataset="text", model="gpt", data_dir=tmp_path).options)
    assert found[0] != found[1]


def test_processes_share_the_examples_that_one_would_take(monkeypatch):
    config = dataclasses.replace(TINY, classes=(0, 1), train_examples=50)
    whole = load(config, (0, 1)).train
    assert len(whole.labels) == 50
    assert set(whole.labels.tolist()) == {0, 1}
    for i in range(2):
        part = load(config, (i, 2)).train
        np.testing.assert_array_equal(part.images, whole.images[i::2])


# Steps.


@pytest.mark.exhaustive
def test_every_group_drops_its_own_units(digits):
    """Of two identical groups; with one key for both they would give what one gives."""
    config = dataclasses.replace(TINY, dropout=0.5, head="normal")
    trainer = Trainer(config, digits)
    state, key = trainer._fresh(0, None), jax.random.key(0)
    half = data.Split(*(x[:8] for x in digits.train))
    twice = data.Split(*(jnp.concatenate([x, x]) for x in half))
    steps = dataclasses.replace(trainer.steps, config=dataclasses.replace(config, m=8))
    take = jax.jit(functools.partial(steps.take, kind=Kind()))
    grads = [take(state, batch, key, at(0.0))[1] for batch in (half, twice)]
    kernels = [g["block_0"]["mlp_out"]["kernel"] for g in grads]
    assert not np.allclose(*kernels, rtol=0.1)


# Epochs.


@pytest.mark.parametrize(
    ("together", "expected"),
    [
        (False, {"plain": 0.0, "gr": 0.8, "gr-lambda-warmup": None, "sam": 1.0}),
        (True, {"plain": 0.0, "gr": None, "gr-lambda-warmup": None, "sam": None}),
    ],
)
def test_a_weight_that_stays_the_same_is_compiled_as_a_constant(
    digits, together, expected, monkeypatch
):
    trainer = Trainer(dataclasses.replace(TINY, seeds_together=together), digits)
    compile = lambda inputs, kind: kinds.append(kind) or (lambda *args: stop())  # noqa: E731
    monkeypatch.setattr(trainer.epochs, "_compile", compile)
    for method, alpha in expected.items():
        kinds = []
        with pytest.raises(RuntimeError, match="StopIteration"):
            next(trainer.run(method, [0]))
        assert kinds[0].alpha == (None if alpha is None else float(np.float32(alpha)))


def stop():
    raise StopIteration


# Early statistics.


def test_early_statistics_are_those_of_the_steps_after_the_gradient(trainer, digits):
    state = trainer._fresh(0, None)
    # Weight 0 at the first step.
    early = next(trainer.run("gr-lambda-warmup", [0]))[0]["early"]
    assert {len(x) for x in early.values()} == {4}
    shuffle_key, key = jax.random.split(state.key)
    order = jax.random.permutation(shuffle_key, 64)[:16]
    _, dropout_key = jax.random.split(jax.random.fold_in(key, 0))
    batch = [x[order] for x in digits.train]
    gradient = jax.jit(jax.grad(trainer.network.loss, has_aux=True))
    grads = gradient(state.params, *batch, {}, dropout_key)[0]
    squares = np.concatenate([np.ravel(np.asarray(g, float) ** 2) for g in jax.tree.leaves(grads)])
    norm = np.sqrt(squares.sum())
    np.testing.assert_allclose(early["gradient_norm"][0], norm, rtol=1e-4)
    clipped = squares * min(1, TINY.clip_norm / norm) ** 2
    np.testing.assert_allclose(
        early["second_moment_norm"][0], 1e-3 * np.linalg.norm(clipped), rtol=1e-4
    )


# The idea that was tried.


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_plain_statistics_are_adam_with_the_second_moment_of_another_gradient(name):
    rng = np.random.default_rng(0)
    if name == "adam":
        optimizer, decays = optax.adam(0.1), (0.9, 0.999)
    else:
        optimizer, decays = optax.rmsprop(0.1, decay=0.9), (0.0, 0.9)
    tx = plain_statistics(optimizer)
    params = {"w": jnp.ones(5)}
    state, m, v = tx.init(params), np.zeros(5), np.zeros(5)
    for t in range(1, 5):
        plain, regularized = rng.normal(size=(2, 5))
        updates, state = jax.jit(tx.update)(
            {"w": jnp.asarray(regularized)}, state, params, plain_gradient={"w": jnp.asarray(plain)}
        )
        m = decays[0] * m + (1 - decays[0]) * regularized
        v = decays[1] * v + (1 - decays[1]) * plain**2
        if name == "adam":
            expected = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        else:
            expected = m / np.sqrt(v + 1e-8)
        np.testing.assert_allclose(updates["w"], -0.1 * expected, rtol=2e-3)


def test_plain_statistics_need_the_plain_gradient():
    params = {"w": jnp.ones(2)}
    tx = plain_statistics(optax.adam(0.1))
    with pytest.raises(TypeError, match="plain_gradient=grads"):
        tx.update(params, tx.init(params), params)
