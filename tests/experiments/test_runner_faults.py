"""Kills, full disks and flipped bits: after each the numbers are the same, and nothing is lost."""

import builtins
import contextlib
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from models import tiny

from gnp_optax.experiments import __main__, compare
from gnp_optax.experiments.config import _digest_of
from gnp_optax.experiments.report import figures
from gnp_optax.experiments.training.records import Records
from gnp_optax.experiments.training.trainer import Trainer

pytestmark = pytest.mark.exhaustive

CONFIG = dataclasses.replace(
    tiny.TINY, model="mlp", methods=("plain", "sam"), checkpoint_minutes=0, keep_parameters=True
)
EPOCHS = len(CONFIG.methods) * CONFIG.seeds * CONFIG.epochs
# So many flips in each kind of file, and so many processes that are killed.
FLIPS = 25
KILLS = int(os.environ.get("FAULT_KILLS", "5"))


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

    def of(self, config, *_, **__):
        self.trainer.config = config
        return self.trainer

    def start(self, folder, **options):
        """Return what the command ends with if it fails, and what it warns of."""
        config = dataclasses.replace(CONFIG, out=folder, **options)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            patch.setattr(compare, "Trainer", self.of)
            patch.setattr(compare, "load", lambda *_: self.data)
            patch.setattr(figures, "draw", lambda *_: None)
            patch.setitem(__main__.COMMANDS, "compare", lambda _: compare.compare(config))
            error = None
            try:
                __main__.main([])
            except SystemExit as ended:
                error = str(ended.code)
                assert error.startswith("error: ")
                assert "\n" not in error
        return error, [str(warning.message) for warning in caught]


@pytest.fixture(scope="module")
def runner():
    return Runner()


@pytest.fixture(scope="module")
def whole(runner, tmp_path_factory):
    """The folder of a comparison that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert runner.start(folder) == (None, [])
    return folder


def lines(folder):
    """The epochs on file, by run and number; but a line that was cut."""
    texts = (folder / "runs.jsonl").read_text().rpartition("\n")[0].splitlines()[1:]
    return {(x["method"], x["seed"], x["epoch"]): x for x in map(json.loads, texts)}


def outcome(folder):
    """What must always be the same, by the name of the file: all but times, and other orders."""
    found = {path.name: None for path in folder.iterdir() if ".damaged-" not in path.name}
    found |= {path.name: path.read_bytes() for path in folder.glob("*-parameters.msgpack")}
    times = ("seconds_per_step", "checksum")
    found["runs.jsonl"] = {
        key: json.dumps({k: v for k, v in line.items() if k not in times})
        for key, line in lines(folder).items()
    }
    rows = json.loads((folder / "summary.json").read_text())
    found["summary.json"] = json.dumps([{**row, "time_per_step": None} for row in rows])
    return found


def damaged(folder):
    return [path.read_bytes() for path in folder.glob("*.damaged-*")]


# Kills and full disks, at every write.


class Killed(BaseException):
    """A process that has this is dead: whatever it would still do to the disk fails as well."""


class Writes:
    """Counts what is done to a folder, and lets it fail from one time on.

    A file is created, written in two halves, forced to the disk, renamed, removed: each is a step.
    """

    def __init__(self, folder, first, error):
        self.folder, self.first, self.error = folder, first, error
        self.steps = 0

    def step(self):
        self.steps += 1
        if self.steps >= self.first:
            raise self.error()

    def is_of(self, path):
        # What is forced to the disk is known by a number.
        return isinstance(path, int) or Path(os.fsdecode(path)).is_relative_to(self.folder)

    def wrapped(self, function):
        def of_path(path, *args, **kwargs):
            if self.is_of(path):
                self.step()
            return function(path, *args, **kwargs)

        return of_path

    def created(self, path, flags, *args, **kwargs):
        if flags & os.O_CREAT and self.is_of(path):
            self.step()
        return _CREATE(path, flags, *args, **kwargs)

    def opened(self, path, mode="r", *args, **kwargs):
        if not set(mode) & set("wax+") or isinstance(path, int) or not self.is_of(path):
            return _OPEN(path, mode, *args, **kwargs)
        self.step()
        return _InHalves(_OPEN(path, mode, *args, **kwargs), self)

    @contextlib.contextmanager
    def patched(self):
        names = ["fsync", "mkdir", "chmod", "replace", "rename"]
        # To remove something, a full disk has room.
        names += ["unlink", "remove"] if self.error is Killed else []
        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(os, name, self.wrapped(getattr(os, name)))
            patch.setattr(os, "open", self.created)
            for module in (io, builtins):
                patch.setattr(module, "open", self.opened)
            yield


_CREATE, _OPEN = os.open, io.open


class _InHalves:
    """A file that is open for writing."""

    def __init__(self, file, writes):
        self.file, self.writes = file, writes

    def write(self, content):
        middle = len(content) // 2
        for part in (content[:middle], content[middle:]):
            self.writes.step()
            self.file.write(part)
            self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def faults(runner, folder, prepare, error):
    """Let each step be the first that fails, in a folder of its own.

    Yields the folder and what was said.
    """
    for first in range(1, 1000):
        out = folder / str(first)
        prepare(out)
        writes = Writes(out, first, error)
        runner.trained, said = 0, (None, [])
        with contextlib.suppress(Killed), writes.patched():
            said = runner.start(out)
        if writes.steps < first:
            assert first > 30
            print(f"{first - 1} faults")
            return
        yield out, said
        shutil.rmtree(out, ignore_errors=True)  # a kill may have come before it


def test_a_kill_at_every_write(runner, whole, tmp_path):
    for out, _ in faults(runner, tmp_path, lambda _: None, Killed):
        assert runner.start(out) == (None, [])
        assert outcome(out) == outcome(whole)
        # Of each method that is being trained, at most the epoch that is not on the disk yet.
        assert runner.trained <= EPOCHS + len(CONFIG.methods)


def with_a_damaged_line(whole, out):
    """Make a folder of a comparison that has finished, of which a line is damaged."""
    shutil.copytree(whole, out)
    path = out / "runs.jsonl"
    path.write_text(path.read_text().replace('"epoch": 2', '"epoch": 3', 1))
    return path.read_bytes()


def test_a_kill_at_every_write_of_a_start_with_a_damaged_file(runner, whole, tmp_path):
    content = with_a_damaged_line(whole, tmp_path / "other")
    prepare = lambda out: with_a_damaged_line(whole, out)  # noqa: E731
    for out, _ in faults(runner, tmp_path, prepare, Killed):
        assert runner.start(out)[0] is None
        assert outcome(out) == outcome(whole)
        assert set(damaged(out)) == {content}
        assert runner.trained <= CONFIG.epochs + 1


def full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_disk_that_is_full_at_every_write(runner, whole, tmp_path, is_damaged):
    def prepare(out):
        if is_damaged:
            with_a_damaged_line(whole, out)

    for out, (error, _) in faults(runner, tmp_path, prepare, full):
        assert str(out) in error
        assert f"can't be written: {full().strerror}. Free some space" in error
        assert runner.start(out)[0] is None  # there is space again
        assert outcome(out) == outcome(whole)
        assert runner.trained <= EPOCHS + len(CONFIG.methods)


def test_what_a_full_disk_has_left_of_a_run_is_not_in_front_of_the_next(tmp_path):
    records = Records(dataclasses.replace(CONFIG, out=tmp_path))
    runs = [(method, 0) for method in CONFIG.methods]
    epochs = {
        (m, seed): [{"method": m, "seed": seed, "epoch": i} for i in (1, 2)] for m, seed in runs
    }
    with pytest.raises(OSError, match="can't be written"), Writes(tmp_path, 3, full).patched():
        records.append({runs[0]: epochs[runs[0]]})
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) > 1
    records.append({runs[1]: epochs[runs[1]]})
    assert Records(dataclasses.replace(CONFIG, out=tmp_path)).runs == {runs[1]: epochs[runs[1]]}


# Flipped bits.


@pytest.fixture
def flips(tmp_path):
    """Flip bits of a file that are different every time; yields the content, and the folder."""
    seed = int(time.time_ns() % 2**32)
    print(f"flips of the seed {seed}")  # shown where a test fails
    random = np.random.default_rng(seed)

    def flip(source, name):
        for i in range(FLIPS):
            folder = tmp_path / str(i)
            shutil.copytree(source, folder)
            content = bytearray((folder / name).read_bytes())
            at, bit = int(random.integers(len(content))), int(random.integers(8))
            print(f"{name}: bit {bit} of byte {at}")
            content[at] ^= 1 << bit
            (folder / name).write_bytes(content)
            _digest_of.cache_clear()  # which is of files by their times, and these are of one
            yield folder, bytes(content)
            shutil.rmtree(folder)

    return flip


def test_a_flip_in_the_file_of_runs(runner, whole, flips):
    for folder, content in flips(whole, "runs.jsonl"):
        runner.trained = 0
        error, said = runner.start(folder)
        if error is not None:  # in the first line, which says what the file is of
            assert "runs.jsonl" in error
            assert (folder / "runs.jsonl").read_bytes() == content
            continue
        assert outcome(folder) == outcome(whole)
        assert damaged(folder) == [content] * len(said)
        assert all("runs.jsonl" in warning for warning in said)
        assert runner.trained <= 2 * CONFIG.epochs
        assert said or runner.trained == 0  # as where 1e-5 has become 1E-5


@pytest.fixture(scope="module")
def unfinished(runner, tmp_path_factory):
    """The folder of a run that was killed after it had saved its first epoch."""
    folder = tmp_path_factory.mktemp("unfinished")
    for out, _ in faults(runner, folder / "tried", lambda _: None, Killed):
        if list(out.glob("plain-seeds-0.msgpack")):
            shutil.copytree(out, folder / "found")
            return folder / "found"


def test_a_flip_in_a_checkpoint(runner, whole, unfinished, flips):
    for folder, content in flips(unfinished, "plain-seeds-0.msgpack"):
        error, (said,) = runner.start(folder)
        assert error is None
        assert "plain-seeds-0.msgpack is damaged" in said
        assert damaged(folder) == [content]
        assert outcome(folder) == outcome(whole)


@pytest.mark.parametrize("name", [".lock", ".holder"])
def test_what_a_killed_process_has_left_of_its_hold_may_be_damaged(runner, whole, flips, name):
    for i, (folder, _) in enumerate(flips(whole, "runs.jsonl")):
        shutil.copy(whole / "runs.jsonl", folder)
        (folder / name).write_bytes(bytes([i, 255 - i]) * i)
        assert runner.start(folder) == (None, [])
        assert outcome(folder) == outcome(whole)


def test_a_flip_in_kept_parameters_that_a_run_starts_from(runner, whole, flips, tmp_path):
    name = "sam-1-parameters.msgpack"
    (tmp_path / "begun").mkdir()
    begun = {"pretrained": whole / name, "out": tmp_path / "begun"}
    Records(dataclasses.replace(CONFIG, **begun))
    for folder, _ in flips(whole, name):
        error, _ = runner.start(folder / "new", pretrained=folder / name)
        assert f"{folder / name} is damaged" in error
        error, _ = runner.start(tmp_path / "begun", pretrained=folder / name)
        assert "runs.jsonl was made with other options: pretrained" in error


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.txt", {"dataset": "text", "model": "gpt"}),
        ("train-00000-of-00001.parquet", {"dataset": "cifar10"}),
    ],
)
def test_a_flip_in_the_data_of_a_run(runner, flips, tmp_path, name, options):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(b"As on file, so in mind. " * 99)
    out = tmp_path / "out"
    out.mkdir()
    Records(dataclasses.replace(CONFIG, out=out, data_dir=tmp_path / "data", **options))
    before = (out / "runs.jsonl").read_bytes()
    for folder, _ in flips(tmp_path / "data", name):
        error, _ = runner.start(out, data_dir=folder, **options)
        assert "runs.jsonl was made with other options: " in error
        assert (out / "runs.jsonl").read_bytes() == before


# Processes.

TRAINED = (
    *("--recipe", "digits-vit", "--model", "mlp", "--methods", "plain", "sam", "--width", "8"),
    *("--depth", "1", "--heads", "1", "--batch-size", "256", "--probe-examples", "16"),
    *("--epochs", "50", "--warmup-epochs", "2", "--checkpoint-minutes", "0"),
    *("--validation-examples", "0", "--seeds", str(KILLS)),
)


@contextlib.contextmanager
def process(folder):
    """A process of the command, which need not import it anew, for it is forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__main__.__name__])
    started = context.Process(target=__main__.main, args=([*TRAINED, "--out", str(folder)],))
    started.start()
    try:
        yield started
    finally:
        started.kill()
        started.join()


def has_saved(folder, since):
    """Whether a checkpoint has been written since some time; one may vanish meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime_ns > since for path in folder.glob("*.msgpack"))


def test_processes_that_are_killed_at_random_moments_of_training(tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    with process(whole) as alone:
        alone.join()
        assert alone.exitcode == 0
    random = np.random.default_rng()
    finished, kills = {}, 0
    while kills < KILLS:
        before = time.time_ns()
        with process(out) as started:
            while started.is_alive() and not has_saved(out, before):
                time.sleep(0.01)
            if not kills:
                (out / ".holder").write_bytes(b"\xff\x00" + (out / ".holder").read_bytes())
                with pytest.raises(SystemExit, match=f"error: .*process {started.pid} on .* --out"):
                    __main__.main([*TRAINED, "--out", str(out)])
            started.join(random.uniform(0, 0.8))
            if not started.is_alive():  # it has finished before
                break
            os.kill(started.pid, signal.SIGKILL)
            started.join()
        kills += 1
        print(f"{kills} kills")
        assert (out / ".lock").exists()
        now = lines(out)
        last = max(epoch for *_, epoch in lines(whole))
        finished |= {(m, seed, i): x for (m, seed, i), x in now.items() if (m, seed, last) in now}
    assert kills
    with process(out) as last:
        last.join()
        assert last.exitcode == 0
    assert outcome(out) == outcome(whole)
    # With their times: none was done again.
    assert all(lines(out)[key] == line for key, line in finished.items())
