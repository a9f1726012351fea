"""`python -m gnp_optax.experiments precision`: what low precision leaves of the perturbation."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

import gnp_optax as gnp
from gnp_optax._core import numerics, perturbation
from gnp_optax.experiments.report.table import markdown
from gnp_optax.experiments.training.records import environment

Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Measure the perturbation and the correction of SAM in low precision, on a small network.

    The network has two square matrices, with weights of variance 1 / width, tanh between them, and
    random inputs and targets. In float16 the loss is scaled by 2^14, as one would. The correction
    is `g_reg - g` as the optimizer would see it; the exact one is `r H g / ||g||` in float32, at
    the same parameters.
    """

    parameters: tuple[int, ...] = (10_000, 1_000_000, 30_000_000)
    """Sizes of the network."""
    radii: tuple[float, ...] = (0.01, 0.05, 0.2)
    """Radii r of the perturbation."""
    batch_size: int = 64
    """Examples."""
    out: Path = Path("results/precision")
    """Folder for the results."""

    def __post_init__(self) -> None:
        """Check the values."""
        for option, values in (
            ("--parameters", self.parameters),
            ("--radii", self.radii),
            ("--batch-size", (self.batch_size,)),
        ):
            if not values or not all(0 < value < float("inf") for value in values):
                raise ValueError(f"{option} must be positive, got {values}.")


class Setting(NamedTuple):
    """Types of the parameters and of the computation, and how the second gradient is taken.

    Without a type of its own, the computation is in that of the parameters, also of perturbed ones.
    """

    parameters: str
    compute: str | None
    options: dict[str, str]

    @property
    def name(self) -> str:
        """How the table calls it."""
        compute = f", {self.compute} compute" if self.compute else ""
        options = [f'`{name}="{value}"`' for name, value in self.options.items()]
        return ", ".join([f"{self.parameters} parameters{compute}", *options])


WIDE, EXACT = {"perturb_dtype": "float32"}, {"curvature": "exact"}
SETTINGS = (
    Setting("float32", None, {}),
    Setting("float32", "bfloat16", {}),
    Setting("float32", "bfloat16", EXACT),
    Setting("bfloat16", None, {}),
    Setting("bfloat16", None, WIDE),
    Setting("bfloat16", None, EXACT),
    Setting("float16", None, {}),
    Setting("float16", None, WIDE),
    Setting("float16", None, EXACT),
)


def run(args: Sequence[str]) -> None:
    """Read the options, measure, print the table and write the results."""
    config = tyro.cli(PrecisionConfig, prog="python -m gnp_optax.experiments precision", args=args)
    sizes = tqdm.tqdm(config.parameters, desc="measuring", unit="network")
    rows = [row for size in sizes for row in measure(size, config.radii, config.batch_size)]
    command = shlex.join(["python", "-m", "gnp_optax.experiments", "precision", *args])
    text = table(rows)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "precision.md").write_text(f"`{command}`\n\n{text}")
    record = {"command": command, **environment(), "rows": rows}
    (config.out / "precision.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text, end="")
    print(f"\nWrote the results to {config.out}.")


def measure(size: int, radii: Sequence[float], batch_size: int) -> list[dict[str, Any]]:
    """Measure every setting and radius on a network of about `size` parameters."""
    width = max(1, round((size / 2) ** 0.5))
    random = np.random.default_rng(0)
    weights = {name: random.normal(size=(width, width)) / width**0.5 for name in ("in", "out")}
    x, y = (jnp.asarray(random.normal(size=(batch_size, width)), jnp.float32) for _ in range(2))
    rows = []
    for setting in SETTINGS:
        params = {name: jnp.asarray(w, setting.parameters) for name, w in weights.items()}
        for r in radii:
            found = _measure(setting, params, x, y, r)
            rows.append({"parameters": 2 * width**2, "setting": setting.name, "r": r, **found})
    return rows


def _measure(
    setting: Setting, params: Params, x: jax.Array, y: jax.Array, r: float
) -> dict[str, float | None]:
    scale = 2.0**14 if setting.parameters == "float16" else 1.0

    def loss_in(dtype: str | None) -> Callable[[Params], jax.Array]:
        def loss(params: Params) -> jax.Array:
            first, second = (w if dtype is None else w.astype(dtype) for w in params.values())
            out = jnp.tanh(x.astype(first.dtype) @ first) @ second
            return scale * jnp.mean((out.astype(jnp.float32) - y) ** 2)

        return loss

    g, correction = _correction(loss_in(setting.compute), params, r, setting.options)
    single = {name: w.astype(jnp.float32) for name, w in params.items()}
    _, exact = _correction(loss_in("float32"), single, r, EXACT)
    found: dict[str, float | None] = {"correction": _cosine(correction, exact)}
    if setting.options == EXACT:
        return {"moved": None, "perturbation": None, **found}
    direction: Any
    direction, _ = gnp.directions.normalized().update(g, gnp.directions.normalized().init(params))
    seen = []  # the change of each weight, as the computation sees it
    for name, w in params.items():
        dtype = perturbation.perturbed_type(w, setting.options.get("perturb_dtype"))
        moved = perturbation.perturb(w, direction[name], r, dtype)
        used = moved.dtype if setting.compute is None else jnp.dtype(setting.compute)
        seen.append(numerics.widen(moved.astype(used)) - numerics.widen(w.astype(used)))
    share = sum(float(jnp.sum(change != 0)) for change in seen) / sum(d.size for d in seen)
    return {"moved": share, "perturbation": _cosine(seen, list(direction.values())), **found}


def _correction(
    loss: Callable[[Params], jax.Array], params: Params, r: float, options: dict[str, Any]
) -> tuple[Params, list[jax.Array]]:
    """Return the gradient, and what SAM adds to it."""
    g = jax.jit(jax.grad(loss))(params)
    regularized = jax.jit(gnp.value_and_grad(loss, r, 1.0, **options))(params)[1]
    change = [numerics.widen(regularized[n]) - numerics.widen(g[n]) for n in params]
    return g, change


def _cosine(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> float:
    product = sum(float(jnp.sum(x * y)) for x, y in zip(a, b, strict=True))
    norms = float(numerics.norm(a)) * float(numerics.norm(b))
    return product / norms if norms else 0.0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the measurements as a Markdown table: share that moved, and the two cosines."""
    sizes = sorted({row["parameters"] for row in rows})
    found = {(row["setting"], row["r"], row["parameters"]): row for row in rows}

    def cell(row: dict[str, Any]) -> str:
        if row["moved"] is None:
            return f"- / - / {row['correction']:.2f}"
        return f"{row['moved']:.0%} / {row['perturbation']:.2f} / {row['correction']:.2f}"

    header = ("setting", "r", *(f"{size:.0e} parameters" for size in sizes))
    lines = [
        (setting, str(r), *(cell(found[setting, r, size]) for size in sizes))
        for setting, r in dict.fromkeys((row["setting"], row["r"]) for row in rows)
    ]
    return markdown([header, *lines])
