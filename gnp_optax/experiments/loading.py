"""The data of a configuration."""

from gnp_optax.experiments import data
from gnp_optax.experiments.config import Config


def load(config: Config, part: tuple[int, int]) -> data.Data:
    """Return the data; of the training examples a process's part, `part` (i, n)."""
    if config.classes or config.train_examples:
        # What a process takes depends on all examples that are chosen.
        whole = _load(config, (0, 1))
        chosen = data.of_classes(whole, config.classes) if config.classes else whole
        return data.part_of(chosen, part, config.train_examples)
    return _load(config, part)


def _load(config: Config, part: tuple[int, int]) -> data.Data:
    match config.dataset:
        case "digits":
            return data.digits(part)
        case "cifar10":
            return data.cifar10(config.data_dir, part)
        case "text":
            return data.text(config.data_dir, config.length, part)
