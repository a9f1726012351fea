"""`python -m gnp_optax.experiments`: train, print the table, write the results.

With the subcommand `cost`: measure costs instead.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import tqdm
import tyro

from gnp_optax.experiments import cost, data, report
from gnp_optax.experiments.config import DEFAULTS, Config
from gnp_optax.experiments.records import Records
from gnp_optax.experiments.training import Trainer


def parse(args: Sequence[str]) -> Config:
    """Read the options; which data set it is decides the defaults of the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset")
    dataset = parser.parse_known_args(args)[0].dataset
    default = DEFAULTS.get(dataset, DEFAULTS["digits"])
    return tyro.cli(Config, prog="python -m gnp_optax.experiments", args=args, default=default)


def compare(config: Config) -> str:
    """Do all runs that are not done yet, write the results, and return the table."""
    records = Records(config)
    # Seeds outermost: what slows the machine down for a while then slows all methods alike.
    wanted = [(method, seed) for seed in range(config.seeds) for method in config.methods]
    missing = [run for run in wanted if run not in records.runs]
    if len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are in {records.path} already.")
    if missing:
        loaded = data.digits() if config.dataset == "digits" else data.cifar10(config.data_dir)
        trainer = Trainer(config, loaded)
        with tqdm.tqdm(total=len(missing) * config.epochs, unit="epoch") as bar:
            for method, seed in missing:
                bar.set_description(f"{method}, seed {seed}")
                epochs = []
                for metrics in trainer.run(method, seed):
                    epochs.append(metrics)
                    bar.set_postfix_str(f"test error {metrics['test_error']:.1f} %", refresh=False)
                    bar.update()
                records.append((method, seed), epochs)
    runs = {run: records.runs[run] for run in wanted}
    if note := report.selections(runs):
        print(note)
    table = report.table(runs)
    (config.folder / "table.md").write_text(table)
    band = f"{config.seeds} seeds (band: smallest to largest)" if config.seeds > 1 else "1 seed"
    title = f"ViT on {config.dataset}, {band}"
    report.figure(runs, title, config.warmup_epochs, config.folder / "curves.png")
    return table


def main() -> None:
    """Read the options and run the comparison, or the subcommand."""
    if sys.argv[1:2] == ["cost"]:
        cost.main(sys.argv[2:])
        return
    start = time.perf_counter()
    try:
        config = parse(sys.argv[1:])
        print(compare(config), end="")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. Finished runs are kept: start the same command again to go on.")
    minutes = (time.perf_counter() - start) / 60
    print(
        f"\nWrote table.md, curves.png and runs.jsonl to {config.folder} ({minutes:.1f} minutes)."
    )


if __name__ == "__main__":
    main()
