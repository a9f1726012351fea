"""Named settings: the papers', and smaller ones."""

import dataclasses
from typing import Any

from gnp_optax.experiments.config import Config
from gnp_optax.experiments.methods import CONTROLS, WARMUPS, Method

_LAYERWISE: tuple[Method, ...] = (
    *("plain", "gr", "sam"),
    *("layerwise-1", "layerwise-2", "layerwise-4", "layerwise-8", "layerwise-budget"),
)

# Zhao et al. 2024: ViT on CIFAR-10, AdamW, learning-rate warmup for 40 of 300 epochs.
_VIT_TI = Config(
    dataset="cifar10",
    methods=WARMUPS,
    epochs=300,
    warmup_epochs=40,
    batch_size=256,
    learning_rate=1e-3,
    alpha=1.0,
    patch_size=4,
    width=192,
    depth=12,
    heads=3,
    dropout=0.1,
    class_token=True,
    dtype="bfloat16",
    validation_examples=5000,
    probe_examples=1024,
)
# Lee 2024, as far as it is known: SGD with momentum, steps at 2/3 and 8/9.
_RESNET20 = Config(
    dataset="cifar10",
    methods=_LAYERWISE,
    epochs=150,
    warmup_epochs=0,
    batch_size=128,
    optimizer="sgd",
    learning_rate=0.1,
    decay="steps",
    weight_decay=1e-4,
    budget=1.25,
    model="resnet",
    width=16,
    depth=3,
    heads=1,
    dtype="bfloat16",
    validation_examples=5000,
    probe_examples=1024,
)

# A transformer for characters, of a usual size.
_TEXT = Config(
    dataset="text",
    methods=_LAYERWISE,
    epochs=10,
    warmup_epochs=1,
    batch_size=64,
    learning_rate=1e-3,
    weight_decay=0.1,
    clip_norm=1.0,
    budget=1.25,
    model="gpt",
    length=256,
    width=384,
    depth=6,
    heads=6,
    dropout=0.2,
    dtype="bfloat16",
)

# The same, of a size that a few CPU cores train in an hour.
_SMALL: Any = {
    "train_examples": 7680,
    "validation_examples": 2000,
    "test_every": 5,
    "dtype": "float32",
    "probe_examples": 512,
}
_SMALL_VIT = dataclasses.replace(
    _VIT_TI,
    epochs=15,
    warmup_epochs=2,
    batch_size=128,
    patch_size=8,
    width=64,
    depth=4,
    heads=4,
    **_SMALL,
)
_SMALL_RESNET = dataclasses.replace(_RESNET20, epochs=10, width=8, depth=1, **_SMALL)
_SMALL_TEXT = dataclasses.replace(
    _TEXT,
    epochs=5,
    batch_size=32,
    learning_rate=3e-3,
    train_examples=4096,
    length=64,
    width=64,
    depth=4,
    heads=4,
    dropout=0.0,
    dtype="float32",
)


# A task that plain training memorises: three of ten labels are wrong. Radii and weight decays were
# chosen on the validation examples, with other seeds than those reported: `sweep` does it anew.
_NOISY_DIGITS = Config(
    methods=(
        *("plain", *CONTROLS, *WARMUPS[1:], "sam", "layerwise-last"),
        *("momentum-sam", "stale-sam", "hybrid-sam"),
    ),
    settings=(
        *("plain-weight-decay:weight_decay=8", "plain-twice:weight_decay=2"),
        *("plain-twice:learning_rate=0.01", "plain-label-smoothing:label_smoothing=0.1"),
        *("plain-label-smoothing:weight_decay=8", "sam:r=0.2", "sam:weight_decay=4"),
        *("gr:r=0.2", "gr:weight_decay=4", "gr-r-warmup:r=0.2", "gr-r-warmup:weight_decay=8"),
        *("gr-lambda-warmup:r=0.2", "gr-lambda-warmup:weight_decay=8"),
        *("gr-zero-warmup:r=0.2", "gr-zero-warmup:weight_decay=4"),
        *("layerwise-last:r=1.2", "layerwise-last:weight_decay=8"),
        *("momentum-sam:r=0.05", "momentum-sam:weight_decay=8"),
        *("stale-sam:r=0.1", "stale-sam:weight_decay=8"),
        *("hybrid-sam:r=0.05", "hybrid-sam:weight_decay=8"),
        *("sam-every-2:r=0.2", "sam-every-2:weight_decay=8"),
        *("sam-every-5:r=0.2", "sam-every-5:weight_decay=8"),
        *("sam-last-quarter:r=0.2", "sam-last-quarter:weight_decay=8"),
    ),
    seeds=10,
    seeds_together=True,
    label_noise=0.3,
    epochs=60,
    warmup_epochs=10,
    test_every=2,
    batch_size=64,
    learning_rate=3e-4,
    weight_decay=0.1,
    model="mlp",
    width=256,
    depth=3,
    heads=1,
    budget=1.25,
    probe_examples=64,
)

# A Vision Transformer with learning-rate warmup, on the same task: when GR harms early, and cures.
_NOISY_DIGITS_VIT = dataclasses.replace(
    _NOISY_DIGITS,
    methods=(*WARMUPS, "gr-after-warmup"),
    settings=(),
    seeds=8,
    epochs=40,
    warmup_epochs=8,
    test_every=4,
    learning_rate=3e-3,
    weight_decay=0.05,
    alpha=1.0,
    model="vit",
    patch_size=4,
    width=32,
    depth=4,
    heads=2,
    head="normal",
)
# A ResNet that fits its images, some of them with wrong labels: 16x16, so that CPUs can train it.
_NOISY_CIFAR10 = dataclasses.replace(
    _RESNET20,
    methods=(
        *("plain", "plain-label-smoothing", "plain-twice"),
        *("sam", "stale-sam", "hybrid-sam", "layerwise-last-1"),
    ),
    settings=(
        *("plain-label-smoothing:label_smoothing=0.1", "plain-label-smoothing:weight_decay=0.005"),
        *("plain-twice:learning_rate=0.2", "plain-twice:weight_decay=0.0005"),
        *("sam:r=0.2", "sam:weight_decay=0.005"),
        *("stale-sam:r=0.2", "stale-sam:weight_decay=0.005"),
        *("hybrid-sam:r=0.2", "hybrid-sam:weight_decay=0.0005"),
        *("layerwise-last-1:r=0.8", "layerwise-last-1:weight_decay=0.0005"),
    ),
    seeds=5,
    label_noise=0.4,
    train_examples=2000,
    validation_examples=2000,
    image_size=16,
    augment=False,
    epochs=24,
    warmup_epochs=1,
    decay="cosine",
    learning_rate=0.2,
    weight_decay=5e-4,
    test_every=2,
    width=16,
    depth=1,
    r=0.2,
    dtype="float32",
    probe_examples=512,
    budget=1.35,
)
# The same with AdamW and a longer warmup, in which GR harms. Of two learning rates the better one
# for plain training, by one seed.
_NOISY_CIFAR10_WARMUP = dataclasses.replace(
    _NOISY_CIFAR10,
    methods=(*WARMUPS, "gr-after-warmup"),
    settings=(),
    seeds=10,
    warmup_epochs=6,
    optimizer="adamw",
    learning_rate=1e-3,
    weight_decay=0.05,
    alpha=1.0,
    r=0.4,
)

# A text of 64,000 characters, which a small transformer learns by heart.
_MEMORISED_TEXT = dataclasses.replace(
    _SMALL_TEXT,
    methods=("plain", "sam", "layerwise-last-1"),
    train_examples=1000,
    epochs=30,
    warmup_epochs=2,
    test_every=2,
    r=0.1,
    budget=None,
)

RECIPES: dict[str, Config] = {
    "noisy-digits": _NOISY_DIGITS,
    "digits": dataclasses.replace(_NOISY_DIGITS, label_noise=0.0),
    "noisy-digits-vit": _NOISY_DIGITS_VIT,
    "noisy-cifar10": _NOISY_CIFAR10,
    "noisy-cifar10-warmup": _NOISY_CIFAR10_WARMUP,
    "memorised-text": _MEMORISED_TEXT,
    # Learning rate and weight decay chosen for plain training, r and alpha the papers'.
    "digits-vit": Config(),
    "cifar10": Config(
        dataset="cifar10",
        epochs=60,
        warmup_epochs=8,
        batch_size=128,
        learning_rate=1e-3,
        patch_size=4,
        width=96,
        depth=6,
        heads=3,
        validation_examples=5000,
        probe_examples=1024,
    ),
    "vit-ti": _VIT_TI,
    "vit-s": dataclasses.replace(_VIT_TI, width=384, heads=6),
    "vit-b": dataclasses.replace(_VIT_TI, width=768, heads=12),
    "resnet20": _RESNET20,
    "wrn-28-10": dataclasses.replace(
        _RESNET20, epochs=200, weight_decay=5e-4, model="wide-resnet", width=160, depth=4
    ),
    "small-vit": _SMALL_VIT,
    "smaller-vit": dataclasses.replace(_SMALL_VIT, width=32, depth=3, heads=2),
    "small-resnet": _SMALL_RESNET,
    "text": _TEXT,
    "small-text": _SMALL_TEXT,
}
# A Vision Transformer learns five classes of CIFAR-10, and is fine-tuned on the other five.
for _name, _base in (("vit-ti", _VIT_TI), ("small-vit", _SMALL_VIT)):
    RECIPES[f"{_name}-pretraining"] = dataclasses.replace(
        _base, methods=("plain",), seeds=1, classes=(0, 1, 2, 3, 4), keep_parameters=True
    )
    RECIPES[f"{_name}-finetuning"] = dataclasses.replace(
        _base.of_epochs(_base.epochs // 3),
        methods=_LAYERWISE,
        classes=(5, 6, 7, 8, 9),
        optimizer="sgd",
        learning_rate=0.01,
        weight_decay=0.0,
        budget=1.25,
    )


def named(name: str) -> Config:
    """Return the recipe of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"--recipe must be one of {', '.join(RECIPES)}, got {name!r}.")
    return RECIPES[name]
