"""Two processes with two devices each, on this machine: the numbers of one process with four."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

OPTIONS = (
    *("--recipe", "digits-vit", "--methods", "layerwise", "--seeds", "1", "--epochs", "1"),
    *("--warmup-epochs", "0", "--width", "8", "--depth", "1", "--heads", "1"),
    *("--patch-size", "4", "--layers", "2", "--distributed"),
)


def start(devices, *args):
    flags = os.environ["XLA_FLAGS"]
    return subprocess.Popen(
        [sys.executable, *args],
        env={
            **os.environ,
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(*processes):
    outputs = [process.communicate(timeout=1200) for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [output for output, _ in outputs]


def on_two_processes(*args):
    """Run a program of ours in two processes that find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    options = ["--coordinator", address, "--processes", "2", "--process-id"]
    return finish(*(start(2, *args, *options, str(i)) for i in range(2)))


RUNNER = ("-m", "gnp_optax.experiments", *OPTIONS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders and outputs of a run in one process, and of one in two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    single = finish(start(4, *RUNNER, "--out", str(one)))
    # The second process has no share in the folder of the first.
    return (one, single), (two, on_two_processes(*RUNNER, "--out", str(two)))


def metrics(folder):
    lines = (folder / "runs.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines]


@pytest.mark.exhaustive
def test_two_processes_give_the_numbers_of_one(runs):
    (one, _), (two, _) = runs
    assert len(metrics(one)) == len(metrics(two)) == 1
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert (a["method"], a["epoch"]) == (b["method"], b["epoch"])
        assert a["perturbed_layers"] == b["perturbed_layers"]
        for name in ("train_loss", "test_error", "gradient_norm", "sharpness"):
            np.testing.assert_allclose(a[name], b[name], rtol=2e-3)


@pytest.mark.exhaustive
def test_only_the_first_process_prints_and_writes(runs):
    _, (folder, (first, second)) = runs
    assert "layer-wise GR" in first
    assert "|" not in second
    figures = {f"{name}.png" for name in ("summary", "curves", "early", "layers")}
    written = {"runs.jsonl", "epochs.csv.gz", "table.md", "summary.json"}
    assert {path.name for path in folder.iterdir()} == written | figures


@pytest.mark.exhaustive
def test_a_finished_comparison_is_not_repeated(runs):
    _, (folder, _) = runs
    before = metrics(folder)
    first, second = on_two_processes(*RUNNER, "--out", str(folder))
    assert "1 of 1 runs are in" in first
    assert "|" not in second
    assert metrics(folder) == before
