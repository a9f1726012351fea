"""An unfinished run on disk, so that it can go on after an interruption."""

import json
import time
from pathlib import Path
from typing import Any

import flax.serialization
import jax

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.records import Metrics, Run

State = Any


class Checkpoint:
    """The file of one run: its options, the metrics of the epochs done, and the state after them.

    A rename puts it in place, so that there is never a moment with half a file.
    """

    def __init__(self, config: Config, run: Run) -> None:
        self.path: Path = config.folder / f"{run[0]}-{run[1]}.msgpack"
        self._options = json.dumps(config.options, sort_keys=True)
        self._seconds = 60 * config.checkpoint_minutes
        self._saved = time.monotonic()

    def keep(self, state: State, done: list[Metrics]) -> None:
        """Save, if it is time to."""
        if time.monotonic() - self._saved >= self._seconds:
            self.save(state, done)
            self._saved = time.monotonic()

    def save(self, state: State, done: list[Metrics]) -> None:
        """Replace what was saved before."""
        key = jax.random.key_data(state.key)
        content = {
            "options": self._options,
            "epochs": json.dumps(done),
            "state": flax.serialization.to_state_dict(state._replace(key=key)),
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(flax.serialization.msgpack_serialize(jax.device_get(content)))
        temporary.replace(self.path)

    def load(self, fresh: State) -> tuple[State, list[Metrics]]:
        """Return what was saved, or the fresh state and no epochs if nothing was."""
        if not self.path.exists():
            return fresh, []
        content = flax.serialization.msgpack_restore(self.path.read_bytes())
        if content["options"] != self._options:
            raise ValueError(
                f"{self.path} was made with other options. Choose another folder with --out, or "
                f"remove it."
            )
        raw = fresh._replace(key=jax.random.key_data(fresh.key))
        restored: Any = flax.serialization.from_state_dict(raw, content["state"])
        restored = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), restored, raw)
        state = restored._replace(key=jax.random.wrap_key_data(restored.key))
        return state, json.loads(content["epochs"])

    def remove(self) -> None:
        """Remove the file: the run has finished."""
        self.path.unlink(missing_ok=True)
