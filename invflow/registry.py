"""Tags and the classes that they name.

Six registries, because their promises differ: bijections (invertible, all property-tested), nets (conditioners, any
function) and the parts of nets, heads and priors (which complete a chain to a model), and data (what is learned from).
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import json
import re
import types
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from pydantic.errors import PydanticInvalidForJsonSchema
from torch import nn

from .bijection import Bijection
from .errors import InvflowError
from .fields import FieldSet, Kind, checked_constructor, quoted
from .part import Part
from .source import Source

M = TypeVar("M")
C = TypeVar("C", bound=type)

_TAG = re.compile(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*")
MACROS = ("repeat",)
"""Tags that the spec language reserves."""
_MOST_HINTS = 1000
_MOST_SHOWN = 60
_LONGEST_WORD = 100


class UnknownTag(InvflowError):
    """No class is registered under a tag, or its plug-in is broken."""


class Registry(Generic[M]):
    """Tag -> class, for one kind of thing a spec can name.

    Args:
        noun: the name of the classes in messages.
        base: the class that they must subclass.
        group: the entry-point group in which packages advertise their classes; loaded only for an unknown tag.
        key: the key of a document that holds the tag.
    """

    def __init__(self, noun: str, base: type[M], group: str, key: str = "type") -> None:
        self.noun = noun
        self.base = base
        self.group = group
        self.key = key
        self._classes: dict[str, type[M]] = {}
        self._fields: dict[type, FieldSet] = {}

    def register(self, tag: str) -> Callable[[C], C]:
        """A class decorator that makes ``{"type": tag}`` stand for the class in a spec.

        Registering the same class again (same module and name) replaces it.

        Raises:
            ValueError: a malformed tag, or one that another class holds.
            TypeError: not a subclass of the registry's base, or a constructor whose parameters are not annotated.
        """
        if not _TAG.fullmatch(tag) or tag in MACROS:
            raise ValueError(f"{tag!r} cannot be a {self.noun}'s tag: use lower-case names and dots: 'acme.scale'")

        def decorate(cls: C) -> C:
            if not (isinstance(cls, type) and issubclass(cls, self.base)):
                raise TypeError(f"{cls!r} cannot be registered as a {self.noun}: it is not a {self.base.__name__}")
            if inspect.isabstract(cls):
                missing = ", ".join(sorted(vars(cls)["__abstractmethods__"]))
                raise TypeError(f"{_name(cls)} cannot be registered: it does not override {missing}")
            held = self._classes.get(tag)
            if held is not None and _name(held) != _name(cls):
                raise ValueError(f"the {self.noun} tag {tag!r} is held by {_name(held)}; rename that of {_name(cls)}")
            if cls in self._fields:
                raise ValueError(f"{_name(cls)} is registered as {self.tag_of(cls)!r} already")
            fields = FieldSet(cls)
            try:  # refuses a type that no document can hold, before it breaks the schema
                if not _ships(cls):
                    json.dumps(fields.values.model_json_schema(), allow_nan=False)
            except (PydanticInvalidForJsonSchema, ValueError) as error:
                raise TypeError(f"{_name(cls)} cannot be registered: a field has no JSON schema: {error}") from None
            others = [name for name, field in fields.fields.items() if field.kind not in ("value", "parts")]
            if others and self.noun != "layer":
                raise TypeError(f"{_name(cls)}: a {self.noun} has no layers or nets of its own, as {others[0]!r} is")
            cls.__init__ = checked_constructor(cls, fields)  # type: ignore[method-assign]
            if held is not None:
                del self._fields[held]
            self._classes[tag] = cls
            self._fields[cls] = fields
            if issubclass(cls, Bijection | Part | Source):
                cls.tag = tag
            return cls  # type: ignore[return-value]  # mypy narrows it to the base

        return decorate

    def registered(self) -> Mapping[str, type[M]]:
        """A read-only view, tag -> class, of the classes that are registered so far."""
        return types.MappingProxyType(self._classes)

    def find(self, tag: str) -> type[M]:
        """The class of a tag, loaded from a plug-in if necessary. Raises UnknownTag."""
        if tag not in self._classes:
            self._load_plug_in(tag)
        return self._classes[tag]

    def fields(self, cls: type) -> FieldSet:
        """The JSON fields of a registered class."""
        return self._fields[cls]

    def tag_of(self, cls: type) -> str | None:
        """The tag of a class; None for one that is not registered."""
        return next((tag for tag, known in self._classes.items() if known is cls), None)

    def name_of(self, cls: type) -> str:
        """The name of a class in messages: its tag, or the class's own name if it is not registered."""
        return self.tag_of(cls) or cls.__name__

    def called(self, tag: str) -> str:
        """What messages call the document of a tag."""
        return f"{self.noun} type {tag}" if self.key == "type" else f"{self.noun} {tag}"

    def load_plug_ins(self) -> list[UnknownTag]:
        """Loads all advertised plug-ins, and returns the errors of those that are broken."""
        broken = []
        for tag in sorted(entry_points(group=self.group).names):
            try:
                self.find(tag)
            except UnknownTag as error:
                broken.append(error)
        return broken

    def _load_plug_in(self, tag: str) -> None:
        advertised = entry_points(group=self.group)
        points = {point.dist.name if point.dist else "unknown": point for point in advertised.select(name=tag)}
        of_type = self.called(repr(tag))
        if len(points) > 1:
            owners = ", ".join(map(repr, sorted(points)))
            raise UnknownTag(f"{of_type} is advertised by several distributions: {owners}; uninstall all but one")
        for owner, point in points.items():
            try:
                loaded = point.load()
                if tag not in self._classes:
                    self.register(tag)(loaded)
            except (Exception, SystemExit) as error:
                plug_in = f"the plug-in {point.value!r} of the distribution {owner!r}"
                message = f"{of_type}: {plug_in} does not load: {type(error).__name__}: {error}"
                raise UnknownTag(message) from error
            return
        known = {*self._classes, *advertised.names}
        other = next((one.noun for one in REGISTRIES if tag in one.registered()), None)
        hint = did_you_mean(tag, known) if other is None else f": it is a {other}"
        raise UnknownTag(f"unknown {self.called(quoted(tag))}{hint}")


def did_you_mean(word: str, known: Collection[str]) -> str:
    """``; did you mean 'x'?``, or the first of the known words if none is similar.

    Examples:
        >>> did_you_mean("spilt", {"split", "merge"})
        "; did you mean 'split'?"
        >>> did_you_mean("zzz", {"split", "merge"})
        "; there is 'merge', 'split'"
    """
    few = sorted(itertools.islice(known, _MOST_HINTS))  # bounded, because documents may be untrusted
    close = difflib.get_close_matches(word[:_LONGEST_WORD], few, n=1)
    if close:
        return f"; did you mean {quoted(close[0])}?"
    shown = few[:_MOST_SHOWN]
    return f"; there is {', '.join(map(quoted, shown))}{', ...' if len(known) > len(shown) else ''}" if shown else ""


def _ships(cls: type) -> bool:
    """Whether a class belongs to this library: its tests make the schema, which takes long for all of them."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


bijections: Registry[Bijection] = Registry("layer", Bijection, "invflow.bijections")  # type: ignore[type-abstract]
nets: Registry[nn.Module] = Registry("net", nn.Module, "invflow.nets")
parts: Registry[Part] = Registry("part", Part, "invflow.parts")  # type: ignore[type-abstract]
heads: Registry[nn.Module] = Registry("head", nn.Module, "invflow.heads")
priors: Registry[nn.Module] = Registry("prior", nn.Module, "invflow.priors")
data: Registry[Source] = Registry("data set", Source, "invflow.data", key="name")  # type: ignore[type-abstract]

REGISTRIES: tuple[Registry[Any], ...] = (bijections, nets, parts, heads, priors, data)

REGISTRY_OF: Mapping[Kind, Registry[Any]] = {"layer": bijections, "layers": bijections, "net": nets, "parts": parts}
"""What the documents in a field of each kind are."""

register = bijections.register
register_net = nets.register
register_part = parts.register
register_head = heads.register
register_prior = priors.register
register_data = data.register
registered = bijections.registered
