"""The macros of the spec language: `repeat`, `$item` and `$var`, expanded into plain JSON.

Expansion is pure: raw JSON in, raw JSON out, with a map from every place of the result to where it was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..fields import counted, quoted, shortened
from ..registry import did_you_mean
from .limits import Limits
from .text import JsonPath, Problem, Problems, Source, deeper

REPEAT_KEYS = frozenset({"type", "times", "layers", "with", "note"})
_REFERENCES = ("$var", "$item")
_STRING_PER_VALUE = 16
_UNKNOWN = object()
"""What a reference to nothing stands for: the fault is noted, and nobody looks at the value."""


@dataclass(frozen=True)
class Origin:
    """Where a value of the expanded document was written.

    Attributes:
        path: its path in the source document.
        iterations: for each repeat around it, outermost first, which iteration made it: ``(number, times)``.
        substituted: whether a reference stands at ``path``, so that nothing below it has a place of its own.
        varies: whether that reference is to an item, which differs from one iteration to the next.
    """

    path: JsonPath
    iterations: tuple[tuple[int, int], ...] = ()
    substituted: bool = False
    varies: bool = False

    @property
    def iteration(self) -> str:
        """`` (iteration 2 of 4)``, or nothing outside of every repeat."""
        if not self.iterations:
            return ""
        return f" (iteration {', '.join(f'{number} of {times}' for number, times in self.iterations)})"


class Expanded:
    """A document without macros, and where each part of it came from."""

    def __init__(self, source: Source, data: dict[str, Any], origins: Mapping[JsonPath, Origin]) -> None:
        self.source = source
        self.data = data
        self._origins = origins

    def origin(self, path: JsonPath) -> Origin:
        """Where the value at a path of the expanded document was written."""
        for cut in range(len(path), -1, -1):
            origin = self._origins.get(path[:cut])
            if origin is not None:
                rest = () if origin.substituted else path[cut:]
                return replace(origin, path=(*origin.path, *rest))
        return Origin(path)


def expand(source: Source, limits: Limits) -> Expanded:
    """The document with every `repeat` flattened into the list it stands in and every reference replaced.

    Raises:
        SpecError: malformed repeats, unknown names, or more layers or values than the limits allow.
    """
    expander = _Expander(source, limits)
    data = {key: expander.value(raw, (key,), (key,), _Scope()) for key, raw in source.data.items() if key != "vars"}
    if expander.problems.noted:
        raise expander.problems.error()
    return Expanded(source, data, expander.origins)


@dataclass(frozen=True)
class _Scope:
    items: Mapping[str, Any] = field(default_factory=dict)
    iterations: tuple[tuple[int, int], ...] = ()


def _own_size(raw: dict[str, Any] | list[Any]) -> int:
    """How many values an object or a list counts as besides what it holds: itself and its long keys."""
    return 1 + (sum(len(key) // _STRING_PER_VALUE for key in raw) if isinstance(raw, dict) else 0)


def _refers(raw: dict[str, Any]) -> bool:
    return "$var" in raw or "$item" in raw


def _iteration(raw: Any, scope: _Scope) -> str:
    """Which iteration it is, for a fault in a value that a reference takes from it."""
    return Origin((), scope.iterations).iteration if isinstance(raw, dict) and "$item" in raw else ""


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
        """``raw`` with its macros expanded; the same object where it has none."""
        size, plain = self._measure(raw)
        if plain and not (isinstance(raw, list) and out[-1] == "layers"):
            self._count(size, at)
            return raw
        if isinstance(raw, list):
            if out[-1] != "layers":
                return [self.value(child, (*at, i), (*out, i), scope) for i, child in enumerate(raw)]
            layers: list[Any] = []
            for i, child in enumerate(raw):
                self._layer(child, (*at, i), out, scope, layers)
            return layers
        if _refers(raw):
            return self._substitute(raw, at, out, scope)
        self._count(_own_size(raw), at)
        return {key: self.value(child, (*at, key), (*out, key), scope) for key, child in raw.items()}

    def _layer(self, raw: Any, at: JsonPath, out: JsonPath, scope: _Scope, layers: list[Any]) -> None:
        """Appends what one entry of a list of layers stands for."""
        if isinstance(raw, dict) and raw.get("type") == "repeat":
            self._repeat(raw, at, out, scope, layers)
            return
        self.layers += 1
        if self.layers > self.limits.layers:
            self._stop(Problem(at, f"more layers than the limit of {self.limits.layers} once every repeat is expanded"))
        path = (*out, len(layers))
        self.origins[path] = Origin(at, scope.iterations)
        layers.append(self.value(raw, at, path, scope))

    def _repeat(self, raw: dict[str, Any], at: JsonPath, out: JsonPath, scope: _Scope, layers: list[Any]) -> None:
        before = self.problems.noted
        for key in raw:
            if key not in REPEAT_KEYS:
                message = f"unknown key {quoted(key)} of repeat{did_you_mean(key, set(REPEAT_KEYS))}"
                self.problems.note(Problem((*at, key), message, "key"))
        if not isinstance(raw.get("note", ""), str):
            self.problems.note(Problem((*at, "note"), f"a note is a string, got {shortened(raw['note'])}"))
        times = self._resolve(raw.get("times"), (*at, "times"), scope)
        iteration = _iteration(raw.get("times"), scope)
        if "times" not in raw:
            self.problems.note(Problem(at, "repeat needs 'times'"))
        elif times is _UNKNOWN:
            pass  # noted where it was looked up
        elif not isinstance(times, int) or isinstance(times, bool) or times < 1:
            message = f"repeat expects a whole number of times, 1 or more, got {shortened(times)}{iteration}"
            self.problems.note(Problem((*at, "times"), message))
        elif times > self.limits.layers:
            message = f"repeat {times} times makes more layers than the limit of {self.limits.layers}{iteration}"
            self.problems.note(Problem((*at, "times"), message))
        body = raw.get("layers")
        if not isinstance(body, list) or not body:
            place = (*at, "layers") if "layers" in raw else at
            self.problems.note(Problem(place, "repeat needs 'layers', a list of at least one layer"))
        columns = self._columns(raw, at, scope, times)
        if self.problems.noted > before:
            return
        for number in range(times):
            items = {**scope.items, **{name: column[number] for name, column in columns.items()}}
            self._count(len(items), at)
            inner = _Scope(items, (*scope.iterations, (number + 1, times)))
            for i, child in enumerate(body or []):
                self._layer(child, (*at, "layers", i), out, inner, layers)

    def _columns(self, raw: dict[str, Any], at: JsonPath, scope: _Scope, times: Any) -> dict[str, list[Any]]:
        """The lists of a repeat's ``with``, each as long as there are iterations."""
        given = raw.get("with", {})
        at = (*at, "with")
        if not isinstance(given, dict):
            self.problems.note(Problem(at, f"with expects an object of lists, got {shortened(given)}"))
            return {}
        self._count(len(given), at)
        columns = {}
        for name, raw_column in given.items():
            column = self._resolve(raw_column, (*at, name), scope)
            iteration = _iteration(raw_column, scope) or _iteration(raw.get("times"), scope)
            if column is _UNKNOWN:
                pass
            elif not isinstance(column, list):
                message = f"with expects a list, one item per iteration, got {shortened(column)}{iteration}"
                self.problems.note(Problem((*at, name), message))
            elif isinstance(times, int) and len(column) != times:
                expected = f"a list of {counted(times, 'item')}, one per iteration"
                message = f"with expects {expected}, got {len(column)}{iteration}"
                self.problems.note(Problem((*at, name), message))
            else:
                columns[name] = [self._item(item, (*at, name, i), scope) for i, item in enumerate(column)]
                if deeper(columns[name], self.limits.depth) is not None:
                    message = f"the items nest deeper than the limit of {self.limits.depth}"
                    self.problems.note(Problem((*at, name), message))
        return columns

    def _item(self, raw: Any, at: JsonPath, scope: _Scope) -> Any:
        """An item of a repeat's ``with``: a constant, once its references are replaced."""
        if self._measure(raw)[1]:
            return raw
        if isinstance(raw, list):
            self._count(1 + len(raw), at)
            return [self._item(child, (*at, i), scope) for i, child in enumerate(raw)]
        if raw.get("type") == "repeat":
            self.problems.note(Problem(at, "an item of with holds no repeat; put it where the item is used"))
            return _UNKNOWN
        if _refers(raw):
            return self._lookup(raw, at, scope)
        self._count(_own_size(raw) + len(raw), at)
        return {key: self._item(child, (*at, key), scope) for key, child in raw.items()}

    def _resolve(self, raw: Any, at: JsonPath, scope: _Scope) -> Any:
        """A value of the repeat itself, which may be a reference."""
        if isinstance(raw, dict) and _refers(raw):
            return self._lookup(raw, at, scope)
        return raw

    def _substitute(self, raw: dict[str, Any], at: JsonPath, out: JsonPath, scope: _Scope) -> Any:
        self.origins[out] = Origin(at, scope.iterations, substituted=True, varies="$item" in raw)
        value = self._lookup(raw, at, scope)
        self._count(self._measure(value)[0], at)
        return value

    def _lookup(self, raw: dict[str, Any], at: JsonPath, scope: _Scope) -> Any:
        key = next(key for key in _REFERENCES if key in raw)
        name = raw[key]
        known = self.vars if key == "$var" else scope.items
        if len(raw) > 1:
            self.problems.note(Problem(at, f"{key} stands alone in its object, got {shortened(raw)}"))
        elif not isinstance(name, str) or name not in known:
            where = "in vars" if key == "$var" else "in the with of a repeat around it"
            hint = did_you_mean(str(name), set(known))
            self.problems.note(Problem(at, f"{key} names {shortened(name)}, which is not {where}{hint}"))
        else:
            return known[name]
        return _UNKNOWN

    def _variables(self, given: Any) -> dict[str, Any]:
        if not isinstance(given, dict):
            self.problems.note(Problem(("vars",), f"vars expects an object, got {shortened(given)}"))
            return {}
        for name, value in given.items():
            if not self._measure(value)[1]:
                self.problems.note(Problem(("vars", name), "a variable is a constant, without repeat or reference"))
        return given

    def _measure(self, raw: Any) -> tuple[int, bool]:
        """How many JSON values ``raw`` holds, long strings counted as several, and whether it is free of macros."""
        if isinstance(raw, str):
            return 1 + len(raw) // _STRING_PER_VALUE, True
        if not isinstance(raw, dict | list):
            return 1, True
        known = self._sizes.get(id(raw))
        if known is None:
            plain = not isinstance(raw, dict) or (raw.get("type") != "repeat" and not _refers(raw))
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
            self._stop(Problem(at, f"more than the limit of {self.limits.values} values once everything is expanded"))

    def _stop(self, problem: Problem) -> None:
        self.problems.note(problem)
        raise self.problems.error()
