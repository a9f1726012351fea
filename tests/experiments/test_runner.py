"""The comparison: options, records, and whole runs against a training loop written by hand."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple, get_args

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import tiny
from models.tiny import TINY
from PIL import Image

import gnp_optax as gnp
from gnp_optax.experiments import __main__
from gnp_optax.experiments.compare import compare, parse
from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data import datasets as data
from gnp_optax.experiments.methods import STANDARD, Method, regularization, selection
from gnp_optax.experiments.recipes import RECIPES
from gnp_optax.experiments.report import drawing, figures, summary
from gnp_optax.experiments.report import table as report
from gnp_optax.experiments.training.checkpoints import remove_finished
from gnp_optax.experiments.training.records import Records, held
from gnp_optax.experiments.training.trainer import Trainer

METHODS = STANDARD
STEPS_PER_EPOCH = 4
METRICS = {
    *("method", "seed", "epoch", "train_loss", "test_error", "gradient_norm", "sharpness"),
    *("gradients_per_step", "seconds_per_step", "perturbed_layers"),
    *("test_loss", "layer_norms", "early", "ece", "error_4bit"),
    *("validation_error", "validation_loss"),
}


@pytest.fixture(scope="module")
def small():
    return tiny.digits()


@pytest.fixture(scope="module")
def trainer(small):
    return Trainer(TINY, small)


@pytest.fixture(scope="module")
def finished(small, trainer, tmp_path_factory):
    """The configuration and the table of one uninterrupted comparison of everything."""
    config = dataclasses.replace(TINY, out=tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "digits", lambda part: small)
        patch.setattr("gnp_optax.experiments.compare.Trainer", lambda *_: trainer)
        return config, compare(config)


def lines(config):
    texts = (config.folder / "runs.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "checksum"} for x in texts]


def without_times(epochs):
    return [{k: v for k, v in epoch.items() if k != "seconds_per_step"} for epoch in epochs]


def formulas(method, config, steps, warmup_steps):
    """The documented radius and weight of every step."""
    t = np.arange(steps)
    ramp = np.minimum(1, t / warmup_steps) if warmup_steps else np.ones(steps)
    r, alpha = np.full(steps, config.r), np.full(steps, config.alpha)
    return {
        **{name: (r, 0.0 * t) for name in get_args(Method) if name.startswith("plain")},
        "gr-r-warmup": (r * ramp, alpha),
        "gr-lambda-warmup": (r, alpha * ramp),
        "gr-zero-warmup": (r, alpha * (t >= warmup_steps)),
        "gr-after-warmup": (
            r * np.clip(t / warmup_steps - 1, 0, 1) if warmup_steps else r,
            alpha * (t >= warmup_steps),
        ),
        "sam": (r, np.ones(steps)),
        "sam-every-2": (r, 1.0 * (t % 2 == 0)),
        "hybrid-sam": (r, np.ones(steps)),
        **dict.fromkeys(("momentum-sam", "stale-sam"), (r, np.zeros(steps))),
        "sam-every-5": (r, 1.0 * (t % 5 == 0)),
        "sam-last-quarter": (r, 1.0 * (t >= steps * 3 // 4)),
    }.get(method, (r, alpha))


# Options.


@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("method", get_args(Method))
def test_a_method_has_its_documented_radius_and_weight(method, warmup_steps):
    expected = np.stack(formulas(method, TINY, 10, warmup_steps), axis=1)
    found = regularization(method, TINY.r, TINY.alpha, 10, warmup_steps)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("gr", None),
        ("layerwise", ("norm", 3, 1.5)),
        ("layerwise-8", ("norm", 8, None)),
        ("layerwise-budget", ("norm", None, 1.5)),
        ("layerwise-last", ("last", None, 1.5)),
        ("layerwise-last-2", ("last", 2, None)),
        ("layerwise-first-1", ("first", 1, None)),
        ("momentum-sam", None),
        ("hybrid-sam", ("last", None, 1.5)),
    ],
)
def test_a_layerwise_method_has_its_number_of_layers_and_budget(method, expected):
    assert selection(method, layers=3, budget=1.5) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({name: 0}, "--.* must be positive, got 0")
            for name in ("seeds", "epochs", "r", "width")
        ),
        *(({name: -1}, "must be positive") for name in ("learning_rate", "clip_norm", "layers")),
        ({"probe_examples": 0}, "--probe-examples must be positive"),
        ({"alpha": -0.1}, "--alpha must not be negative"),
        ({"weight_decay": -0.1}, "--weight-decay must not be negative"),
        ({"alpha": float("nan")}, "--alpha must not be negative: nan"),
        ({"weight_decay": float("nan")}, "--weight-decay must not be negative: nan"),
        ({"r": float("inf")}, "--r must be positive, got inf"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive, got nan"),
        ({"dropout": 1.0}, "--dropout must lie in"),
        ({"dropout": float("nan")}, "--dropout must lie in"),
        ({"warmup_epochs": 30}, "--warmup-epochs must be less than --epochs"),
        ({"warmup_epochs": -1}, "--warmup-epochs must be less than --epochs"),
        ({"width": 32, "heads": 3}, "--width must be a multiple of --heads"),
        ({"methods": ()}, "--methods must be some of"),
        ({"methods": ("sam", "sam")}, "--methods must .* each of them once"),
        ({"methods": ("typo",)}, "--methods must be some of"),
        ({"data_dir": "somewhere"}, "--data-dir is for --dataset cifar10"),
        ({"methods": ("layerwise-budget",)}, "layerwise-budget needs --budget"),
        ({"m": 5}, "--m must divide --batch-size"),
        ({"model": "resnet", "dropout": 0.5}, "--dropout has no effect on .* --model resnet"),
        ({"model": "resnet", "class_token": True}, "--class-token has no effect"),
        ({"model": "resnet", "head": "normal"}, "--head normal has no effect"),
        ({"methods": ("gr-plain-statistics",), "optimizer": "sgd"}, "needs second moments"),
        ({"methods": ("gr-plain-statistics",), "m": 4}, "nor --m"),
        ({"train_examples": 0}, "--train-examples must be positive"),
        ({"label_noise": 0.95}, "--label-noise must lie in 0 to 0.9, got 0.95"),
        ({"label_noise": -0.1}, "--label-noise must lie in 0 to 0.9"),
        ({"label_smoothing": 1.0}, r"--label-smoothing must lie in \[0, 1\)"),
        ({"validation_examples": -1}, "--validation-examples must not be negative"),
        ({"image_size": 15}, "--image-size must be 16 or 8, got 15"),
        ({"image_size": 16}, "--image-size has no effect on --dataset digits"),
        ({"augment": False}, "--no-augment has no effect on --dataset digits"),
        ({"layer_norm": False}, "--no-layer-norm has no effect on .* --model vit"),
        ({"seeds_together": True, "distributed": True}, "--seeds-together is for one device"),
        ({"methods": ("layerwise-last",)}, "layerwise-last needs --budget"),
        ({"methods": ("plain-weight-decay",)}, "needs a weight decay of its own"),
        ({"settings": ("sam",)}, "'sam' is not of the form METHOD:OPTION=VALUE"),
        ({"settings": ("sam:batch_size=4",)}, "with one of the options r, alpha"),
        ({"settings": ("typo:r=1",)}, "'typo:r=1' is not of the form"),
        ({"settings": ("sam:r=big",)}, "'big' in 'sam:r=big' is no number"),
        ({"settings": ("sam:r=-1",)}, "--r must be positive"),
        ({"dataset": "text"}, "--dataset text and --model gpt belong together"),
        ({"coordinator": "host:1234"}, "--coordinator is for --distributed, which is missing"),
        ({"distributed": True, "processes": 2}, "give all or none: with --processes alone"),
    ],
)
def test_an_impossible_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_what_a_distributed_run_is_depends_on_the_devices_and_not_on_their_addresses():
    options = {"coordinator": "host:1", "processes": 2, "process_id": 1}
    recipes = [
        dataclasses.replace(TINY, distributed=distributed, **given).options
        for distributed, given in ((False, {}), (True, {}), (True, options))
    ]
    assert recipes[1] == recipes[2] == {**recipes[0], "devices": jax.device_count()}


def test_a_batch_larger_than_the_data_is_refused(small):
    with pytest.raises(ValueError, match="--batch-size exceeds the 64 examples"):
        Trainer(dataclasses.replace(TINY, batch_size=65), small)


@pytest.mark.parametrize("patch_size", [3, 16])
def test_a_patch_that_does_not_divide_the_image_is_refused(small, patch_size):
    with pytest.raises(ValueError, match=r"--patch-size must divide .* 8 pixels"):
        Trainer(dataclasses.replace(TINY, patch_size=patch_size), small)


@pytest.mark.parametrize("name", sorted(TINY.options))
def test_an_option_that_changes_runs_changes_the_folder(name):
    special = {"dataset": "cifar10", "dropout": 0.5, "budget": 1.2, "train_examples": 32, "m": 4}
    special |= {"optimizer": "sgd", "decay": "steps", "model": "resnet", "class_token": True}
    special |= {"head": "normal", "dtype": "bfloat16", "classes": (1, 2)}
    special |= {"pretrained": Path(__file__), "label_noise": 0.3, "label_smoothing": 0.1}
    special |= {"validation_examples": 16, "image_size": 16, "augment": False, "layer_norm": False}
    special |= {"seeds_together": True, "settings": ("sam:r=0.4",)}
    value = special[name] if name in special else TINY.options[name] * 2
    images = {"dataset": "cifar10"} if name in ("image_size", "augment") else {}
    images |= {"model": "mlp"} if name == "layer_norm" else {}
    base = dataclasses.replace(TINY, epochs=8, methods=("plain", "sam"), **images)
    assert dataclasses.replace(base, **{name: value}).folder != base.folder


def test_an_option_that_only_chooses_runs_keeps_the_folder():
    assert dataclasses.replace(TINY, methods=("sam",), seeds=9).folder == TINY.folder


def test_out_is_the_folder_and_no_part_of_the_recipe(tmp_path):
    config = dataclasses.replace(TINY, out=tmp_path)
    assert config.folder == tmp_path
    assert config.options == TINY.options


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], RECIPES["noisy-digits"]),
        (["--dataset", "digits"], RECIPES["digits"]),
        (["--dataset", "cifar10"], RECIPES["cifar10"]),
        (
            ["--epochs", "15", "--dataset=cifar10"],
            dataclasses.replace(RECIPES["cifar10"], epochs=15, warmup_epochs=2),
        ),
        (
            ["--recipe", "vit-ti", "--epochs=30", "--optimizer", "rmsprop"],
            dataclasses.replace(
                RECIPES["vit-ti"],
                recipe="vit-ti",
                epochs=30,
                warmup_epochs=4,
                optimizer="rmsprop",
            ),
        ),
        (
            ["--epochs", "30", "--warmup-epochs", "2"],
            dataclasses.replace(RECIPES["noisy-digits"], epochs=30, warmup_epochs=2),
        ),
        (
            ["--methods", "plain", "sam"],
            dataclasses.replace(RECIPES["noisy-digits"], methods=("plain", "sam")),
        ),
    ],
)
def test_recipe_and_data_set_decide_the_defaults(args, expected):
    assert parse(args) == expected


def test_an_option_for_all_methods_takes_the_place_of_those_of_single_ones():
    config = parse(["--methods", "sam", "gr", "--r", "0.3"])
    assert {config.own(method).r for method in config.methods} == {0.3}
    assert config.own("sam").weight_decay == 4  # as in the recipe
    recipe = parse(["--recipe", "noisy-digits"])
    assert len({recipe.own(method).r for method in recipe.methods}) > 1
    assert recipe.own("plain-weight-decay").weight_decay > recipe.weight_decay
    assert recipe.own("plain-twice").epochs == 2 * recipe.epochs


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match=r"--recipe must be one of noisy-digits, .* 'vit-xl'"):
        parse(["--recipe", "vit-xl"])


def test_fine_tuning_needs_something_to_start_from():
    with pytest.raises(ValueError, match=r"needs --pretrained, .* small-vit-pretraining writes"):
        parse(["--recipe", "small-vit-finetuning"])


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(__main__.COMMANDS, "compare", interrupt)
    with pytest.raises(SystemExit) as stopped:
        __main__.main([])
    assert stopped.value.code == 130
    assert "start the same command again" in capsys.readouterr().err


def test_an_unknown_command_is_named():
    with pytest.raises(SystemExit, match="error: there is no command 'costs', but compare, cost"):
        __main__.main(["costs"])


def test_the_help_lists_the_recipes_and_groups_the_options(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in RECIPES)
    for group in ("runs", "data", "model", "training", "regularization", "devices"):
        assert f"{group} options" in shown


def test_every_option_is_in_one_group():
    bases = [base for base in Config.__mro__ if dataclasses.is_dataclass(base) and base != Config]
    names = [field.name for base in bases for field in dataclasses.fields(base)]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(Config))


# Records.


def epochs_of(method, seed):
    return [{"method": method, "seed": seed, "epoch": i + 1, "loss": 0.1 + i} for i in range(2)]


@pytest.fixture
def recorded(tmp_path):
    """A configuration with two finished runs on file."""
    config = dataclasses.replace(TINY, out=tmp_path)
    records = Records(config)
    for run in (("plain", 0), ("sam", 0)):
        records.append({run: epochs_of(*run)})
    return config


def test_finished_runs_survive(recorded):
    runs = {run: epochs_of(*run) for run in (("plain", 0), ("sam", 0))}
    assert Records(recorded).runs == runs
    assert Records(recorded).runs == runs


def test_an_append_cut_anywhere_leaves_the_run_before_it(recorded):
    path = Records(recorded).path
    whole = path.read_bytes()
    start = whole.index(b'{"method": "sam"')
    for cut in range(start, len(whole) - 1):  # without its last newline the run is complete
        path.write_bytes(whole[:cut])
        assert Records(recorded).runs == {("plain", 0): epochs_of("plain", 0)}
        assert path.read_bytes() == whole[:start]


def test_a_run_appended_after_a_cut_is_read_back(recorded):
    path = Records(recorded).path
    path.write_bytes(path.read_bytes()[:-20])
    Records(recorded).append({("sam", 0): epochs_of("sam", 0)})
    assert Records(recorded).runs[("sam", 0)] == epochs_of("sam", 0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"method": "sam"', "?"),  # no JSON
        ('"sam", "seed": 0, "epoch": 1, "loss": 0.1', '"sam", "seed": 0, "epoch": 1, "loss": 0.3'),
        ('{"method": "sam", ', "{"),  # lacks a key
        ('"sam", "seed": 0, "epoch": 1', '"sam", "seed": 0, "epoch": 2'),
    ],
)
def test_a_damaged_line_is_set_aside_and_its_run_done_again(recorded, old, new):
    path = Records(recorded).path
    damaged = path.read_text().replace(old, new, 1)
    assert damaged != path.read_text()
    for i in range(2):
        path.write_text(damaged)
        with pytest.warns(UserWarning, match=r"runs.jsonl: line 4 is damaged.*damaged-"):
            assert Records(recorded).runs == {("plain", 0): epochs_of("plain", 0)}
        assert path.with_name(f"runs.jsonl.damaged-{i}").read_text() == damaged
    assert Records(recorded).runs == {("plain", 0): epochs_of("plain", 0)}


def test_any_flipped_bit_is_seen(recorded):
    """But one in what tells the lines apart, or in the header, which is an error or no change."""
    path = Records(recorded).path
    whole = bytearray(path.read_bytes())
    first = whole.index(b"\n") + 1
    runs = Records(recorded).runs
    random = np.random.default_rng(0)
    for at in random.integers(first, len(whole), 60):
        flipped = whole.copy()
        flipped[at] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = Records(recorded).runs
        assert all(epochs == runs[run] for run, epochs in found.items())
        assert caught or len(found) == 2 or at == len(whole) - 1


def test_epochs_that_are_numbered_alike_are_no_finished_run(recorded):
    Records(recorded).append({("sam", 1): [epochs_of("sam", 1)[0]] * 2})
    assert set(Records(recorded).runs) == {("plain", 0), ("sam", 0)}


def test_a_file_of_before_has_no_checksums_and_is_read(recorded):
    path = Records(recorded).path
    text = path.read_text().replace('"has_checksums": true, ', "")
    path.write_text(re.sub(r', "checksum": "\w+"', "", text))
    assert len(Records(recorded).runs) == 2


def test_what_killed_processes_leave_is_removed(recorded):
    folder = recorded.folder
    kept = {"sam-seeds-0-1.msgpack", "sam-every-2-seeds-0.msgpack", "plain-0-parameters.msgpack"}
    names = (*kept, "plain-seeds-0.msgpack", ".runs.x.tmp")
    for name in names:
        (folder / name).write_bytes(b"")
    with held(folder):
        remove_finished(recorded, Records(recorded).runs)
    # Those of unfinished runs, and what was learned, stay.
    assert {path.name for path in folder.iterdir()} == {"runs.jsonl", *kept}


def test_a_folder_is_written_by_one_process(recorded):
    program = f"""
from pathlib import Path
from gnp_optax.experiments.training.records import held
with held(Path({str(recorded.folder)!r})):
    print("holding", flush=True)
    input()
"""
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "holding\n"
        with pytest.raises(ValueError, match=rf"written by process {other.pid} on .* --out"):
            compare(recorded)
        other.kill()  # what it held is free
    with held(recorded.folder):
        pass
    assert [path.name for path in recorded.folder.iterdir()] == ["runs.jsonl"]


def test_a_file_made_with_other_options_is_refused_and_kept(recorded):
    path = Records(recorded).path
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other options: r 0.1 instead of 0.2\. Choose .* --out"):
        Records(dataclasses.replace(recorded, r=0.2))
    assert path.read_bytes() == before


# Whole comparisons.


@pytest.mark.parametrize("line", ["[]", "{}", "3"])
def test_a_file_of_another_program_is_refused(tmp_path, line):
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="damaged, or was not written by this program"):
        Records(dataclasses.replace(TINY, out=tmp_path))


def test_an_option_that_is_gone_is_named(tmp_path):
    header = {"options": {**TINY.options, "momentum": 0.9}}
    (tmp_path / "runs.jsonl").write_text(json.dumps(header) + "\n")
    with pytest.raises(ValueError, match=r"momentum 0\.9 instead of None"):
        Records(dataclasses.replace(TINY, out=tmp_path))


@pytest.mark.parametrize(("length", "expected"), [(3, 3), (25, 2), (80, 1), (300, 1)])
def test_a_legend_is_not_wider_than_its_figure(length, expected, tmp_path):
    canvas, (axes,) = drawing.canvas(1, 7.0, 5.6)
    for i in range(9):
        axes.plot([0], [i], label="x" * length)
    drawing.save(canvas, axes, "title", tmp_path / "drawn.png", columns=3)
    (legend,) = canvas.legends
    left = {round(text.get_window_extent().x0) for text in legend.get_texts()}
    assert len(left) == expected


def test_a_figure_of_errors_that_are_all_zero(tmp_path):
    run = [{"test_error": 0.0, "gradient_norm": 0.1} for _ in range(2)]
    figures.curves({("plain", 0): run}, "title", 1, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_first_line_holds_the_options_and_the_versions(finished):
    config, _ = finished
    header = lines(config)[0]
    assert header["options"] == config.options
    libraries = {"jax": jax, "optax": optax, "flax": flax}
    assert {n: header["versions"][n] for n in libraries} == {
        name: library.__version__ for name, library in libraries.items()
    }
    assert {"python", "gnp_optax"} <= set(header["versions"])


def test_every_epoch_of_every_run_has_all_metrics(finished):
    epochs = lines(finished[0])[1:]
    assert {(e["method"], e["seed"], e["epoch"]) for e in epochs} == {
        (method, seed, epoch) for method in METHODS for seed in (0, 1) for epoch in (1, 2)
    }
    assert len(epochs) == len(METHODS) * 2 * 2
    for epoch in epochs:
        assert set(epoch) == METRICS
        missing = ("validation_error", "validation_loss")  # of no examples
        missing += ("error_4bit",) * (epoch["epoch"] == 1)  # only after the last epoch
        measured = {k: v for k, v in epoch.items() if k not in missing}
        assert np.isfinite([v for v in measured.values() if isinstance(v, float)]).all()
        assert (epoch["perturbed_layers"] is not None) == (epoch["method"] == "layerwise")


def test_the_table_has_a_row_per_method_with_the_deviation_over_seeds(finished):
    config, text = finished
    assert (config.folder / "table.md").read_text() == text
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[2:]]
    rows = {row[0]: row for row in rows if len(row) > 1}
    assert len(rows) == len(METHODS)
    means = []
    final = [e for e in lines(config)[1:] if e["epoch"] == 2]
    plain = [e["test_error"] for e in final if e["method"] == "plain"]
    for method in METHODS:
        last = [e for e in final if e["method"] == method]
        errors = [e["test_error"] for e in last]
        means.append(np.mean(errors))
        row = rows[report.STYLES[method][0]]
        assert row[1] == f"{np.mean(errors):.2f} +- {np.std(errors, ddof=1):.2f}"
        pairs = np.subtract(errors, plain)
        change = f"{pairs.mean():+.2f} +- {np.std(pairs, ddof=1) / 2**0.5:.2f}"
        assert row[2] == ("(the best plain)" if method == "plain" else change)
        assert row[4] == f"{np.mean([e['ece'] for e in last]):.2f}"
        assert row[5] == f"{np.mean([e['error_4bit'] for e in last]):.2f}"
    assert [float(row[1].split()[0]) for row in rows.values()] == sorted(np.round(means, 2))
    assert rows["plain"][-1] == "1.00"  # times are relative to plain


def test_the_summary_has_one_object_a_method(finished):
    config, _ = finished
    found = json.loads((config.folder / "summary.json").read_text())
    assert {row["method"] for row in found} == set(METHODS)
    asked = ("seeds", "test_error", "test_error_std", "difference", "difference_standard_error")
    for row in found:
        assert set(asked) <= set(row)
        assert {"best_epoch_error", "ece", "gradients_per_step"} <= set(row)


def test_one_seed_that_the_machine_held_up_does_not_change_the_relative_time():
    """And with zero-warmup, whose later epochs take longer, all epochs count."""
    metrics = dict.fromkeys(["test_error", "test_loss", "train_loss", "gradient_norm"], 1.0)
    metrics |= {"sharpness": 1.0, "gradients_per_step": 1.0, "ece": 1.0, "error_4bit": 1.0}
    metrics |= dict.fromkeys(["validation_error", "validation_loss"], float("nan"))
    seconds = {
        "plain": [[1.0, 1.0], [1.0, 900.0], [1.0, 1.0]],
        "gr-zero-warmup": [[1.0, 2.0], [1.0, 2.0], [70.0, 2.0]],
    }
    runs = {
        (method, seed): [metrics | {"seconds_per_step": each} for each in run]
        for method, seeds in seconds.items()
        for seed, run in enumerate(seeds)
    }
    rows = report.table(summary.of(runs)).splitlines()[2:]
    assert [row.split("|")[-2].strip() for row in rows] == ["1.00", "1.50"]


@pytest.mark.parametrize("name", ["summary", "curves", "early", "layers", "tradeoff"])
def test_a_figure_is_an_image(finished, name):
    with Image.open(finished[0].folder / f"{name}.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 800
        assert image.height > 400


@pytest.mark.parametrize("method", [m for m in METHODS if m != "layerwise"])
def test_gradients_per_step_counts_the_steps_with_a_weight(finished, method):
    epochs = [e for e in lines(finished[0])[1:] if (e["method"], e["seed"]) == (method, 0)]
    _, alpha = formulas(method, TINY, 2 * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
    expected = 1 + (alpha.reshape(2, -1) != 0).mean(1)
    assert [e["gradients_per_step"] for e in epochs] == list(expected)


def test_gradients_per_step_of_layerwise_is_what_its_layers_cost(finished, trainer):
    for epoch in lines(finished[0])[1:]:
        if epoch["method"] == "layerwise":
            mask = gnp.masks.layers(*epoch["perturbed_layers"])
            assert epoch["gradients_per_step"] == pytest.approx(trainer._cost_of(mask, "masked"))
            assert 1 < epoch["gradients_per_step"] < 2


def test_the_selections_are_counted(finished):
    runs = {
        ("layerwise", seed): [
            e for e in lines(finished[0])[1:] if (e["method"], e["seed"]) == ("layerwise", seed)
        ]
        for seed in range(TINY.seeds)
    }
    chosen = {tuple(epoch["perturbed_layers"]) for run in runs.values() for epoch in run}
    assert f"used {len(chosen)} selections of layers" in report.selections(runs)
    assert report.selections({("gr", 0): [{"perturbed_layers": None}]}) == ""


@pytest.mark.exhaustive
def test_a_budget_bounds_the_cost_of_layerwise(small):
    trainer = Trainer(dataclasses.replace(TINY, budget=1.1, layers=5), small)
    for (epoch,) in trainer.run("layerwise", [0]):
        assert epoch["gradients_per_step"] <= 1.1


@pytest.mark.exhaustive
def test_no_more_selections_than_asked_for(small, monkeypatch):
    """Each epoch another selection is the best, and yet one is compiled."""
    names = iter([])
    monkeypatch.setattr(gnp.masks, "top_k_layers", lambda *_, **__: gnp.masks.layers(next(names)))
    for allowed in (1, 2):
        names = iter(["head", "norm", "patches"])
        trainer = Trainer(dataclasses.replace(TINY, selections=allowed, epochs=3), small)
        chosen = [epoch["perturbed_layers"] for (epoch,) in trainer.run("layerwise", [0])]
        expected = [["head"]] * 3 if allowed == 1 else [["head"], ["norm"], ["norm"]]
        assert chosen == expected
        assert len(trainer.epochs.compiled) == allowed


@pytest.fixture
def started(monkeypatch, small):
    """The runs that are started during a test."""
    runs, run = [], Trainer.run

    def counted(self, method, seeds, checkpoint):
        runs.append((method, *seeds))
        return run(self, method, seeds, checkpoint)

    monkeypatch.setattr(data, "digits", lambda part: small)
    monkeypatch.setattr(Trainer, "run", counted)
    return runs


def test_an_interrupted_comparison_goes_on_and_ends_with_the_same_numbers(
    finished, trainer, started, tmp_path, monkeypatch
):
    config = dataclasses.replace(TINY, methods=("gr", "sam"), out=tmp_path)
    counted = Trainer.run

    def interrupted(self, method, seeds, checkpoint):
        epochs = counted(self, method, seeds, checkpoint)
        yield next(epochs)
        if len(started) == 3:
            raise KeyboardInterrupt
        yield from epochs

    with monkeypatch.context() as patch:
        patch.setattr(
            "gnp_optax.experiments.compare.Trainer", lambda *_: trainer
        )  # it has compiled already
        patch.setattr(Trainer, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    assert started == [("gr", 0), ("sam", 0), ("gr", 1)]
    compare(config)
    assert started[3:] == [("gr", 1), ("sam", 1)]
    uninterrupted = [e for e in lines(finished[0])[1:] if e["method"] in config.methods]
    assert without_times(lines(config)[1:]) == without_times(uninterrupted)


def test_a_finished_comparison_runs_nothing_and_repeats_its_table(finished, started):
    config, table = finished
    assert compare(config) == table
    assert started == []


def test_a_run_cut_short_on_file_is_done_again(finished, started, tmp_path, monkeypatch):
    shutil.copytree(finished[0].folder, tmp_path, dirs_exist_ok=True)
    config = dataclasses.replace(finished[0], out=tmp_path)
    path, whole = tmp_path / "runs.jsonl", lines(finished[0])

    def replayed(self, method, seeds, _):
        started.append((method, *seeds))
        return ([e] for e in whole[1:] if (e["method"], [e["seed"]]) == (method, seeds))

    monkeypatch.setattr(Trainer, "run", replayed)
    path.write_text(path.read_text()[:-100])
    compare(config)
    assert started == [("layerwise", 1)]
    assert lines(config) == whole


# Runs against a training loop written by hand.


class Epoch(NamedTuple):
    recorded: dict[str, Any]
    before: Any
    after: Any
    train_loss: float


class ByHand:
    """Repeats the first seed's runs without the library and without the trainer's steps."""

    def __init__(self, records, trainer):
        self.records = [e for e in records if e["seed"] == 0]
        self.trainer = trainer
        self.train, self.test = trainer.data.train, trainer.data.test
        self.probe = (self.train.images[:16], self.train.labels[:16])
        self.logits, self.loss = jax.jit(self.logits), jax.jit(self.loss)
        self.init = jax.jit(self.trainer.model.init)
        self.gradient = jax.jit(jax.grad(self.loss))
        self.step = jax.jit(self.step)
        self.runs = {}
        rate = optax.warmup_cosine_decay_schedule(0.0, TINY.learning_rate, 4, 8)
        adam = optax.adamw(rate, weight_decay=TINY.weight_decay)
        self.optimizer = optax.chain(optax.clip_by_global_norm(TINY.clip_norm), adam)

    def logits(self, params, images):
        return self.trainer.model.apply({"params": params}, (images / 16 - 0.3053) / 0.3760)

    def loss(self, params, images, labels):
        log_p = jax.nn.log_softmax(self.logits(params, images))
        return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()

    def step(self, params, opt_state, batch, r, alpha, mask):
        examples = (self.train.images[batch], self.train.labels[batch])
        value, grads = jax.value_and_grad(self.loss)(params, *examples)
        chosen = jax.tree.map(jnp.multiply, grads, mask)
        length = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(chosen)))
        moved = jax.tree.map(lambda p, g: p + r * g / length, params, chosen)
        perturbed = jax.grad(self.loss)(moved, *examples)
        grads = jax.tree.map(lambda g, h, m: g + alpha * m * (h - g), grads, perturbed, mask)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def run(self, method):
        if method not in self.runs:
            self.runs[method] = list(self.epochs(method))
        return self.runs[method]

    def epochs(self, method):
        init_key, key = jax.random.split(jax.random.key(0))
        params = self.init(init_key, jnp.zeros((1, 8, 8, 1)))["params"]
        opt_state = self.optimizer.init(params)
        schedule = zip(*formulas(method, TINY, 8, 4), strict=True)
        for recorded in (e for e in self.records if e["method"] == method):
            before, losses, layers = params, [], recorded["perturbed_layers"]
            mask = flax.traverse_util.path_aware_map(
                lambda path, _, layers=layers: float(not layers or "/".join(path[:-1]) in layers),
                params,
            )
            shuffle_key, key = jax.random.split(key)
            order = jax.random.permutation(shuffle_key, 64)
            for batch, (r, alpha) in zip(order.reshape(4, 16), schedule, strict=False):
                params, opt_state, loss = self.step(params, opt_state, batch, r, alpha, mask)
                losses.append(loss)
            yield Epoch(recorded, before, params, np.mean(losses))


@pytest.fixture(scope="module")
def by_hand(finished, trainer):
    return ByHand(lines(finished[0])[1:], trainer)


def norm(grads):
    return np.sqrt(sum(np.square(leaf, dtype=float).sum() for leaf in jax.tree.leaves(grads)))


@pytest.mark.exhaustive(but=["plain", "gr-zero-warmup"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_loop_written_by_hand(by_hand, method):
    for epoch in by_hand.run(method):
        np.testing.assert_allclose(epoch.recorded["train_loss"], epoch.train_loss, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_norm_and_sharpness_are_those_of_the_probe(by_hand, method):
    for recorded, _, params, _ in by_hand.run(method):
        grads = by_hand.gradient(params, *by_hand.probe)
        length = TINY.r / norm(grads)
        moved = jax.tree.map(lambda p, g, length=length: p + length * g, params, grads)
        sharpness = by_hand.loss(moved, *by_hand.probe) - by_hand.loss(params, *by_hand.probe)
        np.testing.assert_allclose(recorded["gradient_norm"], norm(grads), rtol=1e-4)
        np.testing.assert_allclose(recorded["sharpness"], sharpness, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_test_error_is_the_percentage_of_wrong_classes(by_hand, method):
    for recorded, _, params, _ in by_hand.run(method):
        classes = np.argmax(by_hand.logits(params, by_hand.test.images), axis=1)
        expected = 100 * np.mean(classes != by_hand.test.labels)
        np.testing.assert_allclose(recorded["test_error"], expected, rtol=1e-6)


def test_layerwise_perturbs_the_layers_of_largest_gradient_norm(by_hand):
    for recorded, params, _, _ in by_hand.run("layerwise"):
        layers = {}
        grads = by_hand.gradient(params, *by_hand.probe)
        for path, leaf in flax.traverse_util.flatten_dict(grads).items():
            layers.setdefault("/".join(path[:-1]), []).append(leaf)
        chosen = {norm(layers.pop(layer)) for layer in recorded["perturbed_layers"]}
        assert len(recorded["perturbed_layers"]) == TINY.layers
        assert min(chosen) >= max(map(norm, layers.values()))
