"""Faults: kills, full disks and flipped bits, after each of which the numbers are the same."""

import builtins
import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from models import tiny

from gnp_optax.experiments import __main__, compare, config
from gnp_optax.experiments.data import datasets
from gnp_optax.experiments.report import figures
from gnp_optax.experiments.training.trainer import Trainer

CONFIG = dataclasses.replace(
    tiny.TINY, model="mlp", methods=("plain", "sam"), checkpoint_minutes=0, keep_parameters=True
)
EPOCHS = 2 * CONFIG.seeds * CONFIG.epochs
METHODS = [(method, seed) for seed in range(CONFIG.seeds) for method in CONFIG.methods]
TIMES = ("seconds_per_step", "checksum")


class Runner:
    """The command, with programs that have compiled already, and a count of what it trains."""

    def __init__(self):
        self.data = tiny.digits()
        self.trainer = Trainer(CONFIG, self.data)
        self.trained = 0
        train = self.trainer.epochs.train

        def counted(*args):
            self.trained += 1
            return train(*args)

        self.trainer.epochs.train = counted

    def of(self, config, _):
        self.trainer.config = config
        return self.trainer

    def start(self, folder, **options):
        """Return the line of the error that the command ends with, if it does."""
        options = dataclasses.replace(CONFIG, out=folder, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare, "Trainer", self.of)
            patch.setattr(compare, "load", lambda *_: self.data)
            patch.setattr(figures, "draw", lambda *_: None)
            patch.setitem(__main__.COMMANDS, "compare", lambda _: compare.compare(options))
            try:
                __main__.main([])
            except SystemExit as error:
                return str(error.code)


@pytest.fixture(scope="module")
def runner():
    return Runner()


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """The folder of a comparison that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert runner.start(folder) is None
    return folder


def outcome(folder):
    """What must always be the same, by file: all but times, checksums and the order of runs."""
    found = {}
    for path in folder.iterdir():
        found[path.name] = None
        if path.suffix == ".msgpack":
            found[path.name] = path.read_bytes()
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()[1:]]
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    key = lambda line: (line["method"], line["seed"], line["epoch"])  # noqa: E731
    found["runs.jsonl"] = json.dumps(sorted(lines, key=key))
    rows = json.loads((folder / "summary.json").read_text())
    found["summary.json"] = json.dumps([{**row, "time_per_step": None} for row in rows])
    return found


class Killed(BaseException):  # noqa: N818
    """A process that has this is dead: whatever it would still do to the disk fails."""


class Writes:
    """Counts what is done to a folder, and lets it fail from some time on.

    A file is created, written in two halves, forced to disk, renamed, removed: before each of these
    there is a step.
    """

    def __init__(self, folder, first=None, error=Killed):
        self.folder, self.first, self.error = folder, first, error
        self.steps = 0

    def step(self, path):
        self.steps += 1
        if self.first is not None and self.steps >= self.first:
            raise self.error

    def wrapped(self, function):
        def of_path(path, *args, **kwargs):
            # What is forced to disk is a number.
            if isinstance(path, int) or Path(path).is_relative_to(self.folder):
                self.step(path)
            return function(path, *args, **kwargs)

        return of_path

    def opened(self, path, mode="r", *args, **kwargs):
        is_written = set(mode) & set("wax+")
        if not is_written or isinstance(path, int) or not Path(path).is_relative_to(self.folder):
            return _open(path, mode, *args, **kwargs)
        self.step(path)
        return InHalves(_open(path, mode, *args, **kwargs), self)

    @contextlib.contextmanager
    def patched(self):
        names = ["fsync", "mkdir", "chmod", "replace", "rename"]
        # To remove something, a full disk has room.
        names += ["unlink", "remove"] if self.error is Killed else []
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(os, name, self.wrapped(getattr(os, name)))
            patch.setattr(io, "open", self.opened)
            patch.setattr(builtins, "open", self.opened)
            yield


_open = io.open


class InHalves:
    """A file that is open for writing."""

    def __init__(self, file, writes):
        self.file, self.writes = file, writes

    def write(self, content):
        for part in (content[: len(content) // 2], content[len(content) // 2 :]):
            self.writes.step(self.file.name)
            self.file.write(part)
            self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def faults(runner, folder, error):
    """Let each step be the first that fails, in a folder of its own; yield these."""
    for first in range(1, 1000):
        out = folder / str(first)
        runner.trained = 0
        writes = Writes(out, first, error)
        said = None
        try:
            with writes.patched():
                said = runner.start(out)
        except Killed:
            pass
        if writes.steps < first:
            return
        yield out, said


@pytest.mark.exhaustive
@pytest.mark.parametrize("minutes", [0, 60])
def test_a_kill_at_every_write_loses_and_changes_nothing(runner, whole, tmp_path, minutes, request):
    count = 0
    for count, (out, _) in enumerate(faults(runner, tmp_path, Killed), start=1):
        assert runner.start(out, checkpoint_minutes=minutes) is None
        assert outcome(out) == outcome(whole)
        assert runner.trained <= EPOCHS + (1 if minutes == 0 else CONFIG.epochs)
    print(f"{count} kills")
