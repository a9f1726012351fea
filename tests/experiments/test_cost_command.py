"""The measurement of costs: its models, its methods, what it counts, and what it writes."""

import contextlib
import functools
import io
import json
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from PIL import Image

from gnp_optax.experiments import __main__
from gnp_optax.experiments.measure import cost, cost_report
from gnp_optax.experiments.measure.cost import CostConfig
from gnp_optax.experiments.measure.methods import Scope, layerwise, methods
from gnp_optax.experiments.measure.programs import Programs, per_round
from gnp_optax.experiments.measure.workload import Model, images, text, workload
from gnp_optax.experiments.models.resnets import ResNet, WideResNet
from gnp_optax.experiments.models.transformers import GPT, ViT

TINY = {
    "vit": images(ViT(classes=3, patch=8, width=8, depth=2, heads=2), 4, side=16),
    "resnet": images(ResNet(3, (4, 8, 8), 1), 4, side=8),
    "wide": images(WideResNet(3, (4, 8, 8), 1), 4, side=8),
    "gpt": text(GPT(vocabulary=11, context=6, width=8, depth=2, heads=2), 2, 5),
}


class MLP(nn.Module):
    """With batch statistics, and compiled within a second."""

    classes: int = 3
    depth: int = 2

    @nn.compact
    def __call__(self, x, train=False, *, start=None, stop=None):
        if start is None:
            x = nn.Dense(8, name="stem")(x.mean((1, 2)))
        for i in range(start or 0, self.depth if stop is None else stop):
            x = nn.tanh(nn.Dense(8, name=f"block_{i}")(x))
        if stop is not None:
            return x
        return nn.Dense(3, name="head")(nn.BatchNorm(not train, name="norm")(x))


SMALL = images(MLP(), 4, side=2)


def rows(chosen):
    return {method.name: method for method in methods(chosen)}


NAMES = list(rows(SMALL))


# Models.


@pytest.mark.parametrize(
    ("name", "millions"),  # as published; a ViT for images of 10 classes has its head smaller
    [
        *(("vit-ti", 5.36), ("vit-s", 21.3), ("vit-b", 85.2)),
        *(("resnet20", 0.27), ("wrn-28-10", 36.5), ("gpt2-small", 124.4)),
    ],
)
def test_a_model_has_its_published_number_of_parameters(name, millions):
    params, _ = workload(name, 2, "bfloat16", 16).abstract()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert number / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.exhaustive(but=["vit-ti"])
@pytest.mark.parametrize("name", ["vit-ti", "resnet20", "wrn-28-10", "gpt2-small"])
def test_a_model_computes_in_the_asked_type(name):
    chosen = workload(name, 2, "bfloat16", 16)
    arguments = chosen.abstract()
    for block in (0, chosen.depth):
        assert chosen.boundary(*arguments, block).dtype == jnp.bfloat16
    assert jax.eval_shape(chosen.loss, *arguments)[0].dtype == jnp.float32


@pytest.mark.exhaustive(but=["vit"])
@pytest.mark.parametrize("name", TINY)
def test_a_model_may_be_run_in_two_parts(name):
    chosen = TINY[name]
    params, batch = chosen.concrete()
    variables = {"params": params, "batch_stats": batch.batch_stats}

    def run(x, **part):
        return chosen.model.apply(variables, x, train=True, mutable=["batch_stats"], **part)[0]

    whole = run(batch.inputs)
    for block in range(chosen.depth + 1):
        boundary = run(batch.inputs, stop=block)
        assert boundary.shape == chosen.boundary(params, batch, block).shape
        np.testing.assert_allclose(run(boundary, start=block), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_a_mask_selects_what_the_loss_uses_from_a_block_on(name):
    """The traced suffix tells which parameters it uses."""
    chosen = TINY[name]
    params, batch = chosen.abstract()
    for block in range(chosen.depth + 1):
        mask, boundary = chosen.mask(block)(params), chosen.boundary(params, batch, block)
        suffix = functools.partial(chosen.suffix_loss, block=block)
        jaxpr = jax.make_jaxpr(suffix)(params, boundary, batch).jaxpr
        read = {v for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, core.Literal)}
        leaves, treedef = jax.tree.flatten(mask)
        used = jax.tree.unflatten(treedef, [v in read for v in jaxpr.invars[: len(leaves)]])
        if name == "gpt":  # the head is tied to the embedding, which comes first
            assert used["embedding"] != mask.pop("embedding")
            del used["embedding"]
        assert used == mask


def test_a_token_of_gpt_does_not_see_later_ones():
    chosen = TINY["gpt"]
    params, batch = chosen.concrete()
    changed = batch.inputs.at[:, 3:].set(0)
    before, after = (
        chosen.model.apply({"params": params}, tokens) for tokens in (batch.inputs, changed)
    )
    np.testing.assert_allclose(before[:, :3], after[:, :3], rtol=1e-6)
    assert not np.allclose(before[:, 3:], after[:, 3:])


# Methods.


def by_hand(name, chosen, params, batch):
    """`(1 - alpha) g + alpha g~` for a row of the table."""
    alpha = 0.8
    if name == "plain gradient" or "zero-warmup" in name:
        alpha = 0.0
    elif "sam" in name.lower():
        alpha = 1.0
    block = chosen.depth if "head only" in name else chosen.depth - 1
    everything = "last block" not in name and "head only" not in name
    if "one gradient" in name or "stale" in name:
        early = jax.tree.map(lambda m: everything or not m, chosen.mask(block)(params))
        params = along_themselves(params, early)
        alpha = 0.0 if everything else 1.0
    mask = jax.tree.map(lambda m: float(m or everything), chosen.mask(block)(params))

    def grad(params):
        return jax.grad(lambda p: chosen.loss(p, batch)[0])(params)

    g = grad(params)
    kept = jax.tree.map(jnp.multiply, g, mask)
    norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(kept)))
    step = jax.tree.map(lambda x: 0.1 * x / norm, kept)
    if "exact" in name:
        change = jax.jvp(grad, (params,), (step,))[1]
    else:
        moved = grad(jax.tree.map(jnp.add, params, step))
        change = jax.tree.map(jnp.subtract, moved, g)
    if "masked" in name:
        change = jax.tree.map(jnp.multiply, change, mask)
    return jax.tree.map(lambda x, y: x + alpha * y, g, change)


def along_themselves(params, early):
    """What is remembered there is the parameters."""
    kept = jax.tree.map(lambda w, m: w * m, params, early)
    norm = optax.tree.norm(kept)
    return jax.tree.map(lambda w, x: w + 0.1 * x / norm, params, kept)


@pytest.fixture(scope="module")
def inputs():
    return SMALL.concrete()


@pytest.mark.exhaustive(
    but=[
        "GR, all layers",
        "layer-wise GR, head only",
        "zero-warmup, during warmup (alpha 0 in Python)",
    ]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_method_returns_the_gradient_that_its_name_says(name, inputs):
    value, grads = rows(SMALL)[name].step(lambda f, *args: jax.jit(f)(*args), *inputs)
    expected = by_hand(name, SMALL, *inputs)
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    for found, right in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-5)
    if "one gradient" in name or "stale" in name:
        return  # its loss is that at the perturbed parameters
    # Loss and statistics are those of the unperturbed pass.
    for found, right in zip(
        jax.tree.leaves(value), jax.tree.leaves(SMALL.loss(*inputs)), strict=True
    ):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-6)


# What is counted.

SIZE = 64


def square(x):
    return x @ x


def test_a_step_of_several_programs_costs_their_sum():
    """By hand: n^3 products and sums each time; the result of the first call is kept."""
    x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
    programs = Programs()
    once = programs.cost(lambda call, x, _: call(square, x), x, None)
    twice = programs.cost(lambda call, x, _: call(square, call(square, x)), x, None)
    assert once.flops == pytest.approx(2 * SIZE**3, rel=0.01)
    assert twice.flops == 2 * once.flops
    assert 4 * SIZE**2 <= once.memory < 4 * SIZE**2 + 1000
    assert twice.memory == once.memory + 4 * SIZE**2
    assert twice.compile_seconds == once.compile_seconds > 0


def test_a_round_measures_everything_once_in_changing_order():
    calls = []

    def measure(name):
        calls.append(name)
        return len(calls) - 1

    found = per_round({name: functools.partial(measure, name) for name in "abcdefgh"}, 4, "")
    rounds = ["".join(calls[i : i + 8]) for i in range(0, 32, 8)]
    assert {"".join(sorted(order)) for order in rounds} == {"abcdefgh"}
    assert len(set(rounds)) == 4
    assert found == {
        name: [8 * i + order.index(name) for i, order in enumerate(rounds)] for name in "abcdefgh"
    }


def test_every_compilation_begins_with_empty_caches():
    traced = []

    @jax.jit
    def doubled(x):
        traced.append(x)
        return 2 * x

    x = jax.ShapeDtypeStruct((2,), jnp.float32)
    for times in (1, 2):
        Programs().cost(lambda call, x, _: call(lambda x: doubled(x), x), x, None)
        assert len(traced) == times


@pytest.fixture(scope="module")
def thin():
    """ViT-Ti cut to 3 blocks, and what counts the FLOPs of a step on it."""
    chosen = images(ViT(classes=10, patch=4, width=192, depth=3, heads=3), 8)
    programs = Programs()
    return chosen, rows(chosen), lambda step: programs.cost(step, *chosen.abstract()).flops


@pytest.mark.exhaustive
def test_two_gradients_for_all_layers_and_one_for_the_head(thin):
    chosen, methods, count = thin
    plain = count(methods["plain gradient"].step)
    assert 1.99 * plain <= count(methods["GR, all layers"].step) <= 2.01 * plain
    for scope in get_args(Scope):
        assert 0.99 * plain <= count(layerwise(chosen, chosen.depth, scope)) <= 1.01 * plain


@pytest.mark.exhaustive
def test_the_last_block_costs_what_follows_it(thin):
    """At most 1 + q; and at most 1.11 of the 12 blocks of ViT-Ti, as each costs the same."""
    chosen, methods, count = thin
    plain = count(methods["plain gradient"].step)
    last_two, last = (cost.suffix_flops(chosen, block) for block in (1, 2))
    for scope in get_args(Scope):
        excess = count(layerwise(chosen, 2, scope)) - plain
        assert excess == pytest.approx(last, abs=0.01 * plain)
        assert excess <= 0.11 * (plain + 9 * (last_two - last))


@pytest.mark.exhaustive
def test_a_warmup_step_has_the_flops_of_a_plain_one(thin):
    """Although its alpha is traced."""
    _, methods, count = thin
    method = methods["zero-warmup, during warmup (traced alpha, now 0)"]
    assert count(method.counted) == count(methods["plain gradient"].step)


@pytest.mark.exhaustive
@pytest.mark.parametrize("chosen", [pytest.param(name, id=name) for name in ("vit-ti", "resnet20")])
def test_all_layers_at_one_gradient_and_at_the_price_of_the_last_block(chosen):
    measured = workload(chosen, 32, "float32", 0)
    programs, methods = Programs(), rows(measured)

    def count(name):
        return programs.cost(methods[name].step, *measured.abstract()).flops

    plain = count("plain gradient")
    q = cost.suffix_flops(measured, measured.depth - 1) / plain
    assert count("one gradient (momentum SAM), all layers") <= 1.01 * plain
    assert count("early layers stale, last block + head fresh") <= (1 + q + 0.02) * plain


# Whole measurements.


@pytest.fixture(scope="module", autouse=True)
def compilation_cache():
    """As it was, although the command turns it off."""
    enabled = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)


# One of each kind: what all are relative to, what is counted as another program, several programs.
SHOWN = [NAMES[0], "zero-warmup, during warmup (traced alpha, now 0)", NAMES[-1]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one measurement by the command line, and what it printed."""
    folder = tmp_path_factory.mktemp("cost")
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        patch.setattr(cost, "workload", lambda *_: SMALL)
        patch.setattr(
            cost, "methods", lambda chosen: [m for m in methods(chosen) if m.name in SHOWN]
        )
        options = ["--steps", "3", "--compilations", "1", "--out", str(folder)]
        __main__.main(["cost", *options])
    return folder, printed.getvalue()


def cells(table):
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]


def test_the_table_has_the_methods_relative_to_the_plain_gradient(finished):
    _, printed = finished
    header, _, *body = cells(printed.split("\n\n")[0])
    assert header[1:4] == ["FLOPs", "wall-clock", "memory"]
    assert [row[0] for row in body] == SHOWN
    assert [body[0][i] for i in (1, 2, 3, 5)] == ["1.00", "1.00 (1.00 to 1.00)", "1.00", "1.00"]
    assert all(float(row[1]) >= 0.99 for row in body)


def test_the_report_says_where_and_how_it_was_made(finished):
    folder, printed = finished
    report = (folder / "cost.md").read_text()
    assert printed.split("\n\n")[0] in report
    assert (
        f"`python -m gnp_optax.experiments cost --steps 3 --compilations 1 --out {folder}`"
        in report
    )
    for fact in (jax.devices()[0].device_kind, f"jax {jax.__version__}", "jaxlib "):
        assert fact in report
    assert "head" in [row[0] for row in cells(report.split("\n\n")[5])]


def test_the_raw_numbers_hold_every_round_and_make_the_table(finished):
    folder, printed = finished
    record = json.loads((folder / "cost.json").read_text())
    plain = record["rows"][0]
    for row, shown in zip(record["rows"], cells(printed)[2:], strict=False):
        assert (len(row["seconds"]), len(row["compile_seconds"])) == (3, 1)
        ratio = np.median(np.divide(row["seconds"], plain["seconds"]))
        assert shown[:2] == [row["name"], f"{row['flops'] / plain['flops']:.2f}"]
        assert shown[2].startswith(f"{ratio:.2f} (")
        assert shown[3] == f"{row['memory'] / plain['memory']:.2f}"
    assert [suffix["block"] for suffix in record["suffixes"]] == [0, 1, 2]
    assert [(c["block"], c["scope"]) for c in record["depths"]] == [
        (block, scope) for block in range(3) for scope in ("all", "masked")
    ]


def test_the_files_are_these_three_and_the_figure_is_an_image(finished):
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {"cost.md", "cost.json", "cost.png"}
    with Image.open(folder / "cost.png") as image:
        image.load()
        assert image.width > 1000


def test_without_time_nothing_runs_and_without_depths_there_is_no_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "workload", lambda *_: SMALL)
    monkeypatch.setattr(cost, "methods", lambda chosen: methods(chosen)[:2])
    monkeypatch.setattr(type(SMALL), "concrete", lambda _: pytest.fail("arrays were made"))
    (tmp_path / "cost.png").touch()
    cost.run(["--no-time", "--depths", "--compilations", "1", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"cost.md", "cost.json"}
    record = json.loads((tmp_path / "cost.json").read_text())
    assert {row["seconds"] for row in record["rows"]} == {None}
    body = cells((tmp_path / "cost.md").read_text().split("\n\n")[3])[2:]
    assert {row[2] for row in body} == {"-"}
    assert len(body) == 2
    options = ["--no-time", "--depths", "--compilations", "1", "--only", "^none$"]
    cost.run([*options, "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "cost.json").read_text())["rows"]
    assert row["name"] == "plain gradient"


def test_the_table_has_the_median_compilation_and_the_ratio_of_medians():
    rows = [
        {"name": name, "flops": 1.0, "memory": 1, "compile_seconds": times, "seconds": None}
        for name, times in {"plain": [1.0, 4.0, 2.0], "other": [3.0, 4.0, 10.0]}.items()
    ]
    body = cells(cost_report.table({"rows": rows}))[2:]
    assert [row[4:] for row in body] == [["2.0", "1.00"], ["4.0", "2.00"]]


def test_what_the_compiler_does_not_tell_is_a_dash():
    row = {"name": "x", "flops": None, "memory": None, "compile_seconds": [1.0], "seconds": None}
    assert cells(cost_report.table({"rows": [row]}))[2] == ["x", "-", "-", "-", "1.0", "1.00"]


# Options.


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], CostConfig()),
        (["--model", "vit-s", "--batch-size", "8"], CostConfig(model="vit-s", batch_size=8)),
        (["--no-time", "--depths", "0", "11"], CostConfig(time=False, depths=(0, 11))),
        (["--depths"], CostConfig(depths=())),
        (
            ["--model", "gpt2-small", "--sequence-length", "64", "--dtype", "bfloat16"],
            CostConfig(model="gpt2-small", sequence_length=64, dtype="bfloat16"),
        ),
    ],
)
def test_options(args, expected):
    assert cost.parse(args) == expected


def test_every_model_that_can_be_asked_for_is_there():
    for model in get_args(Model):
        assert workload(model, 3, "float32", 16).inputs.shape[0] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be positive, got 0"),
        ({"steps": 0}, "--steps must be positive, got 0"),
        ({"compilations": 0}, "--compilations must be positive, got 0"),
        ({"sequence_length": 64}, "--sequence-length is for --model gpt2-small, not vit-ti"),
        (
            {"model": "gpt2-small", "sequence_length": 1025},
            "--sequence-length must lie in 1 to 1024, got 1025",
        ),
        ({"model": "gpt2-small", "sequence_length": 0}, "--sequence-length must lie in 1 to 1024"),
        ({"only": "("}, r"--only '\(' is no regular expression"),
    ],
)
def test_an_impossible_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        CostConfig(**options)


def test_a_block_that_is_not_there_is_refused_before_anything_is_compiled():
    with pytest.raises(SystemExit, match=r"no block 13. The model has the blocks 0 to 11; 12 "):
        __main__.main(["cost", "--depths", "3", "13"])


def test_an_unknown_model_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit):
        cost.parse(["--model", "vit-xl"])
    assert "resnet20" in capsys.readouterr().err


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in __main__.COMMANDS)


def test_folders_differ_where_tables_would():
    configs = [
        CostConfig(),
        CostConfig(model="vit-s"),
        CostConfig(batch_size=8),
        CostConfig(dtype="bfloat16"),
        CostConfig(model="gpt2-small"),
        CostConfig(model="gpt2-small", sequence_length=64),
    ]
    assert len({config.folder for config in configs}) == len(configs)


def test_an_interruption_says_that_nothing_was_written(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cost, "measure", interrupt)
    with pytest.raises(SystemExit, match="130"):
        __main__.main(["cost"])
    assert "Nothing was written" in capsys.readouterr().err
