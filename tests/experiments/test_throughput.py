"""The time of a comparison's steps beside a bare loop's."""

import dataclasses

import jax
import numpy as np
import pytest
from models import tiny

from gnp_optax.experiments import __main__
from gnp_optax.experiments.measure import throughput
from gnp_optax.experiments.recipes import RECIPES
from gnp_optax.experiments.training.steps import Kind, Scheduled
from gnp_optax.experiments.training.trainer import Trainer


@pytest.fixture(scope="module")
def trainer():
    return Trainer(dataclasses.replace(tiny.TINY, epochs=4, test_every=4), tiny.digits())


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", throughput.METHODS)
def test_bare_step_trains_as_the_comparison_does(trainer, method):
    step, state, (batch, key) = throughput.bare(trainer, method)
    alpha = 0.0 if method == "plain" else trainer.config.alpha
    r = trainer.config.r
    start = trainer._fresh(0, None)._replace(params=state[0], opt_state=state[1])
    at = Scheduled(r, alpha, 0.0, trainer.config.weight_decay, 0.0, False)
    expected = trainer.steps.take(start, batch, key, at, Kind())[2]
    state = step(*state, batch, key)
    # Adam's moments: the gradient. In the parameters it divides rounding errors by rounding errors.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 2e-3, 1e-6),
        state[1][1],
        expected.opt_state[1],
    )
    params = step(*state, batch, key)[0]  # the learning rate of the first step is 0
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, start.params)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.exhaustive
def test_everything_is_timed_in_every_round(trainer):
    times = throughput.measure(trainer, 2)
    loops = {(method, loop) for method in ("plain", "gr") for loop in ("comparison", "bare loop")}
    assert times.keys() == loops
    for seconds in times.values():
        assert len(seconds) == 2
        assert min(seconds) > 0


def test_table_has_medians_and_the_quartiles_of_the_ratio():
    times = {
        ("plain", "comparison"): [0.001, 0.003, 0.002],
        ("plain", "bare loop"): [0.001, 0.001, 0.004],
        ("gr", "comparison"): [0.002] * 3,
        ("gr", "bare loop"): [0.002] * 3,
    }
    rows = throughput.table(times).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells == [
        ["plain", "2.00", "1.00", "1.00 (0.75 to 2.00)"],
        ["GR", "2.00", "2.00", "1.00 (1.00 to 1.00)"],
    ]


def test_comparison_is_the_recipe_with_an_epoch_a_round():
    config = throughput.ThroughputConfig(recipe="small-vit", rounds=3).comparison
    changed = {"epochs": 5, "test_every": 5, "warmup_epochs": 1}
    assert config == dataclasses.replace(RECIPES["small-vit"], **changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "vit-xs"], "--recipe must be one of noisy-digits, "),
        (["--rounds", "0"], "--rounds must be positive"),
        (["--data-dir", "/nowhere"], "--data-dir is for --dataset cifar10 and text"),
    ],
)
def test_impossible_option_is_named(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["throughput", *options])
    printed = capsys.readouterr()  # by newer versions of tyro
    shown = " ".join(f"{printed.out}{printed.err}{stopped.value}".replace("│", " ").split())
    assert message in shown
