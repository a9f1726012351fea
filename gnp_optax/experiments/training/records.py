"""The file of finished runs, which an interruption cannot damage."""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import optax
from filelock import FileLock, Timeout

from gnp_optax import __version__
from gnp_optax.experiments.config import Config
from gnp_optax.experiments.methods import Method
from gnp_optax.experiments.training.devices import cpu_cores

# It can only be read by setting it: once, before there are threads.
_UMASK = os.umask(0o077)
os.umask(_UMASK)

Metrics = dict[str, Any]
Run = tuple[Method, int]
Epoch = list[Metrics]  # of every seed of a run


class Records:
    """The metrics of every epoch of every finished run, in `runs.jsonl`.

    The first line holds the options and the versions; each further line one epoch. A run is
    appended whole when it has finished, so that a run is in the file completely or not at all; what
    an interruption may leave of a run that was being appended is dropped at the next start. Each
    line ends in a checksum. Where one does not match, the file is kept under another name, and the
    run that the line is of is done again.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.folder / "runs.jsonl"
        self.runs: dict[Run, list[Metrics]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header, epochs, damaged = _read(self.path)
        if header is not None and header["options"] != config.options:
            raise ValueError(
                f"{self.path} was made with other options: {_differences(header, config)}. "
                f"Choose another folder with --out, or remove that one."
            )
        if damaged:
            # A copy: until the file is written anew, there is no other one with the whole runs.
            kept = _free(self.path)
            replace(kept, self.path.read_bytes())
            warnings.warn(
                f"{self.path}: {', '.join(damaged)}. It is kept as {kept.name}, and the runs "
                f"that these are of are done again.",
                stacklevel=2,
            )
        for epoch in epochs:
            self.runs.setdefault((epoch["method"], epoch["seed"]), []).append(epoch)
        self.runs = {
            run: each
            for run, each in self.runs.items()
            if [epoch["epoch"] for epoch in each] == [*range(1, config.own(run[0]).epochs + 1)]
        }
        header = header or {"options": config.options, "has_checksums": True, **environment()}
        finished = (epoch for each in self.runs.values() for epoch in each)
        content = written([header, *finished]).encode()
        replace(self.path, content)
        self._end = len(content)

    def append(self, finished: Mapping[Run, list[Metrics]]) -> None:
        """Add finished runs, to the file first."""
        with _writing(self.path), self.path.open("r+b") as file:
            file.truncate(self._end)  # a disk that was full may have left a part of another run
            file.seek(self._end)
            file.write("".join(map(written, finished.values())).encode())
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()
        self.runs.update(finished)


def read(path: Path) -> tuple[dict[str, Any], list[Metrics]]:
    """Return the options of finished runs, and their epochs, as far as they are not damaged."""
    header, epochs, _ = _read(path)
    return (header or {}).get("options", {}), epochs


def _read(path: Path) -> tuple[dict[str, Any] | None, list[Metrics], list[str]]:
    """Return the header, the epochs, and which lines are damaged."""
    if not path.exists():
        return None, [], []
    header, epochs, damaged = None, [], []
    texts = path.read_text(errors="replace").splitlines(keepends=True)
    for number, text in enumerate(texts, start=1):
        # A file of an earlier version has no checksums.
        line = parsed(text, header is not None and header.get("has_checksums", False))
        if number == 1:
            if line is None or "options" not in line:
                raise ValueError(
                    f"{path}, line 1, which says what the runs are of, is damaged, or was not "
                    f"written by this program. Choose another --out; the file is kept."
                )
            header = line
        elif line is not None and {"method", "seed", "epoch"} <= line.keys():
            epochs.append(line)
        elif number < len(texts) or text.endswith("\n") or parsed(text[:-1], False):
            damaged.append(f"line {number} is damaged")
        # Else it is the last line of a run that was being appended, and was cut.
    return header, epochs, damaged


def parsed(text: str, has_checksum: bool) -> dict[str, Any] | None:
    """Return what a line holds, or None if it is not what was written.

    A line that says that there are checksums needs one itself.
    """
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(line, dict):
        return None
    checksum = line.pop("checksum", None)
    has_checksum = has_checksum or "has_checksums" in line
    is_right = checksum == _checksum(line) or (checksum is None and not has_checksum)
    return line if is_right else None


def written(lines: Iterable[dict[str, Any]]) -> str:
    """Return lines as they stand in a file, each with a checksum."""
    checked = ({**line, "checksum": _checksum(line)} for line in lines)
    return "".join(json.dumps(line) + "\n" for line in checked)


def _checksum(line: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line).encode()).hexdigest()[:12]


def set_aside(path: Path) -> Path:
    """Rename a damaged file, and return its path."""
    return path.rename(_free(path))


def _free(path: Path) -> Path:
    """Return a name for what is damaged that no file has."""
    names = (path.with_name(f"{path.name}.damaged-{i}") for i in itertools.count())
    return next(name for name in names if not name.exists())


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, so that no other process writes to it; one that has died holds nothing.

    Raises:
        ValueError: If another process holds it.
    """
    lock, holder = FileLock(folder / ".lock"), folder / ".holder"
    try:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        try:
            who = holder.read_text(errors="replace")
        except FileNotFoundError:  # it has just begun, or just ended
            who = "another process"
        raise ValueError(
            f"{folder} is being written by {who}. Wait for it, or choose another --out."
        ) from None
    try:
        replace(holder, f"process {os.getpid()} on {platform.node()}".encode())
        for left in folder.glob(".*.tmp"):  # by a process that was killed
            left.unlink()
        yield
    finally:
        for path in (holder, folder / ".lock"):
            path.unlink(missing_ok=True)
        lock.release()


def replace(path: Path, content: bytes) -> None:
    """Write a file whole: there is never a moment with half of it."""
    # Of a name that nobody can have put a link at.
    with (
        _writing(path),
        tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file,
    ):
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_UMASK)
            temporary.replace(path)  # a rename, which is atomic
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say which file can't be written, which the system does not, and how to go on."""
    try:
        yield
    except Timeout:
        raise
    except OSError as error:
        raise OSError(
            f"{path} can't be written: {error.strerror or error}. Free some space, or make it "
            f"writable, and start the same command again: what is done is kept."
        ) from error


def _differences(header: dict[str, Any], config: Config) -> str:
    made, asked = header["options"], config.options
    names = [name for name in {**made, **asked} if made.get(name) != asked.get(name)]
    return ", ".join(f"{n} {made.get(n)!r} instead of {asked.get(n)!r}" for n in names)


def environment() -> dict[str, Any]:
    """Return the versions of what is used, and the device."""
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            "gnp_optax": __version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "flax": flax.__version__,
        },
        "device": f"{device.device_kind}, {len(cpu_cores())} CPU cores",
    }
