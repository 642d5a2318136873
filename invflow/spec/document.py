"""A validated spec: the source document, its expansion, and the class and fields of each layer."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, Union

from pydantic import BaseModel, ValidationError

from ..context import ContextShape, Names, named
from ..errors import SpecError
from ..fields import LISTS, counted, describe, quoted, shortened
from ..numerics.modes import FLOAT
from ..registry import MACROS, REGISTRY_OF, Registry, UnknownTag, bijections, did_you_mean, heads, nets, priors
from ..registry import data as data_sets
from ..state import Shape
from . import shapes
from .expand import TOP_MACROS, Expanded, expand, key_faults
from .limits import DEFAULT_LIMITS, Limits
from .nodes import ContextNode, Node, TopLevel
from .text import JsonPath, Place, Problem, Problems, Source, read_source
from .training import Data
from .versions import SPEC_VERSION, in_version_1, migrate, version_of

SpecSource: TypeAlias = Union[str, Path, dict[str, Any], "Spec"]


@dataclass(eq=False, repr=False)
class Spec:
    """A spec that was read, expanded and validated; its shapes are checked when it is built.

    Attributes:
        top: the top level, validated.
        layers: the layers of the expanded document.
        head: the head's document, None if there is none.
        prior: the prior's document, None if there is none.
        dequantization: the document of the layer that draws the noise of pixels, None for uniform noise.
        context_nets: the documents of the nets that turn the context into what the layers see, by the entries that they
            make: see `invflow.context.named`.
        document: the source document, as JSON data.
        expanded: the same without `repeat` and references.
        input_shape: the shape of the input, without the batch.
        context_shape: the shape of the context, None if there is none.
        training: how to train, None if the spec does not say.
        name: a name for people.

    Examples:
        >>> import invflow
        >>> spec = invflow.load_spec({"input": {"shape": [2]}, "layers": [{"type": "repeat", "times": 3, "layers": [
        ...     {"type": "affine"}
        ... ]}]})
        >>> len(spec.layers), spec.hash[:8] == spec.replace(name="named").hash[:8]
        (3, True)
    """

    _expanded: Expanded
    _version_1: Source | None
    top: TopLevel
    layers: tuple[Node, ...]
    head: Node | None = None
    prior: Node | None = None
    dequantization: Node | None = None
    context_nets: Mapping[str, ContextNode] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.document: dict[str, Any] = self._expanded.source.data
        self.expanded = self._expanded.data
        self.input_shape: Shape = self.top.input.shape  # type: ignore[assignment]
        self.context_shape: ContextShape = self.top.input.context_shape
        self.training = self.top.training
        self.name = self.top.name

    def __repr__(self) -> str:
        name = f"{self.name!r}, " if self.name else ""
        top = next((f", {name} {node.tag}" for name, node in (("head", self.head), ("prior", self.prior)) if node), "")
        return f"Spec({name}input {self.input_shape}, {counted(len(self.layers), 'layer')}{top})"

    @property
    def folder(self) -> Path | None:
        """The folder of the file that the spec was read from; None if it was no file."""
        name = self._expanded.source.name
        return None if name is None else Path(name).parent

    def canonical(self) -> dict[str, Any]:
        """What decides the function of the spec: input, layers, head and prior, without defaults, names and notes."""
        found: dict[str, Any] = {"input": {"shape": self.input_shape}}
        if self.context_shape is not None:
            found["input"]["context_shape"] = self.context_shape
        found["layers"] = [node.canonical() for node in self.layers]
        if self.context_nets:
            found["context_net"] = named({name: node.canonical() for name, node in self.context_nets.items()})
        above = {"head": self.head, "prior": self.prior, "dequantization": self.dequantization}
        found.update((name, node.canonical()) for name, node in above.items() if node is not None)
        if self.top.numerics != FLOAT:
            found["numerics"] = self.top.numerics.model_dump(mode="json", exclude_defaults=True)
        return found

    @functools.cached_property
    def hash(self) -> str:
        """The spec's identity: sha256 over what decides the function, without defaults."""
        return _digest(self.canonical())

    @functools.cached_property
    def declared_hash(self) -> str:
        """The identity by the rules of the version that the document declares, which its checkpoint was saved with."""
        if self._version_1 is None:
            return self.hash
        return _digest(in_version_1(self.canonical(), expand(self._version_1, DEFAULT_LIMITS).data))

    def replace(self, **top_level: Any) -> Spec:
        """The same spec with other top-level entries; None drops one. Errors still point into the spec's text."""
        document = {key: value for key, value in {**self.document, **top_level}.items() if value is not None}
        return _checked(Source(document, self._expanded.source.name, self._expanded.source.text), DEFAULT_LIMITS)

    def error(self, path: JsonPath, message: object) -> SpecError:
        """The error for a path of the expanded document, located where that part was written."""
        origin = self._expanded.origin(path)
        return self._expanded.source.error([Problem(origin.path, f"{message}{origin.iteration}")])


def load_spec(source: SpecSource, *, limits: Limits = DEFAULT_LIMITS) -> Spec:
    """Reads, expands and validates a spec from a file's path or a dict.

    Raises:
        SpecError: every fault of the first stage that finds any, each with its place.

    Examples:
        >>> load_spec({"input": {"shape": [2]}, "layers": [{"type": "affine"}]})
        Spec(input (2,), 1 layer)
        >>> load_spec({"input": {"shape": [2]}, "layers": [{"type": "afine"}]})
        Traceback (most recent call last):
        ...
        invflow.errors.SpecError: layers.0: unknown layer type 'afine'; did you mean 'affine'?
    """
    return source if isinstance(source, Spec) else _checked(read_source(source, limits), limits)


def _checked(source: Source, limits: Limits) -> Spec:
    """The spec of a document; one that declares no version is read as the newest, or as the first if only that fits."""
    if "spec_version" in source.data:
        return _Validator(expand(migrate(source), limits), source if version_of(source) == 1 else None).spec()
    try:
        return _Validator(expand(source, limits)).spec()
    except SpecError as error:
        old = migrate(source)
        if old.data == {**source.data, "spec_version": SPEC_VERSION}:
            raise
        try:
            return _Validator(expand(old, limits), source).spec()
        except SpecError:
            raise error from None


def _digest(canonical: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class _Validator:
    def __init__(self, expanded: Expanded, version_1: Source | None = None) -> None:
        self.expanded = expanded
        self.version_1 = version_1  # the document before its migration, if it is of version 1
        self.problems = Problems(expanded.source)
        self._valid: dict[tuple[str, str], Node] = {}
        self._faulty: set[tuple[str, str, JsonPath]] = set()  # noted already, in another iteration

    def spec(self) -> Spec:
        data = self.expanded.data
        top: TopLevel | None = None
        try:
            top = TopLevel.model_validate_json(json.dumps(_without_layers(data)))
        except ValidationError as error:
            self._add(error, (), data, TopLevel, "a spec")
        self._data_set(data)
        layers = self._nodes(data["layers"], ("layers",), bijections) if isinstance(data.get("layers"), list) else ()
        above = {
            name: self._node(data[name], (name,), registry)
            for name, registry in (("head", heads), ("prior", priors), ("dequantization", bijections))
            if data.get(name) is not None
        }
        if data.get("dequantization") is not None and data.get("prior") is None:
            self._problem(("dequantization",), "dequantization belongs to a density: the spec needs a prior", "key")
        context_nets = {} if data.get("context_net") is None else self._context_nets(data["context_net"], above)
        if self.problems.noted or top is None:
            raise self.problems.error()
        return Spec(self.expanded, self.version_1, top, layers, **above, context_nets=context_nets)

    def _context_nets(self, raw: Any, above: Mapping[str, Any]) -> dict[str, ContextNode]:
        """The nets of a context, by the entries that they make."""
        place: JsonPath = ("context_net",)
        if not above.keys() & {"head", "prior"}:
            self._problem(place, "a context_net belongs to a model: the spec needs a head or a prior", "key")
        if not (isinstance(raw, dict) and raw and isinstance(raw.get("type", {}), dict)):
            single = self._context_net(raw, place)
            return {} if single is None else {"": single}
        found = {name: self._context_net(document, (*place, name)) for name, document in raw.items()}
        for name in raw:
            if not shapes.is_entry(name):
                self._problem((*place, name), "the name of a context consists of letters, digits and _", "key")
        return {name: found[name] for name in sorted(found) if found[name] is not None}  # type: ignore[misc]

    def _context_net(self, raw: Any, path: JsonPath) -> ContextNode | None:
        out_shape: Any = raw.get("out_shape") if isinstance(raw, dict) else None
        node = self._node(
            {k: v for k, v in raw.items() if k != "out_shape"} if out_shape is not None else raw, path, nets
        )
        try:
            return None if node is None else ContextNode(node, shapes.tensor_shape(out_shape))
        except ValueError:
            expected = "a context_net needs its out_shape, a list of positive whole numbers"
            self._problem(
                (*path, "out_shape") if out_shape is not None else path, f"{expected}, got {shortened(out_shape)}"
            )
            return None

    def _data_set(self, data: dict[str, Any]) -> None:
        """Notes the faults of a data set in the fields that its source has of its own."""
        training = data.get("training")
        named = training.get("data") if isinstance(training, dict) else None
        if isinstance(named, dict) and isinstance(named.get("name", ""), str):
            self._node({"name": Data().name, **named}, ("training", "data"), data_sets)

    def _nodes(self, raw: list[Any], path: JsonPath, registry: Registry[Any]) -> tuple[Node, ...]:
        nodes = [self._node(child, (*path, i), registry) for i, child in enumerate(raw)]
        return tuple(node for node in nodes if node is not None)

    def _node(self, raw: Any, path: JsonPath, registry: Registry[Any]) -> Node | None:
        """The node of one document; None if it has problems, which are noted."""
        key = (registry.noun, json.dumps(raw))
        if key in self._valid:
            return self._valid[key]
        faulty = (*key, self.expanded.origin(path).path)
        if faulty in self._faulty:
            self.problems.noted += 1
            return None
        before = self.problems.noted
        try:
            tag = _tag(raw, registry)
            node = self._fields(raw, path, registry, registry.find(tag), tag)
        except UnknownTag as error:
            self._problem(path, str(error))
        if self.problems.noted > before:
            self._faulty.add(faulty)
            return None
        self._valid[key] = node
        return node

    def _fields(self, raw: dict[str, Any], path: JsonPath, registry: Registry[Any], cls: Any, tag: str) -> Node:
        field_set = registry.fields(cls)
        known = {**field_set.fields, **(Data.model_fields if registry is data_sets else {})}
        sees: Names = ...
        if registry in (bijections, nets, priors):
            known["context"] = None
            sees = self._sees(raw, path)
        for key, message, at in key_faults(raw, known, tag, registry.key):
            self._problem((*path, key), message, at)
        values = {}
        try:
            values = field_set.validate({name: raw[name] for name in field_set.plain if name in raw})
        except ValidationError as error:
            self._add(error, path, raw, field_set.values, tag)
        children = {}
        for name, field in field_set.fields.items():
            if field.kind == "value" or (raw.get(name) is None and field.default is None):
                continue
            place, inside = (*path, name), REGISTRY_OF[field.kind]
            child: Node | tuple[Node, ...] | None = None
            if name not in raw:
                if field.required:
                    self._problem(path, f"{tag} needs {name!r}")
            elif field.kind not in LISTS:
                child = self._node(raw[name], place, inside)
            elif isinstance(raw[name], list):
                child = self._nodes(raw[name], place, inside)
            else:
                self._problem(place, f"expected a list of {field.kind}, got {shortened(raw[name])}")
            if child is not None:
                children[name] = child
        return Node(registry, cls, tag, values, children, sees)

    def _sees(self, raw: dict[str, Any], path: JsonPath) -> Names:
        """What of the context a document asks for."""
        names = raw.get("context", ...)
        if names is ... or names is None or isinstance(names, str):
            return names
        strings = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        if strings and len(set(names)) == len(names):
            return tuple(sorted(names))
        expected = "context: expected the name of an entry of the context, a list of different ones, or null for none"
        self._problem((*path, "context"), f"{expected}, got {shortened(names)}")
        return ...

    def _problem(self, path: JsonPath, message: str, at: Place = "value") -> None:
        """Notes a fault at a path of the expanded document."""
        origin = self.expanded.origin(path)
        iteration = origin.iteration if origin.varies else ""
        self.problems.note(origin.path, message + iteration, "value" if origin.substituted else at)

    def _add(self, error: ValidationError, path: JsonPath, raw: Any, model: type[BaseModel], who: str) -> None:
        """Notes the faults that pydantic found in ``raw``, the value at ``path``."""
        details = error.errors(include_url=False)
        absent = {detail["loc"] for detail in details if detail["type"] == "missing"}
        for detail in details:
            key = detail["loc"][-1]
            place = (*path, *_path_in(raw, detail["loc"]))
            owner = who if len(detail["loc"]) == 1 else str(detail["loc"][-2])
            context = detail.get("ctx", {})
            if detail["type"] == "extra_forbidden":
                hint = did_you_mean(str(key), _known_keys(model, detail["loc"]))
                self._problem(place, f"unknown key {quoted(key)} of {owner}{hint}", "key")
            elif detail["type"] == "missing" and isinstance(key, int):
                if (*detail["loc"][:-1], key + 1) not in absent:  # the last missing item of a tuple tells its length
                    self._problem(place, f"expected {counted(key + 1, 'item')}, got {shortened(detail['input'])}")
            elif detail["type"] == "default_factory_not_called":
                continue  # a field from which the default follows has a fault of its own
            elif detail["type"] == "missing":
                self._problem(place, f"{owner} needs {key!r}")
            elif detail["type"] == "union_tag_not_found":
                self._problem(place, f"{key} needs {context['discriminator']}")
            elif detail["type"] == "union_tag_invalid":
                hint = did_you_mean(context["tag"], set(re.findall(r"'(\w+)'", context["expected_tags"])))
                what = context["discriminator"].strip("'")
                self._problem(place, f"unknown {key} {what} {quoted(context['tag'])}{hint}")
            else:
                self._problem(place, describe(detail))


def _tag(raw: Any, registry: Registry[Any]) -> str:
    """The tag of a document; raises UnknownTag if it has none, or that of a macro."""
    noun = registry.noun
    if not isinstance(raw, dict):
        raise UnknownTag(f"expected a {noun}, an object with a type, got {shortened(raw)}")
    tag = raw.get(registry.key)
    if not isinstance(tag, str):
        came = f"the {registry.key} {shortened(tag)}" if registry.key in raw else f"no {registry.key}"
        raise UnknownTag(f"expected a {noun} with a {registry.key}, a string, got {came}")
    if tag in MACROS:
        hint = ', such as that of a {"type": "sequential"}' if registry is bijections else ""
        raise UnknownTag(f"{tag} is not a {noun} itself: use it in a list of layers{hint}")
    return tag


def _without_layers(data: dict[str, Any]) -> dict[str, Any]:
    """What pydantic validates: not the layers, which are validated one by one, nor the values of unknown keys."""
    known = {field.alias or name for name, field in TopLevel.model_fields.items()}
    shown = {key: value if key in known else None for key, value in data.items()}
    return {**shown, "layers": []} if isinstance(data.get("layers"), list) else shown


def _path_in(raw: Any, location: tuple[int | str, ...]) -> JsonPath:
    """A pydantic location as a path in ``raw``, without the names of union members."""
    path: list[int | str] = []
    for step in location:
        if (isinstance(raw, dict) and step in raw) or (isinstance(raw, list) and step in range(len(raw))):
            raw = raw[step]  # type: ignore[index]
            path.append(step)
    return tuple(path)


_json_schema = functools.lru_cache(operator.methodcaller("model_json_schema"))


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    """The keys that are allowed in the object at a location."""
    schema = _json_schema(model)
    definitions = schema.get("$defs", {})

    def walk(node: dict[str, Any], steps: tuple[int | str, ...]) -> set[str]:
        if "$ref" in node:
            return walk(definitions[node["$ref"].rsplit("/", 1)[-1]], steps)
        if "discriminator" in node:  # the chosen tag is part of the location
            return walk({"$ref": node["discriminator"]["mapping"][steps[0]]}, steps[1:])
        if "anyOf" in node:
            return set().union(*(walk(option, steps) for option in node["anyOf"]))
        properties = node.get("properties", {})
        if len(steps) <= 1:
            return set(properties) | (set(TOP_MACROS) if node is schema else set())
        return walk(properties.get(str(steps[0]), {}), steps[1:])

    return walk(schema, location)
