"""The data of a configuration."""

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data import datasets


def load(config: Config, part: tuple[int, int]) -> datasets.Data:
    """Return the data; of the training examples a process's part, `part` (i, n)."""
    is_whole = not (config.classes or config.train_examples or config.validation_examples)
    data = _load(config, part if is_whole else (0, 1))
    if config.image_size:
        data = datasets.halved(data, config.image_size)
    data = data._replace(augmented=data.augmented and config.augment)
    if is_whole:
        return data
    # What a process takes depends on all examples that are chosen.
    if config.classes:
        data = datasets.of_classes(data, config.classes)
    data = datasets.set_apart(data, config.validation_examples)
    return datasets.part_of(data, part, config.train_examples)


def _load(config: Config, part: tuple[int, int]) -> datasets.Data:
    match config.dataset:
        case "digits":
            return datasets.digits(part)
        case "cifar10":
            return datasets.cifar10(config.data_dir, part)
        case "text":
            return datasets.text(config.data_dir, config.length, part)
