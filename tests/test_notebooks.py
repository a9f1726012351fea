"""Every notebook runs from top to bottom, and is stored with the outputs of its code."""

import importlib.util
import re
import tomllib
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Repository"].removeprefix("https://github.com/")


def execute_module():
    specification = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def shorter(source):
    """Train an eighth as long, with two seeds: the stored outputs are of the whole."""

    def changed(line):
        names, values = line[1].split(", "), map(str.strip, line[2].split(", "))
        return ", ".join(names) + " = " + ", ".join(map(small, names, values))

    def small(name, value):
        if name.endswith(("EPOCHS", "STEPS")):
            return str(-(-int(value) // 8))
        return "2" if name == "SEEDS" else value

    return re.sub(r"^([A-Z_, ]+) = (.+)  # @param$", changed, source, flags=re.MULTILINE)


@pytest.mark.exhaustive(but=["quickstart"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# The Jupyter client's own: it still asks asyncio for its event loop policy.
@pytest.mark.filterwarnings("ignore")
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        cell.source = shorter(cell.source)
    (tmp_path / "evidence").symlink_to(FOLDER / "evidence")
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    warned = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr" and "Warning" in output["text"]
    ]
    assert not warned


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab(path):
    notebook = nbformat.read(path, as_version=4)
    first, second = notebook.cells[:2]
    repository = f"github/{ADDRESS}/blob/main/notebooks/{path.name}"
    assert f"https://colab.research.google.com/{repository}" in first.source
    assert 'if "google.colab" in sys.modules' in second.source
    assert sum(cell.cell_type == "code" for cell in notebook.cells) <= 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_the_code_as_it_stands(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata["executed"] == execute_module().digest(notebook), (
        f"Run: python notebooks/execute.py {path.stem}"
    )
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert path.stat().st_size <= 500_000


def test_there_are_notebooks():
    assert NOTEBOOKS
