"""The command line in a terminal of 80 columns: nothing important is truncated."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from rich.console import Console

import invflow
from invflow.cli import VERBS, app, main, output
from invflow.diagnostics.check import chain_of
from invflow.diagnostics.check import check as check_chain
from tests.test_training import tiny

WIDTH = 80
ROOT = Path(__file__).parent.parent
IRESNET = ROOT / "specs" / "iresnet_mnist.json"
NAMES = [name.replace("_", "-") for name in (verb.__name__ for verb in VERBS)]
RUN = "from invflow.cli import main; main()"


def in_a_terminal(*arguments, width=WIDTH):
    """The lines that a command prints in a terminal of so many columns, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    printed = b""
    with contextlib.suppress(OSError):  # Linux raises it at the end of a terminal
        while part := os.read(ours, 2**16):
            printed += part
    os.close(ours)
    assert process.wait(timeout=120) == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed.decode()).splitlines()
    long = [line for line in lines if len(line) > width and len(line.split()) > 2]
    assert not long, "a line is wider than the terminal, and not because of a path"
    assert not any("…" in line for line in lines)
    return lines


@pytest.mark.parametrize("width", [WIDTH, 60])
@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "irevnet_digits"),
        ("check", "irevnet_digits", "--memory", "--conditioning"),
        ("show", "irevnet_digits"),
        ("show", "irevnet_digits", "--memory"),
    ],
    ids=" ".join,
)
def test_all_that_a_verb_prints_fits(arguments, width):
    """And the layers, which differ in their numbers alone, stay apart."""
    verb, name, *options = arguments
    lines = in_a_terminal(verb, ROOT / "specs" / f"{name}.json", *options, width=width)
    for number in ("4", "11"):
        assert any(re.match(rf"│\s*{number}\b|\s*\({number}\)", line) for line in lines), number


def rows(lines, names=2):
    """The rows of tables that were split by columns, joined; folded names are joined, and their spaces removed."""
    tables, row = [], None
    for line in lines:
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if line.startswith("┏"):
            tables.append([])
        if not line.startswith("│"):
            row = None
        elif row is None or any(cells[names:]):
            row = cells
            tables[-1].append(row)
        else:
            row[names - 1] += cells[names - 1]
    joined = [
        [*parts[0][:names], *(cell for part in parts for cell in part[names:])] for parts in zip(*tables, strict=True)
    ]
    return [[*(cell.replace(" ", "") for cell in row[:names]), *row[names:]] for row in joined]


def test_check_cuts_no_name_and_no_number():
    lines = in_a_terminal("check", IRESNET)
    report = check_chain(chain_of(IRESNET))
    found = rows(lines)
    expected = [
        [layer.name.removeprefix("layers."), layer.layer.replace(" ", ""),
         str(layer.input_shape), str(layer.output_shape), f"{layer.parameters:,}", layer.exactness]
        for layer in report.layers
    ]  # fmt: skip
    assert [row[:6] for row in found[:-1]] == expected
    assert found[-1][:6] == ["", "wholechain", "", "", f"{report.parameters:,}", "float"]
    for row in found:
        assert len(row) == 10
        assert all(re.fullmatch(r"\d\.\de[+-]\d\d", cell) for cell in row[6:]), row
    assert lines[-1] == "ok: invertible up to rounding"


def test_compare_cuts_no_name_and_no_number(tmp_path):
    path = tmp_path / "a_name_that_is_longer_than_its_column.json"
    path.write_text(json.dumps(tiny(epochs=1).document))
    lines = in_a_terminal("compare", path, "--seeds", 2, "--out", tmp_path / "out")
    ((name, parameters, score, error, seconds),) = rows(lines, names=1)
    assert name == str(path)
    assert parameters == f"{sum(weight.numel() for weight in invflow.build_model(path).parameters()):,}"
    assert re.fullmatch(r"\d+\.\d\d % ± \d+\.\d\d", score)
    assert re.fullmatch(r"\d\.\de-\d\d", error)
    assert seconds.isdigit()
    assert lines[-1] == f"wrote {tmp_path / 'out' / 'comparison.png'}", "a path stays on its line, to be copied"


@pytest.fixture
def table(monkeypatch):
    """Print a table in a terminal of some width and return its lines."""

    def run(width, *arguments, **more):
        console = Console(width=width, force_terminal=True, no_color=True, markup=False, file=io.StringIO())
        monkeypatch.setattr(output, "out", console)
        output.print_table(*arguments, **more)
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue()).splitlines()
        assert all(len(line) <= width for line in lines)
        return lines

    return run


HEADS = ("", "layer", *(f"figure {i}" for i in range(5)))
ROW = ("10", "Outer(inner=[relu](sizes=[12345, 67890]))", *(f"{i}.000e+00" for i in range(5)))


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120])
def test_a_table_keeps_everything_at_any_width(table, width):
    lines = table(width, HEADS, [ROW], [("", "whole chain", *ROW[2:])])
    first, total = rows(lines)
    assert first == [ROW[0], ROW[1].replace(" ", ""), *ROW[2:]]
    assert total == ["", "wholechain", *ROW[2:]]


def test_a_figure_wider_than_the_terminal_is_folded(table):
    text = "".join(table(24, ("", "layer", "in"), [("0", "Split()", "7" * 40)]))
    assert text.count("7") == 40


def test_a_pipe_gets_one_table(capsys):
    output.print_table(HEADS, [ROW])
    assert capsys.readouterr().out.count("┏") == 1


def helped(capsys, monkeypatch, *arguments):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= WIDTH for line in lines)
    return lines


def test_help_lists_every_verb_with_its_whole_summary(capsys, monkeypatch):
    lines = helped(capsys, monkeypatch)
    listed = dict(line.split(maxsplit=1) for line in lines[lines.index("Commands:") + 1 :])
    assert listed == {name: verb.__doc__.split("\n")[0] for name, verb in zip(NAMES, VERBS, strict=True)}


def packed(text):
    """The text without spaces, because a line may also end after a hyphen."""
    return "".join(text.split())


@pytest.mark.parametrize("verb", VERBS, ids=NAMES)
def test_help_of_a_verb_is_whole(capsys, monkeypatch, verb):
    name = verb.__name__.replace("_", "-")
    text = packed(" ".join(helped(capsys, monkeypatch, name)))
    assert packed(verb.__doc__) in text
    for parameter in typer.main.get_command(app).commands[name].params:
        assert packed(parameter.help) in text


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"invflow {version('invflow')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["check", str(ROOT / "specs" / "irevnet_digits.json")]])
def test_what_is_not_needed_is_not_loaded(arguments):
    script = (
        "import sys\n"
        "from invflow.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "late = {'lightning', 'torchvision', 'matplotlib', 'sklearn', 'hypothesis'} & set(sys.modules)\n"
        "assert not late, late"
    )
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.DEVNULL)
