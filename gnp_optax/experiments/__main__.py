"""`python -m gnp_optax.experiments`: train, print the table, write the results.

With a subcommand: measure costs (`cost`), what low precision does (`precision`), or how long the
device waits for the runner (`throughput`), instead.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import jax
import tqdm
import tyro

from gnp_optax.experiments import cost, devices, figures, precision, report, throughput
from gnp_optax.experiments.checkpoints import Checkpoint
from gnp_optax.experiments.config import Config, option
from gnp_optax.experiments.loading import load
from gnp_optax.experiments.recipes import RECIPES, named, of_epochs
from gnp_optax.experiments.records import Records, Run
from gnp_optax.experiments.training import Trainer


def parse(args: Sequence[str]) -> Config:
    """Read the options; the recipe, or else the data set, decides the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "dataset", "epochs"):
        parser.add_argument(option(name))
    given = parser.parse_known_args(args)[0]
    name = given.recipe or (given.dataset if given.dataset in RECIPES else "digits")
    default = named(name)
    if (given.epochs or "").isdigit() and int(given.epochs) > 0:
        default = of_epochs(default, int(given.epochs))
    config = tyro.cli(Config, prog="python -m gnp_optax.experiments", args=args, default=default)
    if name.endswith("finetuning") and config.pretrained is None:
        raise ValueError(
            f"--recipe {name} needs --pretrained, a file that --recipe "
            f"{name.replace('finetuning', 'pretraining')} writes to its folder."
        )
    return config


def compare(config: Config) -> str:
    """Do all runs that are not done yet, write the results, and return the table.

    Of several processes, all train and the first one writes; the others return nothing.
    """
    records = Records(config) if devices.is_first() else None
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
        _train(config, missing, records)
    return "" if records is None else _reported(config, {run: records.runs[run] for run in wanted})


def _train(config: Config, missing: list[Run], records: Records | None) -> None:
    part = jax.process_index(), jax.process_count()
    trainer = Trainer(config, load(config, part))
    total = len(missing) * config.epochs
    with tqdm.tqdm(total=total, unit="epoch", disable=records is None) as bar:
        for method, seed in missing:
            bar.set_description(f"{method}, seed {seed}")
            # Of several processes, not all may see the folder.
            alone = jax.process_count() == 1
            checkpoint = Checkpoint(config, (method, seed)) if alone else None
            epochs = []
            for metrics in trainer.run(method, seed, checkpoint):
                epochs.append(metrics)
                bar.set_postfix_str(f"test error {metrics['test_error']:.1f} %", refresh=False)
                bar.update()
            if records:
                records.append((method, seed), epochs)
            if checkpoint:
                checkpoint.remove()


def _reported(config: Config, runs: report.Runs) -> str:
    """Write the table and the figures, and return the table."""
    if note := report.selections(runs):
        print(note)
    table = report.table(runs)
    (config.folder / "table.md").write_text(table)
    band = f"{config.seeds} seeds (band: smallest to largest)" if config.seeds > 1 else "1 seed"
    names = {"vit": "ViT", "resnet": "ResNet", "wide-resnet": "WideResNet", "gpt": "GPT"}
    title = f"{names[config.model]} on {config.dataset}, {band}"
    figures.draw(runs, title, config.warmup_epochs, config.folder)
    return table


def main() -> None:
    """Read the options and run the comparison, or the subcommand."""
    subcommands = {"cost": cost.main, "precision": precision.main, "throughput": throughput.main}
    if sys.argv[1:] and sys.argv[1] in subcommands:
        subcommands[sys.argv[1]](sys.argv[2:])
        return
    start = time.perf_counter()
    try:
        config = parse(sys.argv[1:])
        devices.connect(config)
        print(compare(config), end="")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. What is done is kept: start the same command again to go on.")
    if not devices.is_first():
        return
    minutes = (time.perf_counter() - start) / 60
    print(f"\nWrote table.md, figures and runs.jsonl to {config.folder} ({minutes:.1f} minutes).")


if __name__ == "__main__":
    main()
