"""The file of finished runs, which an interruption cannot damage."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import optax

from gnp_optax import __version__
from gnp_optax.experiments.config import Config
from gnp_optax.experiments.methods import Method

Metrics = dict[str, Any]
Run = tuple[Method, int]
Epoch = list[Metrics]  # of every seed of a run


class Records:
    """The metrics of every epoch of every finished run, in `runs.jsonl`.

    The first line holds the options and the versions; each further line one epoch. A run is
    appended whole when it has finished, so that a run is in the file completely or not at all; what
    an interruption may leave of a run that was being appended is dropped at the next start.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.folder / "runs.jsonl"
        self.runs: dict[Run, list[Metrics]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = _read(self.path)
        if lines and not (isinstance(lines[0], dict) and "options" in lines[0]):
            raise ValueError(f"{self.path} was not written by this program. Choose another --out.")
        if lines and lines[0]["options"] != config.options:
            raise ValueError(
                f"{self.path} was made with other options: {_differences(lines[0], config)}. "
                f"Choose another folder with --out, or remove that one."
            )
        for line in lines[1:]:
            self.runs.setdefault((line["method"], line["seed"]), []).append(line)
        complete = {
            run: epochs
            for run, epochs in self.runs.items()
            if len(epochs) == config.own(run[0]).epochs
        }
        self.runs = complete
        header = lines[0] if lines else {"options": config.options, **environment()}
        kept = [header, *(line for epochs in complete.values() for line in epochs)]
        replace(self.path, _text(kept).encode())

    def append(self, finished: Mapping[Run, list[Metrics]]) -> None:
        """Add finished runs, to the file first."""
        with self.path.open("a") as file:
            file.write("".join(map(_text, finished.values())))
            file.flush()
            os.fsync(file.fileno())
        self.runs.update(finished)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text().splitlines(keepends=True), start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if not text.endswith("\n"):  # the last line of a run that was being appended
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
    return lines


def _text(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def replace(path: Path, content: bytes) -> None:
    """Write a file whole: there is never a moment with half of it."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)  # a rename, which is atomic


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
        "device": f"{device.device_kind}, {_cpu_cores()} CPU cores",
    }


def _cpu_cores() -> int | None:
    """Return how many this process may use: JAX splits its work by that, and so rounds by it."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
