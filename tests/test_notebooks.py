"""Every notebook runs from top to bottom, and is committed without output."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.exhaustive(but=["quickstart"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# The Jupyter client's own: it still asks asyncio for its event loop policy.
@pytest.mark.filterwarnings("ignore")
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    # Trained as a user trains: quicker compilation, which the other tests ask for, is slower here.
    client.execute(env={**os.environ, "XLA_FLAGS": ""})
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
    assert f"notebooks/{path.name}" in first.source
    assert "colab.research.google.com" in first.source
    assert 'if "google.colab" in sys.modules' in second.source
    assert all(not cell.get("outputs") for cell in notebook.cells)
    assert sum(cell.cell_type == "code" for cell in notebook.cells) <= 10


def test_there_are_notebooks():
    assert NOTEBOOKS
