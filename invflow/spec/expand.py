"""The macros of the spec language: `repeat`, `$item` and `$var`, expanded into plain JSON.

Expansion is pure: raw JSON in, raw JSON out, with a map from every part of the result to its origin.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..fields import LISTS, counted, quoted, shortened
from ..registry import did_you_mean
from .limits import Limits
from .text import JsonPath, Place, Problems, Source, deeper

Object: TypeAlias = dict[str, Any]
TOP_MACROS = ("vars", "stem")
"""The entries at the top that the expanded document does not have."""
REPEAT_KEYS = frozenset({"type", "times", "with", "note"})
_STRING_PER_VALUE = 16
_REFERENCE = 2  # the values that a reference counts as besides its own, because its origin is noted
_UNKNOWN = object()
"""The value of an invalid reference: the fault is noted, and the value is never used."""


@dataclass(frozen=True)
class Origin:
    """Where a value of the expanded document was written.

    Attributes:
        path: its path in the source document.
        iterations: the iteration of each enclosing repeat, outermost first: ``(number, times)``.
        substituted: whether ``path`` holds a reference, so that nothing below it has its own place.
        varies: whether that reference is to an item, which differs from one iteration to the next.
    """

    path: JsonPath
    iterations: tuple[tuple[int, int], ...] = ()
    substituted: bool = False
    varies: bool = False

    @property
    def iteration(self) -> str:
        """`` (iteration 2 of 4)``; empty outside every repeat."""
        if not self.iterations:
            return ""
        return f" (iteration {', '.join(f'{number} of {times}' for number, times in self.iterations)})"


@dataclass(frozen=True)
class Expanded:
    """A document without macros, and the origin of each of its parts."""

    source: Source
    data: dict[str, Any]
    origins: Mapping[JsonPath, Origin]

    def origin(self, path: JsonPath) -> Origin:
        """Where the value at a path of the expanded document was written."""
        for cut in range(len(path), -1, -1):
            origin = self.origins.get(path[:cut])
            if origin is not None:
                return replace(origin, path=origin.path if origin.substituted else (*origin.path, *path[cut:]))
        return Origin(path)


def expand(source: Source, limits: Limits) -> Expanded:
    """The document with every `repeat` flattened into the list that contains it and every reference replaced.

    The stem, a net of parts, becomes the first layer, a `joint`.

    Raises:
        SpecError: malformed repeats, unknown names, or more layers or values than the limits allow.
    """
    expander = _Expander(source, limits)
    own = {key: raw for key, raw in source.data.items() if key not in TOP_MACROS}
    above = {}
    if "stem" in source.data and "layers" in own:
        above["layers"] = expander.on_stem(source.data["stem"], own.pop("layers"))
    data = {**above, **{key: expander.value(raw, (key,), (key,), _Scope()) for key, raw in own.items()}}
    if expander.problems.noted:
        raise expander.problems.error()
    return Expanded(source, data, expander.origins)


def key_faults(raw: Object, known: Iterable[str], owner: str, tag: str = "type") -> Iterator[tuple[str, str, Place]]:
    """The faults in the keys of a document, notes included: the key, the message, and the place of the fault."""
    for key in raw:
        if key not in known and key not in (tag, "note"):
            yield key, f"unknown key {quoted(key)} of {owner}{did_you_mean(key, {*known, 'note'})}", "key"
    if not isinstance(raw.get("note", ""), str):
        yield "note", f"a note is a string, got {shortened(raw['note'])}", "value"


@dataclass(frozen=True)
class _Scope:
    items: Mapping[str, Any] = field(default_factory=dict)
    iterations: tuple[tuple[int, int], ...] = ()


def _own_size(raw: Object | list[Any]) -> int:
    """How many values an object or a list counts as without its contents: itself and its long keys."""
    return 1 + (sum(len(key) // _STRING_PER_VALUE for key in raw) if isinstance(raw, dict) else 0)


def _refers(raw: Any) -> bool:
    return isinstance(raw, dict) and ("$var" in raw or "$item" in raw)


def _repeats(raw: Any) -> bool:
    return isinstance(raw, dict) and raw.get("type") == "repeat"


class _Expander:
    def __init__(self, source: Source, limits: Limits) -> None:
        self.source = source
        self.limits = limits
        self.problems = Problems(source)
        self.origins: dict[JsonPath, Origin] = {}
        self.layers = 0
        self.values = 0
        self._sizes: dict[int, tuple[int, bool, Any]] = {}  # with the value, so that its id stays its own
        self.vars = self._variables(source.data.get("vars", {}))

    def value(self, raw: Any, at: JsonPath, out: JsonPath, scope: _Scope) -> Any:
        """``raw`` with its macros expanded; the same object if it has none."""
        size, plain = self._measure(raw)
        if isinstance(raw, list) and out[-1] in LISTS:
            layers: list[Any] = []
            for i, child in enumerate(raw):
                self._layer(child, (*at, i), out, scope, layers)
            return layers
        if plain:
            self._count(size, at)
            return raw
        if isinstance(raw, list):
            return [self.value(child, (*at, i), (*out, i), scope) for i, child in enumerate(raw)]
        if _refers(raw):
            self.origins[out] = Origin(at, scope.iterations, substituted=True, varies="$item" in raw)
            value = self._lookup(raw, at, scope)
            self._count(_REFERENCE + self._measure(value)[0], at)
            return value
        self._count(_own_size(raw), at)
        return {key: self.value(child, (*at, key), (*out, key), scope) for key, child in raw.items()}

    def on_stem(self, stem: Any, layers: Any) -> Any:
        """The layers of the document, behind the joint that the stem stands for."""
        if not isinstance(stem, dict) or stem.get("type") != "stack":
            expected = 'a stem is a net made of parts, {"type": "stack", "parts": [...]}'
            self.problems.note(("stem",), f"{expected}, got {shortened(stem)}")
            return []
        for key, message, at in key_faults(stem, ("parts",), "a stem"):
            self.problems.note(("stem", key), message, at)
        found: list[Any] = []
        self._layer({**stem, "type": "joint"}, ("stem",), ("layers",), _Scope(), found)
        referred = _refers(layers)
        listed = self._lookup(layers, ("layers",), _Scope()) if referred else layers
        if not isinstance(listed, list):
            return listed
        for i, child in enumerate(listed):
            self._layer(child, ("layers",) if referred else ("layers", i), ("layers",), _Scope(), found)
        return found

    def _layer(self, raw: Any, at: JsonPath, out: JsonPath, scope: _Scope, layers: list[Any]) -> None:
        """Appends the layers, or the parts, of one entry of a list of such, which may be a repeat."""
        if _repeats(raw):
            self._repeat(raw, at, out, scope, layers)
            return
        self.layers += 1
        if self.layers > self.limits.layers:
            message = f"more layers than the limit of {self.limits.layers} once every repeat is expanded"
            self.problems.note(at, message, last=True)
        path = (*out, len(layers))
        self.origins[path] = Origin(at, scope.iterations)
        layers.append(self.value(raw, at, path, scope))

    def _repeat(self, raw: Object, at: JsonPath, out: JsonPath, scope: _Scope, layers: list[Any]) -> None:
        before = self.problems.noted
        kind = str(out[-1])
        for key, message, side in key_faults(raw, {*REPEAT_KEYS, kind}, "repeat"):
            self.problems.note((*at, key), message, side)
        times, iteration = self._resolve(raw.get("times"), (*at, "times"), scope)
        if "times" not in raw:
            self.problems.note(at, "repeat needs 'times'")
        elif type(times) is int and times > self.limits.layers:
            message = f"repeat {times} times makes more layers than the limit of {self.limits.layers}{iteration}"
            self.problems.note((*at, "times"), message)
        elif times is not _UNKNOWN and (type(times) is not int or times < 1):
            message = f"repeat expects a whole number of times, 1 or more, got {shortened(times)}{iteration}"
            self.problems.note((*at, "times"), message)
        body = raw.get(kind)
        if not isinstance(body, list) or not body:
            place = (*at, kind) if kind in raw else at
            self.problems.note(place, f"repeat needs {kind!r}, a list of at least one {kind[:-1]}")
        columns = self._columns(raw, at, scope, times, iteration)
        if self.problems.noted > before:
            return
        for number in range(times):
            items = {**scope.items, **{name: column[number] for name, column in columns.items()}}
            self._count(1 + len(items), at)  # an iteration counts, even if it makes no layer
            inner = _Scope(items, (*scope.iterations, (number + 1, times)))
            for i, child in enumerate(body or []):
                self._layer(child, (*at, kind, i), out, inner, layers)

    def _columns(self, raw: Object, at: JsonPath, scope: _Scope, times: Any, iteration: str) -> dict[str, list[Any]]:
        """The lists of a repeat's ``with``, each with one item per iteration."""
        given = raw.get("with", {})
        if not isinstance(given, dict):
            self.problems.note((*at, "with"), f"with expects an object of lists, got {shortened(given)}")
            return {}
        self._count(len(given), (*at, "with"))
        columns = {}
        for name, raw_column in given.items():
            place = (*at, "with", name)
            column, own_iteration = self._resolve(raw_column, place, scope)
            came = own_iteration or iteration
            if column is _UNKNOWN:
                continue
            if not isinstance(column, list):
                message = f"with expects a list, one item per iteration, got {shortened(column)}{came}"
                self.problems.note(place, message)
            elif isinstance(times, int) and len(column) != times:
                expected = f"a list of {counted(times, 'item')}, one per iteration"
                self.problems.note(place, f"with expects {expected}, got {len(column)}{came}")
            elif self._measure(column)[1]:
                columns[name] = column
            else:
                columns[name] = [self._item(item, (*place, i), scope) for i, item in enumerate(column)]
                self._count(self._measure(columns[name])[0], place)
                if deeper(columns[name], self.limits.depth) is not None:
                    self.problems.note(place, f"the items are nested deeper than the limit of {self.limits.depth}")
        return columns

    def _item(self, raw: Any, at: JsonPath, scope: _Scope) -> Any:
        """An item of a repeat's ``with``: a constant, after its references are replaced."""
        if self._measure(raw)[1]:
            return raw
        if _repeats(raw):
            self.problems.note(at, "an item of with cannot hold a repeat; put the repeat where the item is used")
            return _UNKNOWN
        if _refers(raw):
            return self._lookup(raw, at, scope)
        self._count(_own_size(raw) + len(raw), at)
        if isinstance(raw, list):
            return [self._item(child, (*at, i), scope) for i, child in enumerate(raw)]
        return {key: self._item(child, (*at, key), scope) for key, child in raw.items()}

    def _resolve(self, raw: Any, at: JsonPath, scope: _Scope) -> tuple[Any, str]:
        """A value of the repeat itself, which may be a reference; and the iteration that decides it, for messages."""
        if not _refers(raw):
            return raw, ""
        return self._lookup(raw, at, scope), Origin((), scope.iterations).iteration if "$item" in raw else ""

    def _lookup(self, raw: Object, at: JsonPath, scope: _Scope) -> Any:
        key = "$var" if "$var" in raw else "$item"
        known, where = (self.vars, "vars") if key == "$var" else (scope.items, "the with of an enclosing repeat")
        name = raw[key]
        if len(raw) > 1:
            self.problems.note(at, f"{key} must be the only key of its object, got {shortened(raw)}")
        elif not isinstance(name, str) or name not in known:
            hint = did_you_mean(str(name), known)
            self.problems.note(at, f"{key} names {shortened(name)}, which is not in {where}{hint}")
        else:
            return known[name]
        return _UNKNOWN

    def _variables(self, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            self.problems.note(("vars",), f"vars expects an object, got {shortened(given)}")
            return {}
        for name, value in given.items():
            if not self._measure(value)[1]:
                self.problems.note(("vars", name), "a variable must be a constant, without repeat or reference")
        return given

    def _measure(self, raw: Any) -> tuple[int, bool]:
        """The number of JSON values in ``raw``, long strings counted as several; and whether it has no macros."""
        if isinstance(raw, str):
            return 1 + len(raw) // _STRING_PER_VALUE, True
        if not isinstance(raw, dict | list):
            return 1, True
        known = self._sizes.get(id(raw))
        if known is None:
            plain = not _repeats(raw) and not _refers(raw)
            size = _own_size(raw)
            for child in raw.values() if isinstance(raw, dict) else raw:
                inner, inner_plain = self._measure(child)
                size += inner
                plain = plain and inner_plain
            known = self._sizes[id(raw)] = size, plain, raw
        return known[:2]

    def _count(self, size: int, at: JsonPath) -> None:
        self.values += size
        if self.values > self.limits.values:
            message = f"more than the limit of {self.limits.values} values once everything is expanded"
            self.problems.note(at, message, last=True)
