"""A comparison that takes a second: few digits, and a model that is barely one."""

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.data import datasets as data

TINY = Config(
    seeds=2,
    epochs=2,
    warmup_epochs=1,
    batch_size=16,
    patch_size=4,
    width=8,
    depth=1,
    heads=1,
    layers=2,
    probe_examples=16,
    validation_examples=0,
)


def digits():
    """64 digits to train on, so 4 steps an epoch, and 48 to test."""
    loaded = data.digits()
    train, test = (data.Split(*(x[:n] for x in s)) for s, n in zip(loaded, (64, 48), strict=False))
    return loaded._replace(train=train, test=test)
