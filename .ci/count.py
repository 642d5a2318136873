"""Lines of code below a folder: blank lines, comments and docstrings not counted."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

NOTHING = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """How many lines of a module hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOTHING:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        # Docstrings, those of attributes too: strings that stand alone.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main(folder: str = "invflow") -> None:
    """Prints the count of each room, and of all."""
    rooms: dict[str, int] = {}
    for path in sorted(Path(folder).rglob("*.py")):
        room = path.relative_to(folder).parts[0]
        rooms[room] = rooms.get(room, 0) + code_lines(path.read_text())
    for room, count in rooms.items():
        print(f"{count:6,}  {room}")
    print(f"{sum(rooms.values()):6,}  {folder}")


if __name__ == "__main__":
    main(*sys.argv[1:])
