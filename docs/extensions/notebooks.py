"""The lab as notebooks to download: one with the answers, one with empty cells in their place.

They lie beside the pages, which link them: Sphinx writes both before it reads the pages.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from myst_nb.core.read import read_myst_markdown_notebook
from nbformat import NotebookNode
from sphinx.application import Sphinx

from invflow.files import write_atomically

LAB = Path(__file__).parent.parent / "lab.md"
FOLDER = "downloads"
YOURS = "# your answer"
_DIRECTIVE = re.compile(r"^:::\{(\w+)\}[^\n]*\n(.*?)^:::$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")


def read(source: Path = LAB) -> NotebookNode:
    """The notebook in a MyST page; an answer is a cell with the tag ``answer``, or a dropdown in a text."""
    return read_myst_markdown_notebook(source.read_text(encoding="utf-8"))


def downloadable(page: NotebookNode, answers: bool = True) -> NotebookNode:
    """A copy for Jupyter, which knows neither directives nor the other pages.

    Args:
        page: from `read`.
        answers: whether to keep them. If not, one empty cell stands for each question's code.
    """
    cells: list[NotebookNode] = []
    for cell in page.cells:
        tags = list(cell.metadata.get("tags", []))
        source = cell.source if cell.cell_type == "code" else _markdown(cell.source, answers)
        if "answer" in tags and not answers:
            if cells[-1].source == YOURS:
                continue
            source = YOURS
        if source:
            make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
            cells.append(make(source, id=f"cell-{len(cells)}", metadata={"tags": tags} if tags else {}))
    found = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": page.metadata["kernelspec"]})
    nbformat.validate(found)
    return found


def write(folder: Path) -> list[Path]:
    """Write ``lab.ipynb`` and ``lab_without_answers.ipynb`` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    page = read()
    paths = [folder / "lab.ipynb", folder / "lab_without_answers.ipynb"]
    for path, answers in zip(paths, (True, False), strict=True):
        write_atomically(path, nbformat.writes(downloadable(page, answers)).encode())
    return paths


def _markdown(text: str, answers: bool) -> str:
    """A text in plain Markdown: answers become quotations, links to other pages their words."""

    def plain(directive: re.Match[str]) -> str:
        name, body = directive.groups()
        if name != "dropdown":  # what is only for the page
            return ""
        return "\n".join(f"> {line}" for line in f"**Answer.** {body}".splitlines()) if answers else ""

    return re.sub(r"\n{3,}", "\n\n", _LINK.sub(r"\1", _DIRECTIVE.sub(plain, text))).strip()


def setup(app: Sphinx) -> dict[str, Any]:
    """Tells Sphinx of the extension."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / FOLDER))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
