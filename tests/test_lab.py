"""The lab: its cells run with either data, and its two forms to download are what they claim to be."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbconvert.preprocessors import ExecutePreprocessor

import invflow

ROOT = Path(__file__).parent.parent
ANSWER = re.compile(r"^:::\{dropdown\} Answer\n(.*?)^:::$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def notebooks():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "extensions" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(notebooks):
    return notebooks.read()


def code(page, answers):
    """The code cells that are answers, or those that are not."""
    return [c for c in page.cells if c.cell_type == "code" and ("answer" in c.metadata.get("tags", [])) is answers]


def executed(cells, folder):
    """The cells after they ran in an empty folder."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.source, metadata=c.metadata) for c in cells])
    ExecutePreprocessor(timeout=300).preprocess(notebook, {"metadata": {"path": str(folder)}})
    return notebook.cells


def use(data, monkeypatch, request):
    monkeypatch.setenv("INVFLOW_LAB_DATA", data)
    if data == "mnist":
        monkeypatch.setenv("INVFLOW_DATA", str(request.getfixturevalue("mnist_root")))


def texts(cell, stream):
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def quick(cells):
    """The cells with one epoch in place of many."""
    found = []
    for cell in cells:
        source, times = re.subn(r'epochs(=|": )(\d+|\{[^}]*\}\[DATA\])', r"epochs\g<1>1", cell.source)
        found.append(nbformat.v4.new_code_cell(source, metadata=cell.metadata))
        assert "epochs=40" not in source
        found[-1].metadata["shortened"] = times
    assert sum(cell.metadata["shortened"] for cell in found) == 4  # the loop, and three trainings by invflow.train
    return found


def test_every_cell_runs(page, tmp_path, monkeypatch, request):
    """On MNIST; with the digits they run, all epochs long, whenever the site is built."""
    use("mnist", monkeypatch, request)
    for cell in executed(quick(c for c in page.cells if c.cell_type == "code"), tmp_path):
        assert not texts(cell, "stderr")
        assert re.search(r"^\d+\.\d s\n\Z", texts(cell, "stdout"), re.MULTILINE), cell.source  # the time it took
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == ("mystnb" in cell.metadata), cell.source  # the description of a picture


def test_the_loop_of_the_session_trains_the_baseline(page, tmp_path, monkeypatch, request):
    """On 500 images of MNIST to 80 ± 5 %, as in the original session."""
    use("mnist", monkeypatch, request)
    every = [cell for cell in page.cells if cell.cell_type == "code"]
    last = next(cell for cell in every if "\ntrain(baseline)" in cell.source)
    given = [cell for cell in every[: every.index(last)] if cell in code(page, answers=False)]
    last = executed([*given, last], tmp_path)[-1]
    percent = float(re.match(r"([\d.]+) %", texts(last, "stdout")).group(1))
    assert 75 <= percent <= 85


def test_every_question_is_answered_by_a_cell(page):
    """Right after its text, so that nothing of another question stands between."""
    questions = 0
    for text, after in itertools.pairwise(page.cells):
        asked = text.source.count("**Question.**") if text.cell_type == "markdown" else 0
        if asked:
            questions += 1
            assert asked == 1, text.source
            assert "answer" in after.metadata.get("tags", []), text.source
    assert questions > 20


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_its_specs_are_those_of_the_repository(page, data, monkeypatch):
    """A notebook that is downloaded alone has no folder of specs, so it writes them out."""
    monkeypatch.setenv("INVFLOW_LAB_DATA", data)
    names = {"os": os}
    for cell in code(page, answers=False):
        if re.search(r"^(DATA|\w+_spec) = ", cell.source, re.MULTILINE):
            exec(cell.source, names)
    shipped = {"vgg": f"vgg_{data}", "iresnet": f"iresnet_{data}", "moons": "iresnet_moons"}
    shipped |= {"digits": {"walks": "irevnet_digits"}, "mnist": {"irevnet": "irevnet_mnist"}}[data]
    for name, file in shipped.items():
        spec = invflow.load_spec(ROOT / "specs" / f"{file}.json")
        assert invflow.load_spec(names[f"{name}_spec"]).hash == spec.hash, name


def test_without_answers_none_is_left(notebooks, page):
    found = notebooks.downloadable(page, answers=False)
    everything = "\n".join(cell.source for cell in found.cells)
    for cell in code(page, answers=True):
        assert cell.source not in everything
        for name in re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE):
            assert f"def {name}" not in everything
            assert f"class {name}" not in everything
    answers = [answer for cell in page.cells for answer in ANSWER.findall(cell.source)]
    assert len(answers) > 10
    for answer in answers:
        assert answer.strip() not in everything
    assert "**Answer.**" not in everything
    questions = sum("**Question.**" in cell.source for cell in page.cells)
    assert sum(cell.source == notebooks.YOURS for cell in found.cells) == questions


@pytest.mark.parametrize("answers", [True, False])
def test_jupyter_reads_the_downloads(notebooks, page, answers):
    found = notebooks.downloadable(page, answers)
    nbformat.validate(found)
    for cell in found.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
            continue
        assert ":::" not in cell.source
        assert not re.search(r"\{\w+\}`|\]\((?!https?:)", cell.source)
    given = [cell.source for cell in found.cells if cell.source in {c.source for c in code(page, answers=False)}]
    assert len(given) == len(code(page, answers=False))
    if answers:
        assert sum(cell.source.count("> **Answer.**") for cell in found.cells) > 10


def test_writing_twice_gives_the_same_files(notebooks, tmp_path):
    first = [path.read_bytes() for path in notebooks.write(tmp_path)]
    assert first == [path.read_bytes() for path in notebooks.write(tmp_path)]
    assert all(json.loads(content)["nbformat"] == 4 for content in first)
