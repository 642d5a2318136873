"""The page of the command line: what each verb's `--help` prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer
from sphinx.application import Sphinx
from typer.testing import CliRunner

from invflow.cli import app as command_line

PAGE = "generated/command_line.md"


def write_page(app: Sphinx) -> None:
    """Writes the page, if it has changed."""
    verbs = sorted(typer.main.get_command(command_line).commands)  # type: ignore[attr-defined]
    text = ["# The command line", "", "```text", _help(), "```", ""]
    for verb in verbs:
        text += [f"(command-{verb})=", f"## invflow {verb}", "", "```text", _help(verb), "```", ""]
    path = Path(app.srcdir) / PAGE
    path.parent.mkdir(exist_ok=True)
    made = "\n".join(text)
    if not path.exists() or path.read_text() != made:
        path.write_text(made)


def _help(*verb: str) -> str:
    with patch.dict(os.environ, {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}):
        result = CliRunner().invoke(command_line, [*verb, "--help"], prog_name="invflow")
    if result.exit_code:
        raise RuntimeError(f"invflow {' '.join(verb)} --help: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def setup(app: Sphinx) -> dict[str, Any]:
    """Tells Sphinx of the extension."""
    app.connect("builder-inited", write_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
