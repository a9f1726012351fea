"""The package as a whole: what it needs, how it is layered, what is public, what is documented."""

import ast
import importlib.metadata as metadata
import inspect
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import gnp_optax as gnp
import gnp_optax.diagnostics
import gnp_optax.linen
import gnp_optax.nnx
import gnp_optax.plots

PACKAGE = Path(gnp.__file__).parent

# Each module imports only from those before it.
LAYERS = [
    "_numerics",
    "_moments",
    "_paths",
    "_checks",
    "_loss",
    "_pieces",
    "batching",
    "_selection",
    "schedules",
    "directions",
    "_parts",
    "_mixing",
    "_perturbation",
    "_report",
    "_jaxprs",
    "_opening",
    "_prefix",
    "_functional",
    "_flops",
    "_masks",
    "_ranking",
    "masks",
    "_transformation",
    "_presets",
    "__init__",
    "linen",
    "nnx",
    "_plotted",
    "_curves",
    "_spectra",
    "_landscapes",
    "_layer_map",
    "plots",
    "_layout",
    "_progress",
    "_dataset",
    "_operands",
    "_layer_norms",
    "_embedding",
    "_lanczos",
    "_hessian",
    "_spectrum",
    "_steps",
    "_sharpness",
    "_worst_case",
    "_grid",
    "_landscape",
    "diagnostics",
]


def imports_of_ours(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "gnp_optax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gnp_optax."):
            yield node.module.split(".")[1]


def test_modules_import_only_from_those_below_them():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == set(LAYERS)
    for module in modules:
        for imported in set(imports_of_ours(PACKAGE / f"{module}.py")) & modules:
            assert LAYERS.index(imported) < LAYERS.index(module), f"{module} imports {imported}"


def test_no_private_names_of_the_libraries():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"\b(jax|optax|flax)\.\S*\b_src\b", path.read_text()), path


def test_library_files_stay_short():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 250, path


def closure_of_requirements(names):
    """The distributions that `names` need, by their own metadata."""
    seen, left = set(), list(names)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        for requirement in metadata.distribution(name).requires or []:
            # Not installed: one for another Python or platform.
            needed = re.match(r"[\w.-]+", requirement).group()
            if "extra ==" not in requirement and _is_installed(needed):
                left.append(needed)
    return seen


def _is_installed(name):
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def test_import_needs_jax_and_optax_alone(tmp_path):
    """In an environment with nothing else, made of links to what the two require."""
    for name in closure_of_requirements(["jax", "optax"]):
        for file in metadata.distribution(name).files or []:
            top = file.parts[0]
            if top != ".." and not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(metadata.distribution(name).locate_file(top))
    (tmp_path / "gnp_optax").symlink_to(PACKAGE)
    for needed, _ in gnp._EXTRAS.values():
        assert not (tmp_path / needed).exists()
    standard = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    program = f"""
import sys
sys.path[:] = [p for p in sys.path if "site-packages" not in p] + {[*standard, str(tmp_path)]!r}
import jax, optax
before = set(sys.modules)
import gnp_optax as gnp
import jax.numpy as jnp
before, after = ({{name.partition(".")[0] for name in names}} for names in (before, sys.modules))
new = after - before
new -= set(sys.stdlib_module_names)
assert new == {{"gnp_optax"}}, new
value, grad = gnp.value_and_grad(lambda x: jnp.sum(x**2) / 2, 0.5, 0.2)(jnp.array([3.0, 4.0]))
assert abs(float(grad[0]) - 3.06) < 1e-6
for name, (extra, needed) in gnp._EXTRAS.items():
    try:
        getattr(gnp, name)
    except ModuleNotFoundError as error:
        assert f"gnp-optax[{{extra}}]" in str(error), error
    else:
        raise AssertionError(f"{{needed}} is here")
"""
    command = [sys.executable, "-I", "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


PUBLIC = {
    "gradient_regularization": (
        "(r, alpha, *, direction=None, mask=None, scope='all', curvature='finite_difference', "
        "perturb_dtype=None, has_aux=False)"
    ),
    "sam": "(rho, *, direction=None, mask=None, scope='all', perturb_dtype=None, has_aux=False)",
    "asam": "(rho, eta=0.01, *, mask=None, scope='all', perturb_dtype=None, has_aux=False)",
    "layerwise_gradient_regularization": (
        "(r, alpha, mask, *, direction=None, scope='masked', curvature='finite_difference', "
        "perturb_dtype=None, has_aux=False)"
    ),
    "value_and_grad": (
        "(fun, r, alpha, *, direction=None, mask=None, scope='all', curvature='finite_difference', "
        "perturb_dtype=None, has_aux=False)"
    ),
    "schedules.r_warmup": "(r, warmup_steps)",
    "schedules.lambda_warmup": "(alpha, warmup_steps)",
    "schedules.zero_warmup": "(alpha, warmup_steps)",
    "schedules.every": "(k, alpha)",
    "directions.normalized": "()",
    "directions.adaptive": "(eta=0.01)",
    "masks.by_path": "(regex)",
    "masks.layers": "(*paths)",
    "masks.matrices": "()",
    "masks.stacked": "(regex, *, last)",
    "masks.top_k_layers": "(grads, k, *, budget=None, cost=None)",
    "masks.cost": (
        "(fun, params, mask, *args, scope='all', curvature='finite_difference', has_aux=False, "
        "**kwargs)"
    ),
    "batching.accumulate": "(fun, micro_batches, *, has_aux=False)",
    "batching.m_sharpness": "(gradient, m, *, parallel=1, has_aux=False)",
    "diagnostics.hessian_eigenvalues": (
        "(fun, params, *args, k=1, num_matvecs=None, key=None, mask=None, batch_size=None, "
        "has_aux=False, progress=False)"
    ),
    "diagnostics.hessian_trace": (
        "(fun, params, *args, key, num_samples=32, mask=None, batch_size=None, has_aux=False, "
        "progress=False)"
    ),
    "diagnostics.hessian_spectrum": (
        "(fun, params, *args, key, num_matvecs=None, num_samples=4, mask=None, batch_size=None, "
        "has_aux=False, progress=False)"
    ),
    "diagnostics.spectral_density": "(spectrum, grid, width)",
    "diagnostics.sharpness": (
        "(fun, params, *args, rho, direction=None, mask=None, batch_size=None, has_aux=False, "
        "progress=False)"
    ),
    "diagnostics.worst_case_sharpness": (
        "(fun, params, *args, rho, steps=100, step_size=None, eta=None, key=None, mask=None, "
        "batch_size=None, has_aux=False, progress=False)"
    ),
    "diagnostics.m_sharpness": (
        "(fun, params, *args, rho, m, direction=None, mask=None, has_aux=False, progress=False)"
    ),
    "diagnostics.layer_gradient_norms": (
        "(fun, params, *args, mask=None, batch_size=None, has_aux=False, progress=False)"
    ),
    "diagnostics.norms_by_layer": "(grads)",
    "diagnostics.adaptive_statistics": "(opt_state, *, b2=0.999, eps=1e-08)",
    "diagnostics.random_direction": "(key, params, *, mask=None)",
    "diagnostics.loss_along": (
        "(fun, params, *args, direction, distances, batch_size=None, has_aux=False, progress=False)"
    ),
    "diagnostics.loss_surface": (
        "(fun, params, *args, directions, x, y, batch_size=None, has_aux=False, progress=False)"
    ),
    "diagnostics.loss_between": (
        "(fun, start, end, *args, positions, batch_size=None, has_aux=False, progress=False)"
    ),
    "linen.TrainState.apply_gradients": "(self, *, grads, **kwargs)",
    "nnx.value_and_grad": (
        "(fun, r, alpha, *, direction=None, mask=None, scope='all', curvature='finite_difference', "
        "perturb_dtype=None, has_aux=False, wrt=Param)"
    ),
    "plots.curve_style": "(n)",
    "plots.band": "(ax, x, values, label, *, style=None)",
    "plots.schedules": "(ax, schedules, steps)",
    "plots.spectrum": ("(ax, spectrum, *, width=None, floor=1e-08, label=None, style=None)"),
    "plots.loss_line": "(ax, line, *, label=None, style=None)",
    "plots.loss_contour": "(ax, surface, *, levels=8, scale='linear')",
    "plots.loss_surface": "(ax, surface, *, scale='linear')",
    "plots.layer_norms": "(ax, paths, norms, *, epochs=None, selected=None)",
}


def public(name):
    value = gnp
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", PUBLIC)
def test_signature(name):
    signature = inspect.signature(public(name))
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    shown = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", shown) == PUBLIC[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete(name):
    value = public(name)
    doc = inspect.getdoc(value)
    assert doc.splitlines()[0].endswith(".")
    parameters = set(inspect.signature(value).parameters) - {"self"}
    sections = ["Returns:"] + (["Args:"] if parameters else [])
    if not name.startswith("linen."):  # the example stands in the class
        sections.append("Example:")
    for section in sections:
        assert section in doc, f"{name} lacks {section}"
    for parameter in parameters:
        assert re.search(rf"^\s+\*{{0,2}}{parameter}: ", doc, re.M), f"{name}: {parameter}"


def test_one_home_per_name():
    homes = {}
    core = (gnp, gnp.batching, gnp.schedules, gnp.directions, gnp.masks)
    for module in (*core, *(getattr(gnp, name) for name in gnp._EXTRAS)):
        for name, value in vars(module).items():
            ours = getattr(value, "__module__", "").startswith("gnp_optax")
            if not name.startswith("_") and ours and inspect.isroutine(value):
                homes.setdefault(id(value), []).append(f"{module.__name__}.{name}")
    assert all(len(names) == 1 for names in homes.values()), homes


def test_all_lists_what_is_public():
    assert sorted(gnp.__all__) == gnp.__all__
    assert {name.partition(".")[0] for name in PUBLIC} - set(gnp._EXTRAS) == set(gnp.__all__) - {
        "GradientRegularizationState"
    }
    public_diagnostics = {name.partition(".")[2] for name in PUBLIC if "diagnostics." in name}
    results = {name for name in gnp.diagnostics.__all__ if name[0].isupper()}
    assert public_diagnostics | results == set(gnp.diagnostics.__all__)
