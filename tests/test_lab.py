"""The code of docs/lab.md runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(text):
    """(line, code) of each Python block."""
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, match.start()) + 2, match.group(1)


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_the_tutorial_runs(tmp_path, monkeypatch, data, request):
    if data == "mnist":
        monkeypatch.setenv("INVFLOW_DATA", str(request.getfixturevalue("mnist_root")))
    (tmp_path / "specs").mkdir()
    for spec in (ROOT / "specs").glob("*.json"):
        quick = re.sub(r'"epochs": \d+', '"epochs": 2', spec.read_text())
        quick = re.sub(r'"times": 16', '"times": 4', quick)
        quick = re.sub(r'"name": "(moons|mnist)"', r'"name": "\1", "test_size": 1000', quick)
        (tmp_path / "specs" / spec.name).write_text(quick)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "lab.md").read_text().replace("_digits.json", f"_{data}.json")
    names = {}
    for line, code in blocks(text):
        padded = "\n" * (line - 1) + code  # so that a failure names the line of the tutorial
        exec(compile(padded, "docs/lab.md", "exec"), names)
    assert names["baseline"].record["status"] == "finished"
