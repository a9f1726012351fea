"""What all tests share: the two sizes of the suite, quick compilation, and float64."""

import os
import shutil
import tempfile

import pytest

# Before JAX is imported, for this process and for those that it starts.
IS_FIRST = "PYTEST_XDIST_WORKER" not in os.environ
# A folder of who starts several runs, which is kept.
SHARED = os.environ.get("GNP_OPTAX_TEST_CACHE")
CACHE = (SHARED or tempfile.mkdtemp(prefix="gnp_optax-compiled-")) if IS_FIRST else None
if CACHE is not None:
    # Programs that are quick to compile, and slow to run, take half the time. Set to nothing, the
    # variable lets them be optimized.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # What one test has compiled, others need not, not even in another process.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # JAX writes it without a lock. A process that reads half an entry warns, and compiles anew.
    os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"

import jax  # noqa: E402


def pytest_unconfigure(config):
    if CACHE is not None and CACHE != SHARED:
        shutil.rmtree(CACHE, ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="run all tests, also those that are marked exhaustive",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "exhaustive(but=()): run with --exhaustive alone, but for the cases with these ids",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what is exhaustive, unless it was asked for."""
    missing = {}
    for item in items:
        mark = item.get_closest_marker("exhaustive")
        if mark is None:
            continue
        unseen = missing.setdefault(item.function, set(mark.kwargs.get("but", ())))
        case = item.callspec.id if hasattr(item, "callspec") else None
        if case in mark.kwargs.get("but", ()):
            unseen.discard(case)
            item.own_markers = [m for m in item.own_markers if m.name != "exhaustive"]
    asked = config.getoption("--exhaustive")
    wrong = {test.__name__: cases for test, cases in missing.items() if cases}
    if asked and wrong and not any("::" in arg for arg in config.args):
        raise pytest.UsageError(f"exhaustive(but=...) names cases that there are not: {wrong}")
    if not asked:
        rest = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=rest)


@pytest.fixture
def x64():
    """Run one test in float64."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
