"""The options of the comparison, and the methods that it compares."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from gnp_optax import schedules

Dataset = Literal["digits", "cifar10"]
Method = Literal[
    "plain", "gr", "gr-r-warmup", "gr-lambda-warmup", "gr-zero-warmup", "sam", "layerwise"
]


_CONNECTION = ("coordinator", "processes", "process_id")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a small Vision Transformer, with AdamW and warmup, once per method and seed.

    Prints a table, and writes it, a figure and every metric of every epoch under --out. A run that
    has finished is never repeated: after an interruption, start the same command again.

    Two more commands measure: `python -m gnp_optax.experiments cost`, what each method costs, in
    FLOPs, time and memory, on larger models; `python -m gnp_optax.experiments precision`, what low
    precision does to the perturbation. Add --help for their options.
    """

    dataset: Dataset = "digits"
    """scikit-learn's 8x8 digits (offline), or CIFAR-10. It decides the defaults below: add --help
    to --dataset cifar10 to see those of CIFAR-10."""
    data_dir: Path | None = None
    """Folder with CIFAR-10 as Parquet files. Without it: uoft-cs/cifar10 from the Hugging Face
    hub."""
    methods: tuple[Method, ...] = get_args(Method)
    """Methods to compare. Times are relative to plain."""
    seeds: int = 3
    """Runs per method; a seed sets initialisation, order of examples, augmentation, dropout."""
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
    out: Path | None = None
    """Folder for the results. Without it: results/DATASET-HASH, a hash of the options below."""

    epochs: int = 30
    """Passes over the training set."""
    warmup_epochs: int = 6
    """Length of the learning-rate warmup and of the regularization's three warmups."""
    batch_size: int = 32
    """Examples per step."""
    learning_rate: float = 8e-3
    """Peak of the learning rate, after a linear warmup from 0 and before a cosine to 0."""
    weight_decay: float = 0.3
    """Decoupled weight decay of AdamW."""
    clip_norm: float = 5.0
    """Largest norm of the gradient that the optimizer sees."""

    r: float = 0.1
    """Radius of the perturbation (the r of GR, the rho of SAM), and of the reported sharpness."""
    alpha: float = 0.8
    """Weight of the perturbed gradient in GR, lambda / r. That of SAM is 1."""
    layers: int = 4
    """Layers that layer-wise GR penalizes: those of largest gradient norm, selected every epoch."""
    budget: float | None = None
    """Largest cost of a step of layer-wise GR in ordinary gradients, such as 1.2: of the layers of
    largest gradient norm, those are taken that fit, --layers of them at most."""
    selections: int = 8
    """Largest number of selections in a run of layer-wise GR, since each is compiled. When it is
    reached, a selection that is new is not taken, and the one before stays."""

    patch_size: int = 2
    """Side of a patch in pixels."""
    width: int = 32
    """Width of the transformer."""
    depth: int = 2
    """Transformer blocks."""
    heads: int = 2
    """Attention heads."""
    dropout: float = 0.0
    """Dropout rate of the residual branches."""
    probe_examples: int = 256
    """Training examples that measure gradient norm and sharpness and select layers."""

    def __post_init__(self) -> None:
        """Check the values."""
        counts = (
            "seeds",
            "epochs",
            "batch_size",
            "layers",
            "selections",
            "patch_size",
            "width",
            "depth",
            "heads",
        )
        for name in (*counts, "probe_examples", "learning_rate", "clip_norm", "r"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{option(name)} must be positive, got {getattr(self, name)}.")
        for name in ("alpha", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{option(name)} must not be negative: {getattr(self, name)}.")
        if self.budget is not None and not 1 < self.budget < math.inf:
            raise ValueError(f"--budget must be more than 1, a plain step, got {self.budget}.")
        if not 0 <= self.dropout < 1:
            raise ValueError("--dropout must lie in [0, 1).")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError("--warmup-epochs must be less than --epochs, and not negative.")
        if self.width % self.heads:
            raise ValueError("--width must be a multiple of --heads.")
        known = set(self.methods) <= set(get_args(Method))
        if not self.methods or not known or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods must be some of {get_args(Method)}, each of them once.")
        given = [option(name) for name in _CONNECTION if getattr(self, name) is not None]
        if given and not self.distributed:
            raise ValueError(f"{', '.join(given)} is for --distributed, which is missing.")
        if given and len(given) < len(_CONNECTION):
            wanted = ", ".join(map(option, _CONNECTION))
            raise ValueError(
                f"Of {wanted} give all or none: with {', '.join(given)} alone they can't be found."
            )
        if self.dataset == "digits" and self.data_dir is not None:
            raise ValueError("--data-dir is for --dataset cifar10; the digits come with the code.")

    @property
    def recipe(self) -> dict[str, Any]:
        """What determines a run: neither where the results go nor how many runs there are."""
        recipe = dataclasses.asdict(self)
        for name in ("data_dir", "methods", "seeds", "out", "distributed", *_CONNECTION):
            del recipe[name]
        if self.distributed:  # the order of the examples depends on it
            recipe["devices"] = jax.device_count()
        return recipe

    @property
    def folder(self) -> Path:
        """Where the results go."""
        digest = hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()
        return self.out or Path("results") / f"{self.dataset}-{digest[:8]}"


# On digits: learning rate and weight decay chosen for plain training, r and alpha the papers'.
DEFAULTS: dict[str, Config] = {
    "digits": Config(),
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
        probe_examples=1024,
    ),
}


def option(name: str) -> str:
    """Return a field's name as it is written on the command line."""
    return "--" + name.replace("_", "-")


def regularization(config: Config, method: Method, steps: int, warmup_steps: int) -> jax.Array:
    """Return the radius and the weight of every step of a run, as an array of shape (steps, 2)."""
    r: optax.ScalarOrSchedule = config.r
    alpha: optax.ScalarOrSchedule = config.alpha
    match method:
        case "plain":
            alpha = 0.0
        case "sam":
            alpha = 1.0
        case "gr-r-warmup":
            r = schedules.r_warmup(config.r, warmup_steps)
        case "gr-lambda-warmup":
            alpha = schedules.lambda_warmup(config.alpha, warmup_steps)
        case "gr-zero-warmup":
            alpha = schedules.zero_warmup(config.alpha, warmup_steps)
        case "gr" | "layerwise":
            pass

    def at(step: jax.Array) -> jax.Array:
        pair = [value(step) if callable(value) else value for value in (r, alpha)]
        return jnp.stack([jnp.asarray(value, jnp.float32) for value in pair])

    return jax.vmap(at)(jnp.arange(steps))
