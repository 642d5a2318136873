"""Output of the verbs: lines, JSON, tables that fit the terminal, evaluations."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import operator
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..diagnostics.analysis import Analysis
    from ..diagnostics.check import CheckResult
    from ..training.frozen import Frozen
    from ..training.tasks import Evaluation


class _Wrapping(Console):
    """A console that breaks lines between words, in a terminal only: pipes and paths keep theirs whole."""

    def print(self, *objects: Any, **options: Any) -> None:
        if self.is_terminal:
            objects = tuple(wrapped(one, self.width) if isinstance(one, str) else one for one in objects)
        super().print(*objects, **options)


def wrapped(text: str, width: int) -> str:
    """Lines of at most ``width`` columns, broken between words; what follows a break is indented by two more.

    A word that is longer stays whole, and so does a line of two, such as ``wrote PATH``: it is there to be copied.

    Examples:
        >>> print(wrapped("  a line of words that is too long", 20))
          a line of words
            that is too long
    """
    broken = []
    for line in text.split("\n"):
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        rules: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
        whole = len(line.split()) <= 2
        broken.append(line if whole else textwrap.fill(line, width, subsequent_indent=indent, **rules))
    return "\n".join(broken)


_look: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
out = _Wrapping(**_look)
err = Console(stderr=True, **_look)

PIPE_WIDTH = 200
NARROWEST_NAME = 16
"""The smallest width of a column of names before a table is split."""


def print_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], totals: Sequence[Sequence[str]] = (), *, names: int = 2
) -> None:
    """Print a table without truncation, for any width of the terminal.

    In a narrow terminal, names are folded, then heads and nested shapes, and finally the columns are spread over
    several tables. A figure is folded only if it is wider than the terminal.

    Args:
        heads: one per column.
        rows: their cells.
        totals: rows below a line.
        names: the number of columns, from the left, that identify a row: each table repeats them.
    """
    console = out if out.is_terminal else Console(width=PIPE_WIDTH, **_look)
    whole, figures = [heads, *rows, *totals], range(names, len(heads))
    broken = [[*row[:names], *(cell.replace("), (", "),\n (") for cell in row[names:])] for row in whole]
    broken[0] = [*heads[:names], *(head.replace(" ", "\n") for head in heads[names:])]
    for parts in range(len(figures) + 1):
        cells = broken if parts else whole
        size = math.ceil(len(figures) / max(1, parts))
        groups = [[*range(names), *figures[start : start + size]] for start in range(0, len(figures), size)]
        fits = all(_least_width(cells, group, names) <= console.width for group in groups)
        if fits:
            break
    for group in groups:
        table = Table()
        for column in group:
            table.add_column(cells[0][column], overflow="fold", no_wrap=fits and column >= names)
        for position, row in enumerate(cells[1:], start=1):
            table.add_row(*(row[column] for column in group), end_section=position == len(rows))
        console.print(table, soft_wrap=False)


def _least_width(cells: Sequence[Sequence[str]], columns: Sequence[int], names: int) -> int:
    """The smallest width of a table of these columns, with a border and two spaces for each."""
    widths = [max(cell_len(line) for row in cells for line in row[column].split("\n")) for column in columns]
    return sum(min(width, NARROWEST_NAME) for width in widths[:names]) + sum(widths[names:]) + 3 * len(columns) + 1


def print_json(*parts: object) -> None:
    """Print dicts and dataclasses as one JSON object; null stands for NaN and infinity, which JSON does not have."""
    print(json.dumps(functools.reduce(operator.or_, map(_plain, parts)), indent=2, allow_nan=False))


def _plain(answer: object) -> Any:
    if dataclasses.is_dataclass(answer):
        return _plain(vars(answer))
    if isinstance(answer, dict):
        return {" ".join(key) if isinstance(key, tuple) else key: _plain(value) for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [_plain(value) for value in answer]
    return None if isinstance(answer, float) and not math.isfinite(answer) else answer


def percent(fraction: float, digits: int = 2) -> str:
    """A fraction as people read it; JSON has the fraction itself.

    Examples:
        >>> percent(0.97554)
        '97.55 %'
    """
    return f"{100 * fraction:.{digits}f} %"


def stdout_for_the_answer(as_json: bool) -> contextlib.AbstractContextManager[object]:
    """With ``--json``, redirect to stderr whatever libraries print while they work."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def print_caveat(found: Analysis | CheckResult | Evaluation | Frozen) -> None:
    """Print what must precede any statement about the inverse."""
    if found.caveat:
        out.print(found.caveat)


def print_evaluation(run: Path, found: Evaluation) -> None:
    """Print the scores and the round trips of a run."""
    print_caveat(found)
    out.print(f"run {run}")
    out.print(f"  {found.summary()}, {found.parameters:,} parameters")
    if found.caveat:
        out.print("  of the chain alone:")
    for (dtype, mode), trip in found.round_trips.items():
        name = f"round-trip error, {dtype}, {mode} mode"
        out.print(f"  {name}: {trip.relative:.1e} relative, {percent(trip.bit_equal, 0)} bit-equal")
