"""``invflow doctor``."""

from __future__ import annotations

import itertools
import operator
import sys
import textwrap
from typing import TYPE_CHECKING

import typer

from .options import AsJson, DataRoot, PluginFiles
from .output import err, out, print_json, stdout_for_the_answer

if TYPE_CHECKING:
    from ..diagnostics.doctor import Finding

_NAME_WIDTH = 14


def doctor(data_root: DataRoot = None, as_json: AsJson = False, plugin: PluginFiles = None) -> None:
    """Tell what this machine has and lacks, and the fixes.

    Versions, extras, devices, whether sums are exact, the compiler, data and plug-ins. All plug-ins are loaded. Exit
    status 1 if there is a problem; an extra that only development needs is none, nor is a compiler.
    """
    from ..diagnostics.doctor import examine

    with stdout_for_the_answer(as_json), err.status("looking, and compiling a chain"):
        findings = list(examine(data_root, plugin or ()))
    problems = sum(one.problem for one in findings)
    if as_json:
        print_json({"ok": not problems, "problems": problems, "findings": findings})
    else:
        for topic, group in itertools.groupby(findings, operator.attrgetter("topic")):
            out.print(topic)
            for one in group:
                out.print(_as_line(one))
        counted = f"{problems} problem{'s' if problems > 1 else ''}, marked with !"
        out.print(counted if problems else "ok: nothing that is needed is missing")
    raise typer.Exit(1 if problems else 0)


def _as_line(one: Finding) -> str:
    """One line, broken between words only in a terminal, so that fixes can be copied."""
    text = f"{one.found}; fix: {one.fix}" if one.fix else one.found
    return textwrap.fill(
        f"{'!' if one.problem else ' '} {one.name:<{_NAME_WIDTH}} {text}",
        out.width if out.is_terminal else sys.maxsize,
        subsequent_indent=" " * (_NAME_WIDTH + 3),
        break_long_words=False,
        break_on_hyphens=False,
    )
