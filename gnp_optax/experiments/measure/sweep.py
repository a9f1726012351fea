"""`python -m gnp_optax.experiments sweep`: choose the settings of a recipe's methods."""

import dataclasses
import itertools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
import tyro

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data.loading import load
from gnp_optax.experiments.methods import Method
from gnp_optax.experiments.recipes import named
from gnp_optax.experiments.report.table import STYLES, markdown
from gnp_optax.experiments.training.records import environment, held, parsed, replace, written
from gnp_optax.experiments.training.trainer import Trainer

Settings = dict[str, float]
# Not those of the comparison, which starts at 0.
_FIRST_SEED = 1000


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Choose learning rate, radii and weight decays on the validation examples.

    Every method gets a grid of the same size. Plain training goes first, over learning rates and
    weight decays; then each method at its learning rate, over radii and weight decays (label
    smoothing: over its share in place of the radius; twice the epochs: over learning rates). What
    counts is the validation error after the last epoch, the mean over seeds that the comparison
    does not have. Prints the table and the settings; writes every result to sweep.jsonl under
    --out, and goes on from there when it is started again.
    """

    recipe: str = "noisy-digits"
    """A named setting of the comparison."""
    data_dir: Path | None = None
    """Folder with the data set, as in the comparison."""
    methods: tuple[Method, ...] | None = None
    """Methods to choose for, beside plain. Without it: all of the recipe."""
    label_noise: float | None = None
    """Share of wrong labels. Without it: that of the recipe."""
    seeds: int = 5
    """Runs of every setting."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Learning rates of plain training."""
    weight_decays: tuple[float, ...] = (0.05, 0.5, 1.0, 2.0)
    """Weight decays of all methods."""
    radii: tuple[float, ...] = (0.2, 0.4, 0.8)
    """Radii of the methods that have one; as many as learning rates."""
    smoothings: tuple[float, ...] = (0.1, 0.2, 0.4)
    """Shares of label smoothing; as many as learning rates."""
    out: Path | None = None
    """Folder for the results. Without it: results/sweep-RECIPE."""

    def __post_init__(self) -> None:
        """Check the values."""
        named(self.recipe)
        sizes = {len(self.learning_rates), len(self.radii), len(self.smoothings)}
        if len(sizes) > 1:
            raise ValueError(
                "Of --learning-rates, --radii and --smoothings give the same number, so that every "
                "method has a grid of the same size."
            )

    @property
    def comparison(self) -> Config:
        """The options of the comparison, tested after the last epoch alone."""
        config = named(self.recipe)
        noise = config.label_noise if self.label_noise is None else self.label_noise
        return dataclasses.replace(
            config,
            settings=(),
            methods=("plain",),
            data_dir=self.data_dir,
            label_noise=noise,
            test_every=10_000,
        )

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("results") / f"sweep-{self.recipe}"

    def grid(self, method: Method, learning_rate: float) -> Iterator[Settings]:
        """Yield the settings of a method."""
        if method in ("plain", "plain-twice"):
            first: Any = [{"learning_rate": x} for x in self.learning_rates]
        elif method == "plain-label-smoothing":
            first = [{"label_smoothing": x} for x in self.smoothings]
        else:
            first = [{"r": x} for x in self.radii]
        for own, decay in itertools.product(first, self.weight_decays):
            yield {"learning_rate": learning_rate, **own, "weight_decay": decay}


def run(args: Sequence[str]) -> None:
    """Read the options, try all settings, print the table and what was chosen."""
    config = tyro.cli(SweepConfig, prog="python -m gnp_optax.experiments sweep", args=args)
    command = shlex.join(["python", "-m", "gnp_optax.experiments", "sweep", *args])
    with held(config.folder):
        _sweep(config, command)


def _sweep(config: SweepConfig, command: str) -> None:
    sweep = Sweep(config, command)
    plain = sweep.best("plain")
    chosen = {"plain": plain}
    asked = named(config.recipe).methods if config.methods is None else config.methods
    for method in asked:
        if method not in ("plain", "plain-weight-decay"):
            chosen[method] = sweep.best(method, plain["learning_rate"])
    text = sweep.table()
    replace(config.folder / "sweep.md", text.encode())
    print(text)
    print(f"--learning-rate {plain['learning_rate']:g} --settings", *_as_options(chosen))


def _as_options(chosen: dict[Any, Settings]) -> list[str]:
    """Return what was chosen as the comparison takes it."""
    decay = f"plain-weight-decay:weight_decay={chosen['plain']['weight_decay']:g}"
    own = [
        f"{method}:{name}={value:g}"
        for method, settings in chosen.items()
        for name, value in settings.items()
        if method != "plain" and (name != "learning_rate" or method == "plain-twice")
    ]
    return [decay, *own]


class Sweep:
    """The results so far, by method and settings, and the file that holds them."""

    def __init__(self, config: SweepConfig, command: str) -> None:
        self._config = config
        self._path = config.folder / "sweep.jsonl"
        self._found: list[dict[str, Any]] = []
        config.folder.mkdir(parents=True, exist_ok=True)
        header = {"options": config.comparison.options, "seeds": config.seeds}
        if self._path.exists() and self._path.stat().st_size:
            first, *lines = self._read()
            if {name: first[name] for name in header} != header:
                raise ValueError(
                    f"{self._path} was made with other options. Choose another folder with --out."
                )
            self._first, self._found = first, lines
        else:
            stamp = {"command": command, "has_checksums": True, **environment()}
            self._first = {**header, **stamp}
            self._write()
        self._trainer = Trainer(config.comparison, load(config.comparison, (0, 1)))

    def _read(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        texts = self._path.read_text(errors="replace").splitlines()
        for number, text in enumerate(texts, start=1):
            # A file of an earlier version has no checksums.
            line = parsed(text, bool(lines) and "has_checksums" in lines[0])
            needed = {"options", "seeds"} if number == 1 else {"method", "settings"}
            if line is None or not needed <= line.keys():
                raise ValueError(
                    f"{self._path}, line {number}, is damaged. Remove the line, to have its "
                    f"setting tried again, or choose another folder with --out."
                )
            lines.append(line)
        return lines

    def _write(self) -> None:
        replace(self._path, written([self._first, *self._found]).encode())

    def best(self, method: Method, learning_rate: float = 0.0) -> Settings:
        """Return the settings of least validation error, having tried all of them."""
        grid = list(self._config.grid(method, learning_rate))
        results = [
            self._of(method, settings) for settings in tqdm.tqdm(grid, desc=method, unit="setting")
        ]
        return grid[int(np.argmin([np.mean(errors) for errors in results]))]

    def table(self) -> str:
        """Write all results as a Markdown table."""
        names = ("learning_rate", "weight_decay", "r", "label_smoothing")
        rows: list[Sequence[str]] = [("method", *names, "validation error, %")]
        for line in self._found:
            values = (f"{line['settings'][n]:g}" if n in line["settings"] else "-" for n in names)
            error = f"{np.mean(line['validation_errors']):.2f}"
            rows.append((STYLES[line["method"]][0], *values, error))
        return markdown(rows)

    def _of(self, method: Method, settings: Settings) -> list[float]:
        for line in self._found:
            if line["method"] == method and line["settings"] == settings:
                return [float(error) for error in line["validation_errors"]]
        seeds = list(range(_FIRST_SEED, _FIRST_SEED + self._config.seeds))
        together = self._trainer.config.seeds_together
        groups = [seeds] if together else [[seed] for seed in seeds]
        errors = [error for group in groups for error in self._errors(method, group, settings)]
        line = {"method": method, "settings": settings, "validation_errors": errors}
        self._found.append(line)
        self._write()
        return errors

    def _errors(self, method: Method, seeds: list[int], settings: Settings) -> list[float]:
        try:
            *_, last = self._trainer.run(method, seeds, settings=settings)
        except FloatingPointError:  # it diverges, which is as bad as can be
            return [100.0] * len(seeds)
        return [float(metrics["validation_error"]) for metrics in last]
