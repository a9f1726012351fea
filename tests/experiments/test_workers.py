"""Runs in processes of their own: the same numbers, and errors that arrive."""

import dataclasses
import multiprocessing
import os
import signal
import struct

import numpy as np
import pytest

from gnp_optax.experiments.compare import compare
from gnp_optax.experiments.recipes import named
from gnp_optax.experiments.training import workers
from gnp_optax.experiments.training.records import Records

SMALL = dataclasses.replace(
    named("noisy-digits"),
    methods=("plain", "gr"),
    settings=(),
    seeds=2,
    epochs=2,
    warmup_epochs=1,
    width=16,
)
GROUPS = [("plain", [0, 1]), ("gr", [0, 1])]


def test_a_process_more_must_be_worth_its_start(monkeypatch):
    monkeypatch.setattr(workers, "cpu_cores", lambda: [0, 1, 2, 3])
    long = dataclasses.replace(SMALL, epochs=60)
    assert workers.count(long, GROUPS) == 2
    assert workers.count(long, GROUPS * 9) == 4
    assert workers.count(SMALL, GROUPS) == 1
    assert workers.count(dataclasses.replace(long, seeds_together=False), GROUPS) == 1


def test_methods_that_share_a_program_are_neighbours():
    methods = ["plain", "hybrid-sam", "gr", "plain-twice", "sam"]
    order = sorted(methods, key=lambda method: workers._place(SMALL, method))
    assert order == ["gr", "sam", "plain", "plain-twice", "hybrid-sam"]


@pytest.mark.exhaustive
def test_in_processes_of_their_own_runs_have_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_EPOCHS", 1)
    found = []
    for spawns in (False, True):
        config = dataclasses.replace(SMALL, out=tmp_path / str(spawns))
        compare(config, spawns=spawns)
        found.append(Records(config).runs)
    assert found[0].keys() == found[1].keys()
    for run, epochs in found[0].items():
        for name in ("train_loss", "test_error", "gradient_norm"):
            got, expected = ([epoch[name] for epoch in x] for x in (found[1][run], epochs))
            np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.exhaustive
def test_errors_of_processes_arrive(tmp_path):
    config = dataclasses.replace(SMALL, batch_size=4096, out=tmp_path)
    with pytest.raises(ValueError, match="--batch-size exceeds") as raised:
        list(workers.train(config, GROUPS, 2))
    assert "In a process that trained" in raised.value.__notes__[0]
    events = workers.train(dataclasses.replace(SMALL, out=tmp_path), GROUPS, 2)
    next(events)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match="start the same command again"):
        list(events)
    assert not multiprocessing.active_children()


def _killed_while_it_writes(config, pipe, core):
    pipe.send(None)
    pipe.recv()
    os.write(pipe.fileno(), struct.pack("!i", 100) + b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.exhaustive
def test_a_process_killed_while_it_writes_is_noticed(monkeypatch):
    monkeypatch.setattr(workers, "_work", _killed_while_it_writes)
    with pytest.raises(ChildProcessError, match="start the same command again"):
        list(workers.train(SMALL, GROUPS, 2))
