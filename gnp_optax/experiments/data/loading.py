"""The data of a configuration."""

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data import datasets


def load(config: Config, part: tuple[int, int]) -> datasets.Data:
    """Return the data; of the training examples a process's part, `part` (i, n)."""
    if config.classes or config.train_examples:
        # What a process takes depends on all examples that are chosen.
        whole = _load(config, (0, 1))
        chosen = datasets.of_classes(whole, config.classes) if config.classes else whole
        return datasets.part_of(chosen, part, config.train_examples)
    return _load(config, part)


def _load(config: Config, part: tuple[int, int]) -> datasets.Data:
    match config.dataset:
        case "digits":
            return datasets.digits(part)
        case "cifar10":
            return datasets.cifar10(config.data_dir, part)
        case "text":
            return datasets.text(config.data_dir, config.length, part)
