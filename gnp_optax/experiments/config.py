"""The options of the comparison."""

import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from gnp_optax.experiments.methods import STANDARD, Method

Dataset = Literal["digits", "cifar10", "text"]
Model = Literal["mlp", "vit", "resnet", "wide-resnet", "gpt"]

_CONNECTION = ("coordinator", "processes", "process_id")
# What a method may have of its own, without another program.
_OWN = (
    *("r", "alpha", "layers", "budget", "learning_rate", "weight_decay", "label_smoothing"),
    *("epochs", "warmup_epochs"),
)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Which runs, and where they go."""

    recipe: str | None = None
    """A named setting, such as vit-ti or resnet20, of all options below; those given beside it
    change it. Add --help to see it. Without one: that of the name of the data set."""
    methods: tuple[Method, ...] = STANDARD
    """Methods to compare. Times are relative to plain. layerwise penalizes --layers layers within
    --budget, layerwise-4 any 4, layerwise-budget as many as fit in --budget."""
    settings: tuple[str, ...] = ()
    """Options of single methods, such as sam:r=0.4 plain-weight-decay:weight_decay=2. A recipe has
    those that were chosen on its validation examples; one that is given as an option of its own,
    such as --r, is then that of all methods."""
    seeds: int = 3
    """Runs per method; a seed sets initialisation, order of examples, augmentation, dropout, and
    which labels are wrong."""
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
    validation_examples: int = 240
    """Examples that are taken from the end of the training set, always the same and with clean
    labels, to choose settings by."""
    label_noise: float = 0.0
    """Probability that a training label is replaced by that of another class, 0 to 0.9."""
    image_size: int | None = None
    """Side of the images of CIFAR-10, 16 or 8, for means over 2x2 or 4x4 pixels; without it 32."""
    augment: bool = True
    """Whether images of CIFAR-10 are cropped and flipped at random."""
    length: int = 128
    """Characters of a training example, of a text."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What learns."""

    model: Model = "vit"
    """Multilayer perceptron; Vision Transformer; ResNet and WideResNet; GPT, for text."""
    patch_size: int = 2
    """Side of a patch in pixels, of a Vision Transformer."""
    width: int = 32
    """Width of a transformer, of a ResNet's first stage, of a perceptron's first layer (each layer
    after it is half as wide)."""
    depth: int = 2
    """Blocks of a transformer, hidden layers of a perceptron, blocks of each stage of a ResNet."""
    heads: int = 2
    """Attention heads."""
    layer_norm: bool = True
    """Whether the layers of a perceptron are normalised."""
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
    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes; not in tests."""
    seeds_together: bool = False
    """Train all seeds of a method at once, by vmap: for models so small that one alone leaves the
    device idle. Layers of largest gradient norm are then those of the mean norm over the seeds."""


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
        for method in ("layerwise-budget", "layerwise-last", "hybrid-sam"):
            if method in self.methods and self.budget is None:
                raise ValueError(f"The method {method} needs --budget, such as 1.25.")
        decays = [s for s in self.settings if s.startswith("plain-weight-decay:weight_decay=")]
        if "plain-weight-decay" in self.methods and not decays:
            raise ValueError(
                "The method plain-weight-decay needs a weight decay of its own: "
                "--settings plain-weight-decay:weight_decay=2."
            )
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
        for setting in self.settings:
            _parsed(setting)
        for method in self.methods:
            if self.settings:
                self.own(method)

    def own(self, method: Method) -> "Config":
        """Return the options of one method: those of its settings, and of a control its own."""
        changes = {k: v for m, k, v in map(_parsed, self.settings) if m == method}
        if method == "plain-label-smoothing":
            changes = {"label_smoothing": 0.1, **changes}
        config = dataclasses.replace(self, methods=("plain",), settings=(), **changes)
        if method == "plain-twice":
            config = config.of_epochs(2 * config.epochs)
        return config

    def of_epochs(self, epochs: int) -> "Config":
        """Return the same training of another length; its warmup keeps its share."""
        warmup = round(self.warmup_epochs * epochs / self.epochs)
        return dataclasses.replace(self, epochs=epochs, warmup_epochs=min(warmup, epochs - 1))

    @property
    def options(self) -> dict[str, Any]:
        """What determines a run: neither where the results go nor how many runs there are."""
        options = {
            field.name: getattr(self, field.name)
            for group in (DataOptions, ModelOptions, TrainingOptions, RegularizationOptions)
            for field in dataclasses.fields(group)
            if field.name != "data_dir"
        }
        options["settings"] = sorted(self.settings)
        # Files by what they hold: another text in the same folder is another run.
        options["pretrained"] = self.pretrained and _digest([self.pretrained])
        if self.dataset == "text" and self.data_dir is not None:
            options["text"] = _digest(sorted(self.data_dir.glob("*.txt")))
        if self.dataset == "cifar10" and self.data_dir is not None:
            options["images"] = _digest(sorted(self.data_dir.rglob("*.parquet")))
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


def _parsed(setting: str) -> tuple[str, str, Any]:
    """Return method, field and value of a setting such as `sam:r=0.4`."""
    method, _, assignment = setting.partition(":")
    name, _, text = assignment.partition("=")
    if method not in get_args(Method) or name not in _OWN:
        raise ValueError(
            f"--settings: {setting!r} is not of the form METHOD:OPTION=VALUE with one of the "
            f"options {', '.join(_OWN)}, such as sam:r=0.4."
        )
    try:
        return method, name, json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--settings: {text!r} in {setting!r} is no number.") from error


def _digest(files: list[Path]) -> str:
    missing = [file for file in files if not file.exists()]
    if missing:
        raise FileNotFoundError(f"There is no file {missing[0]}.")
    return _digest_of(tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@functools.lru_cache
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Digest the contents of files, once for each of their sizes and times."""
    digest = hashlib.sha256()
    for path, _, _ in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _check_effects(config: Config) -> None:
    """Raise for options that would have no effect."""
    transformer, vit = config.model in ("vit", "gpt"), config.model == "vit"
    images = config.dataset == "cifar10"
    without_effect = {
        "--label-noise": config.label_noise > 0 and config.dataset == "text",
        "--image-size": config.image_size is not None and not images,
        "--no-augment": not config.augment and not images,
        "--classes": config.classes is not None and config.dataset == "text",
        "--pretrained": config.pretrained is not None and config.model == "gpt",
        "--dropout": config.dropout > 0 and not transformer,
        "--class-token": config.class_token and not vit,
        "--head normal": config.head == "normal" and not vit,
        "--no-layer-norm": not config.layer_norm and config.model != "mlp",
    }
    for name, is_so in without_effect.items():
        if is_so:
            raise ValueError(
                f"{name} has no effect on --dataset {config.dataset} with --model {config.model}."
            )
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
    for name in ("dropout", "label_smoothing"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{option(name)} must lie in [0, 1).")
    if not 0 <= config.label_noise <= 0.9:
        raise ValueError(f"--label-noise must lie in 0 to 0.9, got {config.label_noise}.")
    if config.image_size not in (None, 16, 8):
        raise ValueError(f"--image-size must be 16 or 8, got {config.image_size}.")
    if config.validation_examples < 0:
        raise ValueError("--validation-examples must not be negative.")
    if config.seeds_together and config.distributed:
        raise ValueError("--seeds-together is for one device, without --distributed.")
