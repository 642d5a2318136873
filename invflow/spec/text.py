"""JSON text as strict data, and where in the text each value stands."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

from ..errors import SpecError, SpecErrorDetail
from ..fields import shortened
from .limits import Limits

JsonPath: TypeAlias = tuple[str | int, ...]
_LARGEST_INT = 2**53
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)


@dataclass(frozen=True)
class Problem:
    """One fault at a path of the source document; ``at`` tells whether the key or the value is meant."""

    path: JsonPath
    message: str
    at: Literal["key", "value"] = "value"


class Source:
    """A document and where it came from: text with positions, or a dict without.

    Attributes:
        data: the parsed JSON, as it came.
        name: the file's name as the user gave it; None for a dict.
    """

    def __init__(self, data: Any, name: str | None = None, text: str | None = None) -> None:
        self.data = data
        self.name = name
        self.text = text

    def error(self, problems: Sequence[Problem]) -> SpecError:
        """The faults as one SpecError, each with its position in the text."""
        details: list[SpecErrorDetail] = []
        for problem in dict.fromkeys(problems):
            line, column = self._place(problem)
            path = ".".join(str(part) for part in problem.path)
            details.append({"path": path, "line": line, "column": column, "message": problem.message})
        if self.text is not None:
            details.sort(key=lambda detail: (detail["line"] or 0, detail["column"] or 0))
        return SpecError(details, self.name)

    def _place(self, problem: Problem) -> tuple[int | None, int | None]:
        if self.text is None:
            return None, None
        path = problem.path
        while path not in self._positions:  # a missing field stands where its object does
            path = path[:-1]
        key, value = self._positions[path]
        return line_and_column(self.text, key if problem.at == "key" else value)

    @functools.cached_property
    def _positions(self) -> dict[JsonPath, tuple[int, int]]:
        return {value.path: (value.key, value.offset) for value in _scan(self.text or "")}


def read_source(source: str | Path | dict[str, Any], limits: Limits) -> Source:
    """The document in a file, or a dict as it is.

    Raises:
        SpecError: no such file, not UTF-8, not JSON, duplicate keys, NaN or Infinity, or a limit passed.
    """
    if isinstance(source, dict):
        try:
            # A round trip through text: what reaches validation is JSON and nothing else, and a copy.
            text = json.dumps(source, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise SpecError([_detail(f"the dict is no JSON document: {error}")]) from None
        if len(text) > limits.text_bytes:
            raise SpecError([_detail(f"the document has {len(text)} bytes as JSON, the limit is {limits.text_bytes}")])
        document = Source(json.loads(text))
    else:
        name = str(source)
        document = parse_text(_read_file(Path(source), name, limits), name)
    _check_depth(document, limits.depth)
    if not isinstance(document.data, dict):
        raise document.error([Problem((), f"a spec is a JSON object, got {type(document.data).__name__}")])
    return document


def parse_text(text: str, name: str) -> Source:
    """Strict JSON. Raises SpecError with the line and column of every fault that can be told."""
    suspicious = False

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal suspicious
        found = dict(items)
        suspicious = suspicious or len(found) < len(items)
        return found

    def constant(_: str) -> None:
        nonlocal suspicious
        suspicious = True

    def number(digits: str) -> float:
        value = float(digits)
        if abs(value) == float("inf"):
            constant(digits)
        return value

    def integer(digits: str) -> int:
        if len(digits) > 17 or abs(int(digits)) > _LARGEST_INT:
            constant(digits)
            return 0
        return int(digits)

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number, parse_int=integer)
    except json.JSONDecodeError as error:
        _refuse(name, error.lineno, error.colno, f"not JSON: {error.msg[:1].lower()}{error.msg[1:]}")
    except RecursionError:
        _refuse(name, 1, 1, "the document nests too deep to be read")
    source = Source(data, name, text)
    if suspicious:
        raise source.error(list(_text_problems(text)))
    return source


def line_and_column(text: str, offset: int) -> tuple[int, int]:
    """Line and column, from 1, of an offset."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def _read_file(path: Path, name: str, limits: Limits) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(limits.text_bytes + 1)
    except FileNotFoundError:
        _refuse(name, None, None, "no such file")
    except OSError as error:
        _refuse(name, None, None, f"cannot be read: {error.strerror}")
    if len(raw) > limits.text_bytes:
        _refuse(name, 1, 1, f"the file is larger than the limit of {limits.text_bytes} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        _refuse(name, before.count(b"\n") + 1, len(before) - before.rfind(b"\n"), "not UTF-8 text")


def _refuse(name: str, line: int | None, column: int | None, message: str) -> NoReturn:
    raise SpecError([_detail(message, line, column)], name) from None


def _detail(message: str, line: int | None = None, column: int | None = None) -> SpecErrorDetail:
    return {"path": "", "line": line, "column": column, "message": message}


def _check_depth(source: Source, limit: int) -> None:
    level: list[tuple[JsonPath, Any]] = [((), source.data)]
    for _ in range(limit + 1):
        level = [
            ((*path, key), child)
            for path, value in level
            for key, child in (
                value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            )
        ]
        if not level:
            return
    raise source.error([Problem(level[0][0][:-1], f"objects and lists nest deeper than the limit of {limit}")])


@dataclass(frozen=True)
class _Value:
    """One value of a JSON text: path, offsets of key and value, first token, whether its key stood before."""

    path: JsonPath
    key: int
    offset: int
    token: str
    repeated: bool


def _scan(text: str) -> Iterator[_Value]:
    """Every value of a valid JSON text, in order."""
    open_containers: list[tuple[JsonPath, set[str]]] = []  # their paths, and the keys met so far
    path: JsonPath = ()
    key_at: int | None = None
    repeated = expects_key = False
    for match in _TOKEN.finditer(text):
        token, offset = match.group(), match.start()
        if token in "}]":
            path, _ = open_containers.pop()
            expects_key = False
        elif token == ",":
            step = path[-1]
            expects_key = isinstance(step, str)
            path = path if isinstance(step, str) else (*path[:-1], step + 1)
        elif token == ":":
            continue
        elif expects_key:
            name = json.loads(token)
            keys = open_containers[-1][1]
            repeated = name in keys
            keys.add(name)
            path, key_at, expects_key = (*path[:-1], name), offset, False
        else:
            yield _Value(path, offset if key_at is None else key_at, offset, token, repeated)
            key_at, repeated = None, False
            if token in "{[":
                open_containers.append((path, set()))
                path = (*path, "" if token == "{" else 0)
                expects_key = token == "{"


def _text_problems(text: str) -> Iterator[Problem]:
    """What the parser let pass: keys that stand twice, and numbers that are none."""
    for value in _scan(text):
        if value.repeated:
            yield Problem(value.path, f"duplicate key {value.path[-1]!r}", "key")
        if value.token in ("NaN", "Infinity", "-Infinity"):
            yield Problem(value.path, f"{value.token} is no number in a spec")
        elif value.token[0] in "-0123456789":
            number = float(value.token)
            if math.isinf(number) or (abs(number) > _LARGEST_INT and value.token.lstrip("-").isdigit()):
                yield Problem(value.path, f"the number {shortened(value.token, 30)} is out of range")
