"""The options of the comparison."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from gnp_optax.experiments.methods import STANDARD, Method

Dataset = Literal["digits", "cifar10", "text"]
Model = Literal["vit", "resnet", "wide-resnet", "gpt"]

_CONNECTION = ("coordinator", "processes", "process_id")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Which runs, and where they go."""

    recipe: str | None = None
    """A named setting, such as vit-ti or resnet20, of all options below; those given beside it
    change it. Add --help to see it. Without one: that of the name of the data set."""
    methods: tuple[Method, ...] = STANDARD
    """Methods to compare. Times are relative to plain. layerwise penalizes --layers layers within
    --budget, layerwise-4 any 4, layerwise-budget as many as fit in --budget."""
    seeds: int = 3
    """Runs per method; a seed sets initialisation, order of examples, augmentation, dropout."""
    out: Path | None = None
    """Folder for the results. Without it: results/DATASET-HASH, a hash of the options below."""
    checkpoint_minutes: float = 5.0
    """How often an unfinished run is saved, at the end of an epoch, so that it can go on. (Not with
    several processes: these begin an unfinished run anew.)"""
    keep_parameters: bool = False
    """Write the parameters of every finished run to METHOD-SEED-parameters.msgpack."""


@dataclasses.dataclass(frozen=True)
class DeviceOptions:
    """What they run on."""

    distributed: bool = False
    """Train on all devices, of this process and of all that are started with it. On a cluster whose
    launcher JAX knows (Slurm, Cloud TPU, ...), and with one process, the three options below are
    not needed."""
    coordinator: str | None = None
    """Address of the first process, such as host:1234."""
    processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What is learned."""

    dataset: Dataset = "digits"
    """scikit-learn's 8x8 digits (offline), CIFAR-10, or the characters of a text."""
    data_dir: Path | None = None
    """Folder with CIFAR-10 as Parquet files (without it: uoft-cs/cifar10 from the Hugging Face
    hub), or with the text as *.txt files."""
    classes: tuple[int, ...] | None = None
    """Use only the examples of these classes."""
    train_examples: int | None = None
    """Use only the first so many training examples."""
    length: int = 128
    """Characters of a training example, of a text."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What learns."""

    model: Model = "vit"
    """Vision Transformer; ResNet and WideResNet of 32x32 images; GPT, for text."""
    patch_size: int = 2
    """Side of a patch in pixels, of a Vision Transformer."""
    width: int = 32
    """Width of a transformer, or of a ResNet's first stage."""
    depth: int = 2
    """Blocks of a transformer, or of each stage of a ResNet."""
    heads: int = 2
    """Attention heads."""
    dropout: float = 0.0
    """Dropout rate of a transformer: of residual branches, attention weights and embeddings."""
    class_token: bool = False
    """Classify by an extra token, as the first Vision Transformer did, not by the tokens' mean."""
    head: Literal["zero", "normal"] = "zero"
    """How the head of a Vision Transformer starts. While it is zero, so are all other gradients."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the layers compute in; parameters and optimizer state are float32."""
    pretrained: Path | None = None
    """Fine-tune an image model: start from a file that --keep-parameters has written, all but the
    head."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How it learns."""

    epochs: int = 30
    """Passes over the training set."""
    warmup_epochs: int = 6
    """Length of the learning-rate warmup and of the regularization's three warmups. Where --epochs
    is given alone, this keeps its share of it."""
    batch_size: int = 32
    """Examples per step."""
    test_every: int = 1
    """Epochs from one test to the next; after the last epoch there always is one."""
    optimizer: Literal["adamw", "rmsprop", "sgd"] = "adamw"
    """AdamW; RMSProp (decay 0.9) with decoupled weight decay; SGD with momentum 0.9."""
    learning_rate: float = 8e-3
    """Peak of the learning rate, after a linear warmup from 0."""
    decay: Literal["cosine", "steps"] = "cosine"
    """After the warmup: a cosine to 0, or a tenth after 2/3 and after 8/9 of the training."""
    weight_decay: float = 0.3
    """Weight decay: decoupled, for SGD coupled."""
    clip_norm: float = 5.0
    """Largest norm of the gradient that the optimizer sees."""


@dataclasses.dataclass(frozen=True)
class RegularizationOptions:
    """What is compared with plain training."""

    r: float = 0.1
    """Radius of the perturbation (the r of GR, the rho of SAM), and of the reported sharpness."""
    alpha: float = 0.8
    """Weight of the perturbed gradient in GR, lambda / r. That of SAM is 1."""
    m: int | None = None
    """Examples that a perturbation is computed from (m-sharpness). Without it: the whole batch."""
    layers: int = 4
    """Layers that layer-wise GR penalizes: those of largest gradient norm, selected every epoch."""
    budget: float | None = None
    """Largest cost of a step of layer-wise GR in ordinary gradients, such as 1.2: of the layers of
    largest gradient norm, those are taken that fit, --layers of them at most."""
    selections: int = 8
    """Largest number of selections in a run of layer-wise GR, since each is compiled. When it is
    reached, a selection that is new is not taken, and the one before stays."""
    probe_examples: int = 256
    """Training examples that measure gradient norm and sharpness and select layers."""


@dataclasses.dataclass(frozen=True)
class Config(
    RegularizationOptions, TrainingOptions, ModelOptions, DataOptions, DeviceOptions, RunOptions
):
    """The options of a comparison; on the command line, each class is a group of them."""

    def __post_init__(self) -> None:
        """Check the values."""
        _check_numbers(self)
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError("--warmup-epochs must be less than --epochs, and not negative.")
        if self.width % self.heads:
            raise ValueError("--width must be a multiple of --heads.")
        known = set(self.methods) <= set(get_args(Method))
        if not self.methods or not known or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods must be some of {get_args(Method)}, each of them once.")
        if "layerwise-budget" in self.methods and self.budget is None:
            raise ValueError("The method layerwise-budget needs --budget, such as 1.25.")
        if self.m is not None and self.batch_size % self.m:
            raise ValueError("--m must divide --batch-size.")
        given = [option(name) for name in _CONNECTION if getattr(self, name) is not None]
        if given and not self.distributed:
            raise ValueError(f"{', '.join(given)} is for --distributed, which is missing.")
        if given and len(given) < len(_CONNECTION):
            wanted = ", ".join(map(option, _CONNECTION))
            raise ValueError(
                f"Of {wanted} give all or none: with {', '.join(given)} alone they can't be found."
            )
        if self.dataset == "digits" and self.data_dir is not None:
            raise ValueError(
                "--data-dir is for --dataset cifar10 and text; the digits come with the code."
            )
        if (self.dataset == "text") != (self.model == "gpt"):
            raise ValueError("--dataset text and --model gpt belong together.")
        _check_effects(self)

    @property
    def options(self) -> dict[str, Any]:
        """What determines a run: neither where the results go nor how many runs there are."""
        options = {
            field.name: getattr(self, field.name)
            for group in (DataOptions, ModelOptions, TrainingOptions, RegularizationOptions)
            for field in dataclasses.fields(group)
            if field.name != "data_dir"
        }
        # Files by what they hold: another text in the same folder is another run.
        options["pretrained"] = self.pretrained and _digest([self.pretrained])
        if self.dataset == "text" and self.data_dir is not None:
            options["text"] = _digest(sorted(self.data_dir.glob("*.txt")))
        if self.distributed:  # the order of the examples depends on it
            options["devices"] = jax.device_count()
        as_on_file: dict[str, Any] = json.loads(json.dumps(options))
        return as_on_file

    @property
    def folder(self) -> Path:
        """Where the results go."""
        digest = hashlib.sha256(json.dumps(self.options, sort_keys=True).encode()).hexdigest()
        return self.out or Path("results") / f"{self.dataset}-{digest[:8]}"


def option(name: str) -> str:
    """Return a field's name as it is written on the command line."""
    return "--" + name.replace("_", "-")


def _digest(files: list[Path]) -> str:
    missing = [file for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(f"There is no file {missing[0]}.")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _check_effects(config: Config) -> None:
    """Raise for options that would have no effect."""
    transformer, vit = config.model in ("vit", "gpt"), config.model == "vit"
    without_effect = {
        "--classes": config.classes is not None and config.dataset == "text",
        "--pretrained": config.pretrained is not None and config.model == "gpt",
        "--dropout": config.dropout > 0 and not transformer,
        "--class-token": config.class_token and not vit,
        "--head normal": config.head == "normal" and not vit,
    }
    for name, is_so in without_effect.items():
        if is_so:
            raise ValueError(f"{name} has no effect on --model {config.model}.")
    if "gr-plain-statistics" in config.methods and (config.optimizer == "sgd" or config.m):
        raise ValueError(
            "gr-plain-statistics needs second moments, so no --optimizer sgd, nor --m."
        )


def _check_numbers(config: Config) -> None:
    positive = (
        *("seeds", "epochs", "batch_size", "layers", "selections", "patch_size", "length", "width"),
        *("depth", "heads", "probe_examples", "learning_rate", "clip_norm", "r"),
        *("train_examples", "test_every", "m"),
    )
    for name in positive:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{option(name)} must be positive, got {value}.")
    for name in ("alpha", "weight_decay", "checkpoint_minutes"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{option(name)} must not be negative: {getattr(config, name)}.")
    if config.budget is not None and not 1 < config.budget < math.inf:
        raise ValueError(f"--budget must be more than 1, a plain step, got {config.budget}.")
    if not 0 <= config.dropout < 1:
        raise ValueError("--dropout must lie in [0, 1).")
