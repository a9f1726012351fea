"""Runs on disk: an unfinished one, so that it can go on, and what a finished one has learned."""

import hashlib
import json
import re
import time
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import jax

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.methods import Method
from gnp_optax.experiments.training.records import Epoch, Run, replace, set_aside

State = Any


class Checkpoint:
    """The file of a run, or of several together: options, metrics so far, and the state."""

    def __init__(self, config: Config, method: Method, seeds: Sequence[int]) -> None:
        self.path: Path = config.folder / f"{method}-seeds-{'-'.join(map(str, seeds))}.msgpack"
        # Of the second form of the state: an optimizer of small networks has one array.
        self._options = json.dumps({**config.options, "state": 2}, sort_keys=True)
        self._seconds = 60 * config.checkpoint_minutes
        self._saved = time.monotonic()

    def keep(self, state: State, done: list[Epoch]) -> None:
        """Save, if it is time to."""
        if time.monotonic() - self._saved >= self._seconds:
            self.save(state, done)
            self._saved = time.monotonic()

    def save(self, state: State, done: list[Epoch]) -> None:
        """Replace what was saved before."""
        key = jax.random.key_data(state.key)
        content = {
            "options": self._options,
            "epochs": json.dumps(done),
            "state": flax.serialization.to_state_dict(state._replace(key=key)),
        }
        _write(self.path, content)

    def load(self, fresh: State) -> tuple[State, list[Epoch]]:
        """Return what was saved, or the fresh state and no epochs if nothing was."""
        if not self.path.exists():
            return fresh, []
        try:
            content = _read(self.path)
            if not {"options", "epochs", "state"} <= content.keys():
                raise _DamagedError(f"{self.path} is damaged.")
        except _DamagedError as error:
            kept = set_aside(self.path)
            warnings.warn(
                f"{error} It is kept as {kept.name}, and the run begins anew.", stacklevel=2
            )
            return fresh, []
        if content.get("options") != self._options:
            raise ValueError(
                f"{self.path} was made with other options. Choose another folder with --out, or "
                f"remove it."
            )
        raw = fresh._replace(key=jax.random.key_data(fresh.key))
        restored = _placed(flax.serialization.from_state_dict(raw, content["state"]), raw)
        state = restored._replace(key=jax.random.wrap_key_data(restored.key))
        return state, json.loads(content["epochs"])

    def remove(self) -> None:
        """Remove the file: the run has finished."""
        self.path.unlink(missing_ok=True)


def remove_finished(config: Config, finished: Collection[Run]) -> None:
    """Remove the files of runs that have finished, which an interruption may leave."""
    for path in config.folder.glob("*.msgpack"):
        match = re.fullmatch(r"(.+)-seeds-(\d+(?:-\d+)*)", path.stem)
        if match and all((match[1], int(seed)) in finished for seed in match[2].split("-")):
            path.unlink()


def keep_parameters(config: Config, run: Run, state: State) -> None:
    """Write what a run has learned to a file of its own."""
    content = {"params": state.params, "statistics": state.statistics}
    path = config.folder / f"{run[0]}-{run[1]}-parameters.msgpack"
    _write(path, flax.serialization.to_state_dict(content))


def pretrained(path: Path, fresh: State) -> State:
    """Return a fresh state with the parameters of a file, all but those of the head.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If its parameters are those of another model.
    """
    if not path.exists():
        raise FileNotFoundError(f"--pretrained: there is no file {path}.")
    try:
        content = _read(path)
    except _DamagedError as error:
        raise ValueError(f"--pretrained: {error} Write it anew: --keep-parameters.") from error
    if not {"params", "statistics"} <= content.keys():
        raise ValueError(f"--pretrained: {path} was not written by --keep-parameters.")
    learned, new = ({**x, "head": None} for x in (content["params"], fresh.params))
    shapes = [jax.tree.map(jax.numpy.shape, x) for x in (learned, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{path} holds the parameters of another model.")
    params = {**content["params"], "head": fresh.params["head"]}
    given = fresh._replace(params=params, statistics=content["statistics"])
    return _placed(given, fresh)


# Begins a file, before the digest of what follows. A file of an earlier version has neither.
_MAGIC = b"gnp_optax 1 "


class _DamagedError(ValueError):
    """A file is not what was written."""


def _read(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    if content.startswith(_MAGIC):
        start = len(_MAGIC) + hashlib.sha256().digest_size
        digest, content = content[len(_MAGIC) : start], content[start:]
        if hashlib.sha256(content).digest() != digest:
            raise _DamagedError(f"{path} is damaged: it does not match its checksum.")
    try:
        read: Any = flax.serialization.msgpack_restore(content)
    except Exception as error:  # msgpack raises errors of many kinds
        raise _DamagedError(f"{path} is damaged.") from error
    if not isinstance(read, dict):
        raise _DamagedError(f"{path} is damaged.")
    return read


def _write(path: Path, content: Any) -> None:
    body = flax.serialization.msgpack_serialize(jax.device_get(content))
    replace(path, _MAGIC + hashlib.sha256(body).digest() + body)


def _placed(state: State, like: State) -> State:
    return jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), state, like)
