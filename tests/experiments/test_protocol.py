"""What a result needs: splits, wrong labels, seeds together, controls, calibration, the sweep."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import tiny

import gnp_optax as gnp
from gnp_optax.experiments import __main__
from gnp_optax.experiments.compare import compare
from gnp_optax.experiments.data import datasets
from gnp_optax.experiments.measure.sweep import SweepConfig
from gnp_optax.experiments.report import summary
from gnp_optax.experiments.training.evaluation import rounded_weights
from gnp_optax.experiments.training.steps import Scheduled
from gnp_optax.experiments.training.trainer import Trainer

MLP = dataclasses.replace(
    tiny.TINY, model="mlp", depth=3, label_noise=0.3, seeds_together=True, probe_examples=16
)


@pytest.fixture(scope="module")
def small():
    return datasets.set_apart(tiny.digits(), 16)


# Data.


def test_validation_examples_are_of_the_training_set_always_the_same_and_clean():
    whole = datasets.digits()
    found = datasets.set_apart(whole, 240)
    again = datasets.set_apart(whole, 240)
    assert len(found.train.labels) == len(whole.train.labels) - 240
    for a, b in zip(found.validation, again.validation, strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [
        {row.tobytes() for row in np.asarray(s.images)} for s in (found.train, found.validation)
    ]
    original = {row.tobytes() for row in np.asarray(whole.train.images)}
    assert rows[0] | rows[1] == original
    with pytest.raises(ValueError, match="--validation-examples must be fewer than 64, got 64"):
        datasets.set_apart(tiny.digits(), 64)


def test_labels_are_replaced_by_other_classes_in_a_pattern_for_each_seed():
    labels, numbers = jnp.arange(20_000) % 10, jnp.arange(20_000)
    patterns = [datasets.noisy(labels, numbers, seed, 0.3, 10) for seed in (0, 0, 1)]
    changed = [np.asarray(p != labels) for p in patterns]
    np.testing.assert_array_equal(patterns[0], patterns[1])
    assert 0.25 < np.mean(changed[0] & changed[2]) / np.mean(changed[0]) < 0.35
    assert abs(changed[0].mean() - 0.3) < 0.01
    wrong = np.asarray((patterns[0] - labels) % 10)[changed[0]]
    counts = np.bincount(wrong, minlength=10)
    assert counts[0] == 0
    assert counts[1:].min() > 0.8 * counts[1:].mean()
    # By the number of the example, not by its place.
    part = datasets.noisy(labels[3::7], numbers[3::7], 0, 0.3, 10)
    np.testing.assert_array_equal(part, patterns[0][3::7])


def test_images_are_halved_by_means():
    images = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    split = datasets.Split(jnp.asarray(images), jnp.zeros(2, jnp.int32))
    found = datasets.halved(datasets.whole(split, split, mean=(0.5,)), 16)
    assert found.train.images.shape == (2, 16, 16, 3)
    expected = images[:, :2, :2].astype(float).mean((1, 2)).round()
    np.testing.assert_array_equal(found.test.images[:, 0, 0], expected)


# Training.


@pytest.mark.exhaustive(but=["gr-lambda-warmup"])
@pytest.mark.parametrize("method", ["gr-lambda-warmup", "layerwise-last-1"])
def test_seeds_together_are_those_one_by_one(small, method):
    together = Trainer(MLP, small)
    alone = Trainer(dataclasses.replace(MLP, seeds_together=False), small)
    groups = list(together.run(method, [3, 5]))
    for i, seed in enumerate((3, 5)):
        for each, (single,) in zip(groups, alone.run(method, [seed]), strict=True):
            assert each[i]["seed"] == seed
            for name in ("train_loss", "gradient_norm", "test_loss", "validation_error"):
                np.testing.assert_allclose(each[i][name], single[name], rtol=1e-4)
            norms = (x["early"].get("gradient_norm", []) for x in (each[i], single))
            np.testing.assert_allclose(*norms, rtol=1e-3)


def test_training_sees_the_wrong_labels_of_its_seed(small):
    trainer = Trainer(dataclasses.replace(MLP, seeds_together=False), small)
    trainer.epochs.train = lambda state, train, *_, **__: seen.append(train.labels) or 1 / 0
    seen = []
    for seed in (0, 1):
        with pytest.raises(ZeroDivisionError):
            next(trainer.run("plain", [seed]))
    numbers = jnp.arange(len(small.train.labels))
    for seed, labels in enumerate(seen):
        expected = datasets.noisy(small.train.labels, numbers, seed, 0.3, 10)
        np.testing.assert_array_equal(labels[0], expected)
    assert not np.array_equal(*seen)


def test_methods_have_options_of_their_own(small):
    config = dataclasses.replace(
        MLP,
        methods=("plain", "plain-weight-decay", "plain-label-smoothing", "plain-twice", "sam"),
        settings=("plain-weight-decay:weight_decay=0.9", "sam:r=0.4"),
    )
    trainer = Trainer(config, small)
    held = {m: trainer._schedule(config.own(m), m) for m in config.methods}
    assert {float(x.weight_decay[0]) for x in held.values()} == {
        np.float32(config.weight_decay),
        np.float32(0.9),
    }
    assert held["plain-weight-decay"].weight_decay[0] == np.float32(0.9)
    assert held["plain-label-smoothing"].label_smoothing[0] == np.float32(0.1)
    assert held["sam"].r[0] == np.float32(0.4)
    assert len(held["plain-twice"].r) == 2 * len(held["plain"].r)


def test_smoothed_labels_are_a_mixture_with_the_uniform_distribution(small):
    network = Trainer(MLP, small).network
    params, _ = network.init(jax.random.key(0), small.test)
    batch, key = small.train, jax.random.key(0)
    logits = network.logits(params, {}, batch.images)
    target = 0.9 * jax.nn.one_hot(batch.labels, 10) + 0.1 / 10
    expected = -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits), -1))
    found, _ = network.loss(params, *batch, {}, key, 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.exhaustive(but=["layerwise-last-2-expected1"])
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("layerwise-last-1", {"block_2/dense", "block_2/norm", "head"}),
        (
            "layerwise-last-2",
            {"block_1/dense", "block_1/norm", "block_2/dense", "block_2/norm", "head"},
        ),
        ("layerwise-first-1", {"block_0/dense", "block_0/norm"}),
    ],
)
def test_layers_from_one_end_of_the_network(small, method, expected):
    config = dataclasses.replace(MLP, epochs=1, warmup_epochs=0)
    for each in Trainer(config, small).run(method, [0, 1]):
        assert set(each[0]["perturbed_layers"]) == expected


@pytest.mark.exhaustive
def test_as_many_last_layers_as_the_budget_allows(small):
    trainer = Trainer(dataclasses.replace(MLP, budget=1.5, epochs=1, warmup_epochs=0), small)
    ((each, _),) = trainer.run("layerwise-last", [0, 1])
    taken = {name.partition("/")[0] for name in each["perturbed_layers"]}
    blocks = [f"block_{i}" for i in range(MLP.depth)]
    assert taken == {*blocks[len(blocks) + 1 - len(taken) :], "head"}
    more = [*each["perturbed_layers"]]
    more += [f"{blocks[len(blocks) - len(taken)]}/{name}" for name in ("dense", "norm")]
    costs = [
        trainer._cost_of(gnp.masks.layers(*x), "masked") for x in (each["perturbed_layers"], more)
    ]
    assert costs[0] <= 1.5 < costs[1]
    assert each["gradients_per_step"] == pytest.approx(costs[0])
    greedy = Trainer(dataclasses.replace(MLP, budget=1.01, epochs=1, warmup_epochs=0), small)
    with pytest.raises(ValueError, match=r"Not even the head fits into --budget 1\.01"):
        next(greedy.run("layerwise-last", [0]))


# One gradient a step.


def perturbed_by_hand(trainer, state, decays, late):
    """The parameters after each step of an epoch: perturbed along a mean, and along what is fresh.

    `decays` has how much of the mean is kept, and `late` which layers are perturbed afresh.
    """
    config, network = trainer.config, trainer.network
    scheduled = trainer._schedule(config, "plain")
    shuffle_key, key = jax.random.split(state.key)
    order = np.asarray(jax.random.permutation(shuffle_key, trainer.train.labels.shape[1]))
    mask = jax.tree.map(float, late(state.params))
    params, memory = state.params, jax.tree.map(jnp.zeros_like, state.params)
    opt_state = trainer.steps.optimizer(Scheduled._make([0.0] * len(Scheduled._fields)), None).init(
        params
    )

    def scaled(tree):
        norm = optax.tree.norm(tree)
        return jax.tree.map(lambda x: config.r * x / (norm if norm else 1), tree)

    for t in range(trainer.steps_per_epoch):
        batch = order[t * config.batch_size : (t + 1) * config.batch_size]
        examples = (trainer.train.images[0][batch], trainer.train.labels[0][batch])

        def grad(params, examples=examples):
            return jax.grad(lambda p: network.loss(p, *examples, {}, key)[0])(params)

        rest = jax.tree.map(lambda m, x: (1 - m) * x, mask, memory)
        there = jax.tree.map(jnp.add, params, scaled(rest))
        fresh = jax.tree.map(jnp.multiply, mask, grad(there))
        grads = grad(jax.tree.map(jnp.add, there, scaled(fresh)))
        memory = jax.tree.map(lambda m, g: decays * m + (1 - decays) * g, memory, grads)
        at = Scheduled(*(x[t] for x in scheduled))
        updates, opt_state = trainer.steps.optimizer(at, None).update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("method", "decay", "late"),
    [
        ("momentum-sam", 0.9, gnp.masks.by_path("^none")),
        ("stale-sam", 0.0, gnp.masks.by_path("^none")),
        ("hybrid-sam", 0.0, gnp.masks.by_path("^head")),
    ],
)
def test_a_method_with_a_memory_is_the_loop_written_by_hand(small, method, decay, late):
    config = dataclasses.replace(
        MLP,
        seeds_together=False,
        label_noise=0.0,
        budget=1.1,
        r=0.3,
        warmup_epochs=0,
        optimizer="sgd",
        learning_rate=0.1,
        width=32,  # of two units normalisation would leave the signs alone
    )
    trainer = Trainer(config, small)
    kind = trainer._kind(config, method)
    start = trainer._fresh(0, kind.memory)
    scheduled = Scheduled(
        *(x[: trainer.steps_per_epoch] for x in trainer._schedule(config, method))
    )
    state, *_ = trainer.epochs.train(start, trainer.train, scheduled, kind)
    expected = perturbed_by_hand(trainer, start, decay, late)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), state.params, expected
    )


# Measurements.


def test_weights_are_rounded_to_15_values_in_every_output_channel():
    w = jax.random.normal(jax.random.key(0), (50, 3)) * jnp.array([1.0, 10.0, 0.0])
    found = rounded_weights({"kernel": w, "bias": w[0]}, 4)
    np.testing.assert_array_equal(found["bias"], w[0])
    largest = jnp.abs(w).max(0)
    steps = np.asarray(found["kernel"] / jnp.where(largest == 0, 1, largest) * 7)
    np.testing.assert_allclose(steps, steps.round(), atol=1e-4)
    assert set(np.abs(steps).max(0).round().tolist()) == {7.0, 0.0}
    np.testing.assert_allclose(found["kernel"], w, atol=float(largest.max()) / 14 * 1.001)


def test_calibration_is_confidence_beside_accuracy_in_15_bins(small):
    trainer = Trainer(dataclasses.replace(MLP, seeds_together=False, label_noise=0.0), small)
    state = trainer._fresh(0, None)
    found = trainer.evaluation.test(state, is_last=True)
    p = np.asarray(jax.nn.softmax(trainer.network.logits(state.params, {}, small.test.images)))
    confidence, correct = p.max(1), p.argmax(1) == np.asarray(small.test.labels)
    expected = 0.0
    for i in range(15):
        inside = (confidence >= i / 15) & (confidence < (i + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    np.testing.assert_allclose(found["ece"], 100 * expected, rtol=1e-4)
    np.testing.assert_allclose(found["test_error"], 100 * (1 - correct.mean()), rtol=1e-6)
    low = rounded_weights(state.params, 4)
    wrong = trainer.network.logits(low, {}, small.test.images).argmax(-1) != small.test.labels
    np.testing.assert_allclose(found["error_4bit"], 100 * wrong.mean(), rtol=1e-6)


# Summaries.


def runs_of(errors):
    """Runs whose last epoch has these test errors by method; validation errors are the same."""
    shared = dict.fromkeys(
        [
            *("test_loss", "train_loss", "ece", "error_4bit", "gradient_norm", "sharpness"),
            *("gradients_per_step", "seconds_per_step"),
        ],
        1.0,
    )
    return {
        (method, seed): [
            {**shared, "test_error": e + 5, "validation_error": e - 1, "validation_loss": 3.0},
            {**shared, "test_error": e, "validation_error": e, "validation_loss": 2.0},
        ]
        for method, each in errors.items()
        for seed, e in enumerate(each)
    }


def test_differences_are_to_the_best_plain_run_and_paired_by_seed():
    errors = {
        "plain": [20.0, 22.0, 24.0],
        "plain-weight-decay": [10.0, 14.0, 12.0],
        "sam": [8.0, 12.5, 10.0],
        "gr": [11.0, 13.0, 12.5],
    }
    found = {row["method"]: row for row in summary.of(runs_of(errors))}
    assert list(found) == ["sam", "plain-weight-decay", "gr", "plain"]
    pairs = np.subtract(errors["sam"], errors["plain-weight-decay"])
    assert found["sam"]["difference"] == pytest.approx(pairs.mean())
    assert found["sam"]["difference_standard_error"] == pytest.approx(pairs.std(ddof=1) / 3**0.5)
    assert found["plain-weight-decay"]["is_reference"]
    # The first epoch is the better one on the validation examples.
    assert found["sam"]["best_epoch_error"] == pytest.approx(np.mean(errors["sam"]) + 5)
    assert found["sam"]["best_epoch_loss"] == 1
    said = summary.sentence(list(found.values()))
    assert "best plain run (plain, weight decay)" in said
    assert "err less: SAM by 1.8; more: plain by 10.0; as much, to the noise: GR." in said


def test_epochs_are_kept_in_a_small_table():
    runs = runs_of({"plain": [20.0, 22.0]})
    runs["plain", 0][0]["test_error"] = float("nan")
    for (_, seed), run in runs.items():
        for i, epoch in enumerate(run):
            epoch |= {"method": "plain", "seed": seed, "epoch": i + 1}
    rows = gzip.decompress(summary.epochs(runs)).decode().splitlines()
    assert rows[0].startswith("method,seed,epoch,test_error,validation_error")
    assert [row.split(",")[:5] for row in rows[1:]] == [
        ["plain", "0", "2", "20", "20"],
        ["plain", "1", "1", "27", "21"],
        ["plain", "1", "2", "22", "22"],
    ]


def test_several_comparisons_are_drawn_along_an_option(tmp_path, capsys):
    for noise, errors in ((0.0, [1.0, 2.0]), (0.3, [4.0, 6.0])):
        folder = tmp_path / f"{noise}"
        folder.mkdir()
        rows = summary.of(runs_of({"plain": [10.0, 11.0], "sam": errors}))
        (folder / "summary.json").write_text(json.dumps(rows))
        (folder / "runs.jsonl").write_text(json.dumps({"options": {"label_noise": noise}}) + "\n")
    folders = [str(tmp_path / "0.3"), str(tmp_path / "0.0")]
    __main__.main(["curve", *folders, "--out", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "| test_error by label_noise | 0 " in shown
    assert "1.50 (-9.00 +- 0.00)" in shown
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    epochs = [
        {**epoch, "method": method, "seed": seed, "epoch": i}
        for (method, seed), run in runs_of({"plain": [10.0, 11.0], "sam": [1.0, 2.0]}).items()
        for i, epoch in enumerate(run, start=1)
    ]
    with (tmp_path / "0.3" / "runs.jsonl").open("a") as file:
        file.writelines(json.dumps(epoch) + "\n" for epoch in epochs)
    __main__.main(["curve", folders[0], "--epoch", "1", "--out", str(tmp_path / "out")])
    assert "15.50 (best plain)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--metric: 'loss' is not known"):
        __main__.main(["curve", *folders, "--metric", "loss"])
    with pytest.raises(SystemExit, match="has tests after the epochs 1, 2"):
        __main__.main(["curve", folders[0], "--epoch", "7"])
    with pytest.raises(SystemExit, match="is no number among the options"):
        __main__.main(["curve", *folders, "--over", "width"])
    with pytest.raises(SystemExit, match="not the folder of a finished comparison"):
        __main__.main(["curve", str(tmp_path)])


def test_without_several_seeds_nothing_is_said_of_differences():
    assert "can be told where" in summary.sentence(summary.of(runs_of({"plain": [1.0]})))


# Commands.


def test_a_comparison_of_seeds_together_goes_on(tmp_path, monkeypatch):
    loaded = tiny.digits()
    monkeypatch.setattr(datasets, "digits", lambda part: loaded)
    config = dataclasses.replace(
        MLP, methods=("plain", "sam"), validation_examples=16, out=tmp_path, checkpoint_minutes=0
    )
    run = Trainer.run

    def interrupted(self, method, seeds, checkpoint):
        epochs = run(self, method, seeds, checkpoint)
        yield next(epochs)
        if method == "sam":
            raise KeyboardInterrupt
        yield from epochs

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    assert [path.name for path in tmp_path.glob("*.msgpack")] == ["sam-seeds-0-1.msgpack"]
    text = compare(config)
    other = dataclasses.replace(config, out=tmp_path / "whole")
    without_time = [row.rpartition("|")[0].rpartition("|")[0] for row in text.splitlines()]
    whole = compare(other).splitlines()
    assert without_time == [row.rpartition("|")[0].rpartition("|")[0] for row in whole]
    assert not list(tmp_path.glob("*.msgpack"))


@pytest.mark.parametrize("line", ["?", "[]", "3", "{}"])
def test_a_damaged_line_of_a_sweep_is_named(tmp_path, line):
    (tmp_path / "sweep.jsonl").write_text('{"options": {}, "seeds": 1}\n' + line + "\n")
    with pytest.raises(SystemExit, match=r"error: .*sweep\.jsonl, line 2, is damaged"):
        __main__.main(["sweep", "--out", str(tmp_path)])


def test_another_digit_in_a_sweep_is_seen(tmp_path, monkeypatch):
    run = lambda *_, **__: iter([[{"validation_error": 12.5}] * 3])  # noqa: E731
    monkeypatch.setattr(Trainer, "run", run)
    args = ["sweep", "--methods", "plain", "--out", str(tmp_path)]
    __main__.main(args)
    path = tmp_path / "sweep.jsonl"
    path.write_text(path.read_text().replace("12.5", "12.4", 1))
    with pytest.raises(SystemExit, match=r"error: .*sweep\.jsonl, line 2, is damaged"):
        __main__.main(args)


def test_a_sweep_gives_every_method_as_many_settings():
    config = SweepConfig()
    sizes = {
        method: len(list(config.grid(method, 1e-3)))
        for method in ("plain", "plain-twice", "plain-label-smoothing", "sam", "layerwise-last")
    }
    assert set(sizes.values()) == {len(config.radii) * len(config.weight_decays)}
    with pytest.raises(ValueError, match="the same number"):
        SweepConfig(radii=(0.1,))


def test_a_sweep_chooses_by_validation_error_and_goes_on(tmp_path, monkeypatch, capsys):
    tried = []

    def run(self, method, seeds, settings):
        tried.append((method, settings))
        error = 10 * abs(settings.get("r", 0.2) - 0.2) + settings["weight_decay"]
        yield [{"validation_error": 90.0, "test_error": -error} for _ in seeds]
        yield [{"validation_error": error, "test_error": -error} for _ in seeds]

    monkeypatch.setattr(Trainer, "run", run)
    args = ["sweep", "--methods", "sam", "--radii", "0.1", "0.2", "--learning-rates", "1", "2"]
    args += ["--smoothings", "0.1", "0.2", "--weight-decays", "0.5", "1", "--out", str(tmp_path)]
    __main__.main(args)
    shown = capsys.readouterr().out
    assert "--learning-rate 1 --settings plain-weight-decay:weight_decay=0.5" in shown
    assert "sam:r=0.2 sam:weight_decay=0.5" in shown
    assert len(tried) == 8
    path = tmp_path / "sweep.jsonl"
    assert len(path.read_text().splitlines()) == 9
    assert "test_error" not in path.read_text()
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
    __main__.main(args)
    assert len(tried) == 9
    with pytest.raises(SystemExit, match="was made with other options"):
        __main__.main([*args, "--seeds", "1"])
