"""The notebook, from its first cell to its last, in its debug form."""

import os
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "launch" / "colab.ipynb"


def test_notebook_is_committed_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERSTUDY_DEBUG", "1")
    monkeypatch.setenv("WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert (tmp_path / "run" / "done.json").exists()
    assert sum("image/png" in output.get("data", {}) for output in outputs["plots"]) == 3
    said = "".join(output.get("text", "") for output in outputs["chat"] if output.get("name") == "stdout")
    assert said.count("\n") == 3, outputs["chat"]  # answers, which may be empty after two steps
