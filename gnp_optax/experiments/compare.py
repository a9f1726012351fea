"""The comparison: train every method with every seed, and report."""

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import tqdm
import tyro

from gnp_optax.experiments import config as groups
from gnp_optax.experiments.config import Config, option
from gnp_optax.experiments.data.loading import load
from gnp_optax.experiments.methods import Method
from gnp_optax.experiments.recipes import RECIPES, named
from gnp_optax.experiments.report import figures, summary, table
from gnp_optax.experiments.training import devices, workers
from gnp_optax.experiments.training.checkpoints import Checkpoint, remove_finished
from gnp_optax.experiments.training.records import Epoch, Records, Run, held, replace
from gnp_optax.experiments.training.trainer import Trainer
from gnp_optax.experiments.training.workers import Group

DESCRIPTION = f"""Train a model once per method and seed, and compare.

Prints a table, and writes it, figures and every metric of every epoch under --out. A run that has
finished is never repeated, and one that was interrupted goes on from its last checkpoint: start the
same command again.

Recipes: {", ".join(RECIPES)}. With --recipe and --help, the defaults shown are those of the
recipe.

Commands: compare, which is this one and needs no name; sweep, which chooses settings; curve, which
draws several comparisons; cost, precision and throughput. Each has a --help of its own."""


@dataclasses.dataclass(frozen=True)
class _Groups:
    runs: groups.RunOptions
    data: groups.DataOptions
    model: groups.ModelOptions
    training: groups.TrainingOptions
    regularization: groups.RegularizationOptions
    devices: groups.DeviceOptions


def run(args: Sequence[str]) -> None:
    """Read the options, compare, and print the table."""
    start = time.perf_counter()
    config = parse(args)
    devices.connect(config)
    print(compare(config, spawns=True), end="")
    if devices.is_first():
        minutes = (time.perf_counter() - start) / 60
        print(
            f"\nWrote table.md, summary.json, figures and runs.jsonl to {config.folder} "
            f"({minutes:.1f} minutes)."
        )


def parse(args: Sequence[str]) -> Config:
    """Read the options; the recipe, or else the data set, decides the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "dataset", "epochs"):
        parser.add_argument(option(name))
    given = parser.parse_known_args(args)[0]
    name = given.recipe or (given.dataset if given.dataset in RECIPES else "noisy-digits")
    default = _without(named(name), args)
    if (given.epochs or "").isdecimal() and int(given.epochs) > 0:
        default = default.of_epochs(int(given.epochs))
    config = _from_command_line(args, default)
    if name.endswith("finetuning") and config.pretrained is None:
        raise ValueError(
            f"--recipe {name} needs --pretrained, a file that --recipe "
            f"{name.replace('finetuning', 'pretraining')} writes to its folder."
        )
    return config


def _without(recipe: Config, args: Sequence[str]) -> Config:
    """Return the recipe without the methods' own settings of options that are given for all."""
    given = {arg.partition("=")[0] for arg in args}

    def is_kept(setting: str) -> bool:
        return option(setting.partition(":")[2].partition("=")[0]) not in given

    if "--methods" in given:  # which may not be those that the settings are for
        recipe = dataclasses.replace(recipe, methods=("plain",))
    kept = tuple(filter(is_kept, recipe.settings))
    controls = {setting.partition(":")[0] for setting in recipe.settings if setting not in kept}
    methods = tuple(m for m in recipe.methods if m not in controls or m != "plain-weight-decay")
    return dataclasses.replace(recipe, settings=kept, methods=methods)


def _from_command_line(args: Sequence[str], default: Config) -> Config:
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(_Groups):
        group: Any = field.type
        parts[field.name] = group(
            **{f.name: getattr(default, f.name) for f in dataclasses.fields(group)}
        )
    found = tyro.cli(
        tyro.conf.OmitArgPrefixes[_Groups],
        prog="python -m gnp_optax.experiments",
        description=DESCRIPTION,
        args=args,
        default=_Groups(**parts),
    )
    return Config(**{k: v for field in parts for k, v in vars(getattr(found, field)).items()})


def compare(config: Config, *, spawns: bool = False) -> str:
    """Do all runs that are not done yet, write the results, and return the table.

    With `spawns` it starts processes of its own where several small runs at a time are faster. Of
    the processes of a distributed run, all train and the first one writes; the others return
    nothing.
    """
    if not devices.is_first():
        return _compared(config, None, spawns)
    with held(config.folder):
        return _compared(config, Records(config), spawns)


def _compared(config: Config, records: Records | None, spawns: bool) -> str:
    # Seeds outermost: what slows the machine down for a while then slows all methods alike.
    wanted = [(method, seed) for seed in range(config.seeds) for method in config.methods]
    done = [run in records.runs for run in wanted] if records else None
    if config.distributed:
        done = devices.agreed(done, len(wanted))
    missing = [run for run, is_done in zip(wanted, done or [], strict=True) if not is_done]
    if records and len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {records.path} already.")
        if config.keep_parameters:
            print("Of these, --keep-parameters keeps nothing: for that they would be done again.")
    if missing:
        groups = _grouped(config, missing)
        _train(config, groups, records, workers.count(config, groups) if spawns else 1)
    if records is None:
        return ""
    remove_finished(config, records.runs)
    return _reported(config, {run: records.runs[run] for run in wanted})


def _grouped(config: Config, missing: list[Run]) -> list[Group]:
    """Return the runs by method and seeds that are trained at once."""
    if not config.seeds_together:
        return [(method, [seed]) for method, seed in missing]
    seeds: dict[Method, list[int]] = {}
    for method, seed in missing:
        seeds.setdefault(method, []).append(seed)
    return list(seeds.items())


def _train(config: Config, groups: list[Group], records: Records | None, processes: int) -> None:
    total = sum(config.own(method).epochs for method, _ in groups)
    if processes > 1:
        events = workers.train(config, groups, processes)
    else:
        part = jax.process_index(), jax.process_count()
        events = workers.in_turn(Trainer(config, load(config, part)), groups)
    epochs: dict[Method, list[Epoch]] = {}  # of what is being trained
    bar = tqdm.tqdm(total=total, unit="epoch", disable=records is None)
    with contextlib.closing(events), bar:
        for (method, seeds), epoch in events:
            if epoch is None:
                epochs[method] = []
                bar.set_description(f"{_named(epochs, seeds)}: compiling")
                continue
            epochs[method].append(epoch)
            bar.set_description(_named(epochs, seeds), refresh=False)
            error = sum(metrics["test_error"] for metrics in epoch) / len(epoch)
            if error == error:
                bar.set_postfix_str(f"test error {error:.1f} %", refresh=False)
            bar.update()
            if len(epochs[method]) == config.own(method).epochs:
                run = epochs.pop(method)
                if records:
                    records.append(
                        {(method, seed): [x[i] for x in run] for i, seed in enumerate(seeds)}
                    )
                    Checkpoint(config, method, seeds).remove()


def _named(methods: Iterable[Method], seeds: list[int]) -> str:
    return ", ".join([*methods, f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"])


def _reported(config: Config, runs: table.Runs) -> str:
    """Write the table, the summary and the figures, and return what to print."""
    if note := table.selections(runs):
        print(note)
    found = summary.of(runs)
    text = f"{table.table(found)}\n{summary.sentence(found)}\n"
    replace(config.folder / "table.md", text.encode())
    replace(config.folder / "summary.json", (json.dumps(found, indent=1) + "\n").encode())
    replace(config.folder / "epochs.csv.gz", summary.epochs(runs))
    noise = f", {100 * config.label_noise:g} % wrong labels" if config.label_noise else ""
    data = {"digits": "digits", "cifar10": "CIFAR-10", "text": "a text"}[config.dataset]
    seeds = f"{config.seeds} seeds" if config.seeds > 1 else "1 seed"
    title = f"{_MODELS[config.model]} on {data}{noise}, {seeds}"
    figures.draw(runs, found, title, config.warmup_epochs, config.folder)
    return text


_MODELS = {
    "mlp": "MLP",
    "vit": "ViT",
    "resnet": "ResNet",
    "wide-resnet": "WideResNet",
    "gpt": "GPT",
}
