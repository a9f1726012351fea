"""The package as a whole: what it needs, how it is layered, what is public, what is documented."""

import ast
import importlib.metadata as metadata
import inspect
import pydoc
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import gnp_optax as gnp
import gnp_optax.diagnostics
import gnp_optax.equinox
import gnp_optax.linen
import gnp_optax.nnx
import gnp_optax.plots

PACKAGE = Path(gnp.__file__).parent

# Each room imports only from itself and from those on the floors below it.
FLOORS = [
    {"_core"},
    {"directions", "schedules", "batching", "plots", "_prefix", "_momentum"},
    {"_functional", "linen"},
    {"_transformation", "nnx", "equinox", "masks"},
    {"_presets", "_logs", "diagnostics"},
    {"__init__"},
    {"experiments"},
]
# The same within the experiments.
EXPERIMENTS_FLOORS = [
    {"methods"},
    {"config"},
    {"data", "recipes"},
    {"models"},
    {"training"},
    {"report"},
    {"measure", "compare"},
    {"__main__"},
]


def rooms(package):
    """The Python files of every module or folder of a package."""
    found = {path.stem: [path] for path in package.glob("*.py")}
    folders = [path.parent for path in package.glob("*/__init__.py")]
    return found | {folder.name: list(folder.rglob("*.py")) for folder in folders}


def imported_rooms(path, package):
    """The rooms of a package, given by its dotted name, that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            yield node.module.removeprefix(f"{package}.").split(".")[0]


@pytest.mark.parametrize(
    ("package", "floors"),
    [("gnp_optax", FLOORS), ("gnp_optax.experiments", EXPERIMENTS_FLOORS)],
)
def test_rooms_import_only_from_the_floors_below_them(package, floors):
    found = rooms(PACKAGE.parent.joinpath(*package.split(".")))
    floor = {name: i for i, names in enumerate(floors) for name in names}
    assert set(floor) == set(found) - ({"__init__"} - set(floor))
    for room, paths in found.items():
        for imported in {x for path in paths for x in imported_rooms(path, package)} & set(floor):
            is_below = imported == room or floor[imported] < floor.get(room, 0)
            # Only a checker of types sees what comes when it is asked for.
            if not (room == "__init__" and imported in gnp._EXTRAS):
                assert is_below, f"{room} imports {imported}"


def test_no_private_names_of_the_libraries():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"\b(jax|optax|flax)\.\S*\b_src\b", path.read_text()), path


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
        "(r, alpha=None, *, lam=None, direction=None, mask=None, scope='all', "
        "curvature='finite_difference', perturb_dtype=None, surrogate_gap=None, has_aux=False)"
    ),
    "canonical_convolutions": "(fun)",
    "gsam": (
        "(rho, surrogate_gap, *, alpha=None, direction=None, mask=None, scope='all', "
        "perturb_dtype=None, has_aux=False)"
    ),
    "momentum_sam": "(rho, decay=0.9, *, mask=None)",
    "perturbed": "(params, opt_state, *, perturb_dtype=None)",
    "sam": (
        "(rho, alpha=None, *, direction=None, mask=None, scope='all', perturb_dtype=None, "
        "has_aux=False)"
    ),
    "asam": (
        "(rho, eta=0.01, *, alpha=None, mask=None, scope='all', perturb_dtype=None, has_aux=False)"
    ),
    "layerwise_gradient_regularization": (
        "(r, alpha=None, mask=None, *, lam=None, direction=None, scope='masked', "
        "curvature='finite_difference', perturb_dtype=None, has_aux=False)"
    ),
    "value_and_grad": (
        "(fun, r, alpha=None, *, lam=None, direction=None, mask=None, scope='all', "
        "curvature='finite_difference', perturb_dtype=None, surrogate_gap=None, has_aux=False, "
        "return_report=False)"
    ),
    "report_as_dict": "(opt_state_or_report, prefix='sam/')",
    "schedules.r_warmup": "(r, warmup_steps)",
    "schedules.lambda_warmup": "(alpha, warmup_steps)",
    "schedules.zero_warmup": "(alpha, warmup_steps)",
    "schedules.delayed": "(schedule, warmup_steps)",
    "schedules.every": "(k, alpha)",
    "directions.normalized": "()",
    "directions.adaptive": "(eta=0.01)",
    "directions.unnormalized": "()",
    "directions.per_layer": "()",
    "directions.sign": "()",
    "directions.friendly": "(sigma=1.0, decay=0.9)",
    "masks.by_path": "(regex)",
    "masks.layers": "(*paths)",
    "masks.matrices": "()",
    "masks.stacked": "(regex, *, last, axis=0)",
    "masks.top_k_layers": "(grads, k, *, budget=None, cost=None)",
    "masks.cost": (
        "(fun, params, mask, *args, scope='all', curvature='finite_difference', "
        "surrogate_gap=None, has_aux=False, **kwargs)"
    ),
    "masks.explain": (
        "(fun, params, mask, *args, scope='all', curvature='finite_difference', "
        "surrogate_gap=None, has_aux=False, **kwargs)"
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
    "diagnostics.radius_profile": (
        "(fun, params, *args, radii, direction=None, mask=None, batch_size=None, has_aux=False, "
        "progress=False)"
    ),
    "diagnostics.m_sharpness": (
        "(fun, params, *args, rho, m, direction=None, mask=None, has_aux=False, progress=False)"
    ),
    "diagnostics.layer_gradient_norms": (
        "(fun, params, *args, mask=None, batch_size=None, has_aux=False, progress=False)"
    ),
    "diagnostics.norms_by_layer": "(grads)",
    "diagnostics.check_perturbed": "(step, *args, **kwargs)",
    "diagnostics.check_step": "(tx, loss_fn, params, *batch, opt_state=None, has_aux=False)",
    "diagnostics.adaptive_statistics": "(opt_state, *, b2=0.999, eps=1e-08)",
    "diagnostics.random_direction": "(key, params, *, mask=None)",
    "diagnostics.loss_along": (
        "(fun, params, *args, direction, distances, batch_size=None, has_aux=False, progress=False)"
    ),
    "diagnostics.loss_surface": (
        "(fun, params, *args, directions, x, y, batch_size=None, has_aux=False, progress=False)"
    ),
    "diagnostics.loss_between": (
        "(fun, start, end, *args, positions=None, batch_size=None, has_aux=False, progress=False)"
    ),
    "linen.TrainState.apply_gradients": "(self, *, grads, **kwargs)",
    "nnx.value_and_grad": (
        "(fun, r, alpha=None, *, lam=None, direction=None, mask=None, scope='all', "
        "curvature='finite_difference', perturb_dtype=None, surrogate_gap=None, has_aux=False, "
        "return_report=False, wrt=Param)"
    ),
    "nnx.value_fn": "(loss, model, /, *args, wrt=Param, **kwargs)",
    "nnx.perturbed": "(model, optimizer, *, perturb_dtype=None)",
    "equinox.value_and_grad": (
        "(fun, r, alpha=None, *, lam=None, direction=None, mask=None, scope='all', "
        "curvature='finite_difference', perturb_dtype=None, surrogate_gap=None, has_aux=False, "
        "return_report=False)"
    ),
    "equinox.value_fn": "(loss, model, /, *args, **kwargs)",
    "equinox.perturbed": "(model, opt_state, *, perturb_dtype=None)",
    "plots.curve_style": "(n)",
    "plots.band": "(ax, x, values, label, *, style=None)",
    "plots.schedules": "(ax, schedules, steps)",
    "plots.spectrum": ("(ax, spectrum, *, width=None, floor=1e-08, label=None, style=None)"),
    "plots.radius_profile": "(ax, profile)",
    "plots.loss_line": "(ax, line, *, label=None, style=None)",
    "plots.loss_contour": "(ax, surface, *, levels=8, scale='linear')",
    "plots.loss_surface": "(ax, surface, *, scale='linear')",
    "plots.layer_norms": "(ax, paths, norms=None, *, epochs=None, selected=None, limits=None)",
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
        "GradientRegularizationState",
        "MomentumSAMState",
        "Report",
    }
    public_diagnostics = {name.partition(".")[2] for name in PUBLIC if "diagnostics." in name}
    results = {name for name in gnp.diagnostics.__all__ if name[0].isupper()}
    assert public_diagnostics | results == set(gnp.diagnostics.__all__)


def test_public_modules_offer_what_is_public_alone():
    for module in (gnp, *map(public, ["batching", "directions", "masks", "schedules"]), gnp.linen):
        offered = {name for name in dir(module) if not name.startswith("_")}
        extras = set(gnp._EXTRAS) if module is gnp else set()
        assert offered == set(module.__all__) | extras, module.__name__
    for name in ("nnx", "equinox", "plots", "diagnostics"):
        assert set(getattr(gnp, name).__all__) <= set(dir(getattr(gnp, name)))


def test_help_begins_with_the_package_and_its_modules():
    text = pydoc.plain(pydoc.render_doc(gnp))
    beginning = text[: text.index("PACKAGE CONTENTS")]
    assert gnp.__doc__.splitlines()[0] in beginning
    for name in [*gnp._EXTRAS, "batching", "directions", "masks", "schedules", "experiments"]:
        assert re.search(rf"\b{name}\b", beginning), name


@pytest.mark.exhaustive
def test_a_type_checker_sees_modules_and_misspelt_options(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import gnp_optax as gnp\n"
        "reveal_type(gnp.diagnostics)\n"
        "reveal_type(gnp.plots)\n"
        "reveal_type(gnp.linen)\n"
        "reveal_type(gnp.nnx)\n"
        "reveal_type(gnp.equinox)\n"
        'gnp.sam(0.1, scope="mask")\n'
        'gnp.value_and_grad(abs, 0.1, 1.0, curvature="exakt")\n'
    )
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.count("types.ModuleType") == 5, done.stdout
    assert 'Argument "scope" to "sam" has incompatible type' in done.stdout
    assert 'Argument "curvature" to "value_and_grad" has incompatible type' in done.stdout
