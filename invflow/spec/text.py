"""Strict parsing of JSON text, and the position in the text of every value."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..errors import SpecError, SpecErrorDetail
from ..fields import cut, quoted, shortened
from .limits import Limits

JsonPath: TypeAlias = tuple[str | int, ...]
Place: TypeAlias = Literal["key", "value"]
MOST_PROBLEMS = 100
"""The largest number of faults that are reported for one document."""

_MOST_NOTED = 10 * MOST_PROBLEMS  # the same fault in every iteration costs time in each

_LARGEST_INT = 2**53
_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}:,]|[^][{}:,\s"]+')
# What a text has if any of its numbers is out of range, or any of its characters may be a surrogate.
_SUSPICIOUS = re.compile(r"\\u|NaN|Infinity|\d{16}|[eE]\+?\d{3}")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Problem:
    """One fault at a path of the source document.

    Attributes:
        at: whether the error points at the key or at the value.
        offset: the position in the text, if the path is ambiguous: a duplicate key.
    """

    path: JsonPath
    message: str
    at: Place = "value"
    offset: int | None = None


@dataclass
class Source:
    """A document and its origin: a text with positions, or a dict without.

    Attributes:
        data: the parsed JSON, before any expansion.
        name: the file's name as the user gave it; None for a dict.
        text: the file's text; None for a dict.
    """

    data: Any
    name: str | None = None
    text: str | None = None

    def error(self, problems: Iterable[Problem]) -> SpecError:
        """The faults as one SpecError, each with its position in the text."""
        problems = list(problems)
        places: Iterable[tuple[int | None, int | None]] = [(None, None)] * len(problems)
        if self.text is not None:
            places = [line_and_column(self.text, offset) for offset in self._offsets(self.text, problems)]
        details: list[SpecErrorDetail] = [
            {"path": ".".join(map(printable, problem.path)), "line": line, "column": column, "message": problem.message}
            for problem, (line, column) in zip(problems, places, strict=True)
        ]
        return SpecError(sorted(details, key=lambda detail: (detail["line"] or 0, detail["column"] or 0)), self.name)

    @staticmethod
    def _offsets(text: str, problems: Sequence[Problem]) -> Iterator[int]:
        """Where each fault is in the text; that of a missing field is at its object."""
        paths = {one.path[:steps] for one in problems if one.offset is None for steps in range(len(one.path) + 1)}
        values = _values(text, max(map(len, paths))) if paths else ()
        found = {path: {"key": key, "value": value} for path, key, value, _ in values if path in paths}
        for problem in problems:
            path = problem.path
            while problem.offset is None and path not in found:
                path = path[:-1]
            yield found[path][problem.at] if problem.offset is None else problem.offset


class Problems:
    """The distinct faults found so far; reading stops when there are too many.

    Attributes:
        noted: how often a fault was noted; the same fault in several iterations counts each time.
    """

    def __init__(self, source: Source) -> None:
        self.noted = 0
        self._source = source
        self._found: dict[Problem, None] = {}

    def note(self, path: JsonPath, message: str, at: Place = "value", last: bool = False) -> None:
        """Notes a fault; raises SpecError with all of them if it is the last, or there are too many."""
        self.noted += 1
        self._found[Problem(path, message, at)] = None
        if last or len(self._found) >= MOST_PROBLEMS or self.noted >= _MOST_NOTED:
            raise self.error()

    def error(self) -> SpecError:
        """All faults as one error."""
        return self._source.error(self._found)


def refusal(message: str, name: str | None = None, text: str | None = None, offset: int = 0) -> SpecError:
    """The error for a document that cannot be read: one fault, at an offset of the text if there is one."""
    return Source(None, name, text).error([Problem((), message, offset=offset)])


def read_source(source: str | Path | dict[str, Any], limits: Limits) -> Source:
    """Reads the document in a file; a dict is checked and copied.

    Raises:
        SpecError: no such file, not UTF-8, not JSON, duplicate keys, NaN or Infinity, or a limit exceeded.
    """
    if isinstance(source, dict):
        try:
            # A round trip through text: validation sees pure JSON, and a copy.
            text = json.dumps(source, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise refusal(f"the dict is not a JSON document: {error}") from None
        if len(text) > limits.text_bytes:
            raise refusal(f"the document has {len(text)} bytes as JSON, the limit is {limits.text_bytes}")
        document = parse_text(text, None, limits)
    else:
        document = parse_text(_read_file(str(source), limits), str(source), limits)
    if not isinstance(document.data, dict):
        raise document.error([Problem((), f"a spec is a JSON object, got {shortened(document.data)}")])
    return document


def parse_text(text: str, name: str | None, limits: Limits) -> Source:
    """Parses strict JSON; without a name, the text does not come from a file, and errors have no positions.

    Raises:
        SpecError: with the line and column of every fault that can be located.
    """
    repeated: list[Any] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            repeated.append(items)
        return found

    positions = None if name is None else text
    try:
        # Numbers remain text until they are known to be in range.
        skeleton = json.loads(text, object_pairs_hook=pairs, parse_constant=str, parse_float=str, parse_int=str)
    except json.JSONDecodeError as error:
        raise Source(None, name, text).error([_syntax_fault(text, error)]) from None
    except RecursionError:
        raise refusal("the document is nested too deeply to be read", name, positions) from None
    source = Source(skeleton, name, positions)
    too_deep = deeper(skeleton, limits.depth)
    if too_deep is not None:
        raise source.error([Problem(too_deep, f"objects and lists are nested deeper than the limit of {limits.depth}")])
    if repeated or _SUSPICIOUS.search(text):
        problems = list(itertools.islice(_text_problems(text, limits.depth + 1), MOST_PROBLEMS))
        if problems:
            raise source.error(problems)
    return Source(json.loads(text), name, positions)


def line_and_column(text: str, offset: int) -> tuple[int, int]:
    """The line and the column of an offset, counted from 1."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def printable(step: str | int) -> str:
    """A step of a path in printable characters, on one line."""
    return str(step) if str(step).isprintable() else repr(step)[1:-1]


def _syntax_fault(text: str, error: json.JSONDecodeError) -> Problem:
    """The parser's error in a user's words, which are the same in every version of Python."""
    offset, found = error.pos, text[error.pos : error.pos + 1]
    before = text[:offset].rstrip()
    after = text[offset + 1 :].lstrip()[:1]
    messages = {
        "Expecting property name enclosed in double quotes": "expected a key in double quotes",
        "Expecting ',' delimiter": "expected a comma, or the end of the object or list",
        "Expecting ':' delimiter": "expected a colon after the key",
        "Expecting value": "expected a value",
        "Extra data": "unexpected text after the end of the document",
        "Invalid control character at": "a line break or another control character inside a string",
        "Unterminated string starting at": "a string without a closing quote",
        "Invalid \\escape": "an unknown escape in a string; write a backslash twice",
    }
    if not found:
        message = "the document ends too early" if text.strip() else "the document is empty"
    elif found == "'":
        message = "strings and keys need double quotes"
    elif text.startswith(("//", "/*", "#"), offset):
        message = 'comments are not allowed; use "note"'
    elif before.endswith(",") and found in "}]":
        offset, message = len(before) - 1, "an extra comma"
    elif found == "," and after in ("}", "]"):
        message = "an extra comma"
    else:
        message = messages.get(error.msg.rstrip(": "), f"{error.msg[:1].lower()}{error.msg[1:]}")
    return Problem((), f"not JSON: {message}", offset=offset)


def _read_file(name: str, limits: Limits) -> str:
    try:
        with Path(name).open("rb") as file:
            raw = file.read(limits.text_bytes + 1)
    except FileNotFoundError:
        raise refusal("no such file", name) from None
    except OSError as error:
        raise refusal(f"cannot be read: {error.strerror}", name) from None
    if len(raw) > limits.text_bytes:
        raise refusal(f"the file is larger than the limit of {limits.text_bytes} bytes", name, "")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode()
        raise refusal("not UTF-8 text", name, before, len(before)) from None


def deeper(value: Any, limit: int) -> JsonPath | None:
    """The path of the first object or list that has more than ``limit`` others around it."""
    if not isinstance(value, dict | list):
        return None
    if limit < 0:
        return ()
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        found = deeper(child, limit - 1)
        if found is not None:
            return key, *found
    return None


def _values(text: str, depth: int) -> Iterator[tuple[JsonPath, int, int, str]]:
    """The values in a valid JSON text, to a depth: path, offset of the key, offset, and first token."""
    path: list[str | int] = []
    key_at, at_key = 0, False
    for token in _TOKEN.finditer(text):
        word, offset = token.group(), token.start()
        if word in "]}":
            path.pop()
            at_key = False
        elif word == ",":
            step = path[-1]
            at_key = isinstance(step, str)
            path[-1] = step if isinstance(step, str) else step + 1
        elif at_key:
            key_at, at_key = offset, False
            path[-1] = json.loads(word)
        elif word != ":":
            if len(path) <= depth:
                yield tuple(path), key_at if path and isinstance(path[-1], str) else offset, offset, word
            if word in "[{":
                at_key = word == "{"
                path.append("" if at_key else 0)


def _text_problems(text: str, depth: int) -> Iterator[Problem]:
    """The faults that the parser accepts: duplicate keys, numbers out of range, lone surrogates."""
    met: set[JsonPath] = set()
    duplicate: set[JsonPath] = set()
    for path, key_at, offset, word in _values(text, depth):
        if path in met:
            duplicate.add(path)
            if path[:-1] not in duplicate:
                yield Problem(path, f"duplicate key {quoted(path[-1])}", "key", key_at)
        met.add(path)
        if path and _SURROGATE.search(str(path[-1])):
            yield Problem(path[:-1], "the key contains half a character (a lone surrogate)", "key", key_at)
        if word[0] == '"' and _SURROGATE.search(json.loads(word)):
            yield Problem(path, "the string contains half a character (a lone surrogate)", offset=offset)
        elif word in ("NaN", "Infinity", "-Infinity"):
            yield Problem(path, f"{word} is not allowed in a spec", offset=offset)
        elif word[0] in "-0123456789" and _out_of_range(word):
            yield Problem(path, f"the number {cut(word, 30)} is out of range", offset=offset)


def _out_of_range(number: str) -> bool:
    if number.lstrip("-").isdigit():
        return len(number) > 17 or abs(int(number)) > _LARGEST_INT
    return math.isinf(float(number))
