"""JSON text as strict data, and where in the text each value stands."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

from ..errors import SpecError, SpecErrorDetail
from ..fields import quoted, shortened
from .limits import Limits

JsonPath: TypeAlias = tuple[str | int, ...]
MOST_PROBLEMS = 100
"""Where a document has more faults, the first of them are reported: nobody reads more at once."""

_LARGEST_INT = 2**53
_SPACE = re.compile(r"[ \t\n\r]*")
_WORD = re.compile(r"[^\s,\]}]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Skips a value at the speed of C; `str`, because nobody wants the numbers.
_decode = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=str).raw_decode


@dataclass(frozen=True)
class Problem:
    """One fault at a path of the source document.

    Attributes:
        at: whether the key or the value is meant.
        offset: where in the text, for what a path does not tell: a key that stands twice.
    """

    path: JsonPath
    message: str
    at: Literal["key", "value"] = "value"
    offset: int | None = None


class Source:
    """A document and where it came from: text with positions, or a dict without.

    Attributes:
        data: the parsed JSON, as it came.
        name: the file's name as the user gave it; None for a dict.
        text: what was in the file; None for a dict.
    """

    def __init__(self, data: Any, name: str | None = None, text: str | None = None) -> None:
        self.data = data
        self.name = name
        self.text = text
        self._scanned: dict[int, tuple[dict[str | int, tuple[int, int]], Iterator[tuple[str | int, int, int]]]] = {}

    def error(self, problems: Iterable[Problem]) -> SpecError:
        """The faults as one SpecError, each with its position in the text."""
        details: list[SpecErrorDetail] = []
        for problem in problems:
            line, column = self._place(problem)
            path = ".".join(printable(part) for part in problem.path)
            details.append({"path": path, "line": line, "column": column, "message": problem.message})
        if self.text is not None:
            details.sort(key=lambda detail: (detail["line"] or 0, detail["column"] or 0))
        return SpecError(details, self.name)

    def _place(self, problem: Problem) -> tuple[int | None, int | None]:
        if self.text is None:
            return None, None
        if problem.offset is not None:
            return line_and_column(self.text, problem.offset)
        key = value = _skip_space(self.text, 0)
        for step in problem.path:
            place = self._member(self.text, value, step)
            if place is None:  # a missing field stands where its object does
                break
            key, value = place
        return line_and_column(self.text, key if problem.at == "key" else value)

    def _member(self, text: str, container: int, step: str | int) -> tuple[int, int] | None:
        """The offsets of key and value of a member of the object or list at an offset."""
        known, rest = self._scanned.setdefault(container, ({}, _members(text, container)))
        while step not in known:
            member = next(rest, None)  # no further than needed: what is wrong may be deep inside
            if member is None:
                return None
            name, key_at, value_at = member
            known[name] = key_at, value_at
        return known[step]


class Problems:
    """The faults found so far, each once; the document is given up on when there are too many.

    Attributes:
        noted: how often a fault was noted, the same one in several iterations counted each time.
    """

    def __init__(self, source: Source) -> None:
        self.noted = 0
        self._source = source
        self._found: dict[Problem, None] = {}

    def note(self, problem: Problem) -> None:
        """Notes a fault. Raises SpecError where it is the last that anybody will read."""
        self.noted += 1
        self._found[problem] = None
        if len(self._found) >= MOST_PROBLEMS:
            raise self.error()

    def error(self) -> SpecError:
        """All of them as one error."""
        return self._source.error(self._found)


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
        document = parse_text(text, None, limits)
    else:
        name = str(source)
        document = parse_text(_read_file(Path(source), name, limits), name, limits)
    if not isinstance(document.data, dict):
        raise document.error([Problem((), f"a spec is a JSON object, got {shortened(document.data)}")])
    return document


def parse_text(text: str, name: str | None, limits: Limits) -> Source:
    """Strict JSON; without a name, the text is no file's and has no positions.

    Raises:
        SpecError: with the line and column of every fault that can be told.
    """
    suspicious = "\\u" in text

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
        if math.isinf(value):
            constant(digits)
        return value

    def integer(digits: str) -> int:
        if _too_large(digits):
            constant(digits)
            return 0
        return int(digits)

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number, parse_int=integer)
    except json.JSONDecodeError as error:
        raise Source(None, name, text).error([_syntax_fault(text, error)]) from None
    except RecursionError:
        _refuse(name, 1, 1, "the document nests too deep to be read")
    source = Source(data, name, None if name is None else text)
    _check_depth(source, limits.depth)
    if suspicious:
        problems = list(itertools.islice(_text_problems(text, _skip_space(text, 0), ()), MOST_PROBLEMS))
        if problems:
            raise source.error(problems)
    return source


def line_and_column(text: str, offset: int) -> tuple[int, int]:
    """Line and column, from 1, of an offset."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def printable(step: str | int) -> str:
    """A step of a path as one line that every terminal takes."""
    return str(step) if str(step).isprintable() else repr(step)[1:-1]


def _syntax_fault(text: str, error: json.JSONDecodeError) -> Problem:
    """What the parser says, as a user would, and the same for every version of Python."""
    offset, found = error.pos, text[error.pos : error.pos + 1]
    before = text[:offset].rstrip()
    after = text[offset + 1 :].lstrip()[:1]
    messages = {
        "Expecting property name enclosed in double quotes": "expected a key in double quotes",
        "Expecting ',' delimiter": "expected a comma, or the end of the object or list",
        "Expecting ':' delimiter": "expected a colon after the key",
        "Expecting value": "expected a value",
        "Extra data": "the document ends before this",
        "Invalid control character at": "a line break or another control character inside a string",
        "Unterminated string starting at": "a string without its closing quote",
        "Invalid \\escape": "an unknown escape in a string; a backslash itself is written twice",
    }
    if not found:
        message = "the document ends too early" if text.strip() else "the document is empty"
    elif found == "'":
        message = "strings and keys stand in double quotes"
    elif text.startswith(("//", "/*", "#"), offset):
        message = 'a spec has no comments; use "note"'
    elif before.endswith(",") and found in "}]":
        offset, message = len(before) - 1, "a comma too many"
    elif found == "," and after in ("}", "]"):
        message = "a comma too many"
    else:
        message = messages.get(error.msg.rstrip(": "), f"{error.msg[:1].lower()}{error.msg[1:]}")
    return Problem((), f"not JSON: {message}", offset=offset)


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


def _refuse(name: str | None, line: int | None, column: int | None, message: str) -> NoReturn:
    raise SpecError([_detail(message, line, column) if name else _detail(message)], name) from None


def _detail(message: str, line: int | None = None, column: int | None = None) -> SpecErrorDetail:
    return {"path": "", "line": line, "column": column, "message": message}


def _check_depth(source: Source, limit: int) -> None:
    path = deeper(source.data, limit) if isinstance(source.data, dict | list) else None
    if path is not None:
        raise source.error([Problem(path, f"objects and lists nest deeper than the limit of {limit}")])


def deeper(value: Any, limit: int) -> JsonPath | None:
    """The path of the first object or list that has more than ``limit`` around it."""
    if limit < 0:
        return ()
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        found = deeper(child, limit - 1) if isinstance(child, dict | list) else None
        if found is not None:
            return key, *found
    return None


def _members(text: str, offset: int) -> Iterator[tuple[str | int, int, int]]:
    """What the object or list at an offset of a valid JSON text holds: key or index, offsets of key and value."""
    closing = {"{": "}", "[": "]"}.get(text[offset], "")
    offset = _skip_space(text, offset + 1)
    index = 0
    while closing and text[offset] != closing:
        key_at, step = offset, index
        if closing == "}":
            step, offset = _decode(text, offset)
            offset = _skip_space(text, _skip_space(text, offset) + 1)
        yield step, key_at, offset
        _, offset = _decode(text, offset)
        offset = _skip_space(text, offset)
        if text[offset] == ",":
            offset = _skip_space(text, offset + 1)
        index += 1


def _skip_space(text: str, offset: int) -> int:
    return _SPACE.match(text, offset).end()  # type: ignore[union-attr]  # it matches nothing too


def _text_problems(text: str, offset: int, path: JsonPath) -> Iterator[Problem]:
    """What the parser let pass: keys that stand twice, numbers that are none, halves of characters."""
    if text[offset] in "{[":
        met: set[str | int] = set()
        for step, key_at, value_at in _members(text, offset):
            if step in met:
                yield Problem((*path, step), f"duplicate key {quoted(step)}", "key", key_at)
            if isinstance(step, str) and _SURROGATE.search(step):
                yield Problem(path, "a key holds half a character (a lone surrogate)", "key", key_at)
                continue
            met.add(step)
            yield from _text_problems(text, value_at, (*path, step))
    elif text[offset] == '"':
        if _SURROGATE.search(_decode(text, offset)[0]):
            yield Problem(path, "the string holds half a character (a lone surrogate)", offset=offset)
    else:
        word = _WORD.match(text, offset).group()  # type: ignore[union-attr]
        if word in ("NaN", "Infinity", "-Infinity"):
            yield Problem(path, f"{word} is no number in a spec", offset=offset)
        elif word[0] in "-0123456789" and (_too_large(word) if word.lstrip("-").isdigit() else math.isinf(float(word))):
            cut = word if len(word) <= 30 else f"{word[:27]}..."
            yield Problem(path, f"the number {cut} is out of range", offset=offset)


def _too_large(digits: str) -> bool:
    return len(digits) > 17 or abs(int(digits)) > _LARGEST_INT
