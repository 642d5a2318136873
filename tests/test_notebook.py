"""The notebook of the documentation runs, and shows its pictures and its progress."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExecutePreprocessor

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = tmp_path_factory.mktemp("notebook")
    ExecutePreprocessor(timeout=300).preprocess(notebook, {"metadata": {"path": str(folder)}})
    return notebook


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_pictures_are_inline(executed):
    pictures = [output for output in outputs(executed) if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    html, _ = HTMLExporter().from_notebook_node(executed)
    assert html.count('src="data:image/png;base64') == 3


def test_progress_and_metrics_show(executed):
    html, _ = HTMLExporter().from_notebook_node(executed)
    assert "Epoch 5: 100%" in html
    assert "<th>train_loss</th>" in html


def test_nothing_complains(executed):
    said = [output.text for output in outputs(executed) if output.get("name") == "stderr"]
    assert not [text for text in said if "Warning" in text or "Error" in text]
