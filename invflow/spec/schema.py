"""The spec language as JSON Schema (2020-12), from what is registered: for editors, and for validators elsewhere.

The schema is written so that VS Code's JSON language service completes, explains and marks well: which fields a
document may have follows from its ``type`` by ``if`` and ``then``, because a large ``oneOf`` only says that nothing
fits.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel

from ..fields import FieldSet, JsonField
from ..registry import REGISTRIES, Registry, bijections, heads, priors
from .document import MOST_DIMENSIONS, TopLevel

Schema: TypeAlias = dict[str, Any]

_NOTE = {"type": "string", "description": "a remark for people; it changes nothing"}
_DROPPED = ("title", "discriminator", "description", "default")


def json_schema(*, plug_ins: bool = False) -> Schema:
    """The JSON Schema of a spec with everything that is registered.

    Args:
        plug_ins: loads every installed plug-in first, not only those that some spec asked for; broken ones are left
            out.

    Examples:
        >>> sorted(json_schema()["$defs"]["layer.split"]["properties"])
        ['dim', 'note', 'sizes', 'type']
    """
    if plug_ins:
        for registry in REGISTRIES:
            registry.load_plug_ins()
    definitions: dict[str, Schema] = {
        "reference": _REFERENCE,
        "shape": _SHAPE,
        "repeat": _REPEAT,
        "layers": {"type": "array", "items": _ref("entry")},
        "entry": _tagged("layer", _members(bijections), {"repeat": ("repeat", str(_REPEAT["description"]))}),
    }
    for registry in REGISTRIES:
        if registry.registered():
            definitions[registry.noun] = _tagged(registry.noun, _members(registry))
        for tag, cls in sorted(registry.registered().items()):
            definitions[f"{registry.noun}.{tag}"] = _document(tag, cls, registry.fields(cls), definitions)
    top = _model(TopLevel, definitions)
    top["properties"].update(
        vars={"type": "object", "description": 'constants, referred to as {"$var": "name"}'},
        layers=_referable(_ref("layers"), top["properties"]["layers"]),
        **{name: _above(name, registry, top["properties"][name]) for name, registry in _ABOVE.items()},
    )
    definitions["Input"]["properties"]["shape"] = _referable(_ref("shape"), definitions["Input"]["properties"]["shape"])
    both: Schema = {name: {"type": "object"} for name in _ABOVE}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "invflow spec",
        **top,
        "description": "An invertible neural network: the layers in data order, and what stands on top of them.",
        "not": {"required": list(both), "properties": both},
        "$defs": definitions,
    }


_ABOVE: Mapping[str, Registry[Any]] = {"head": heads, "prior": priors}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


_REFERENCE: Schema = {
    "description": 'a constant of vars, {"$var": "name"}, or the item of a repeat around it, {"$item": "name"}',
    "type": "object",
    "properties": {
        "$var": {"type": "string", "description": "the name of a constant in the vars at the top"},
        "$item": {"type": "string", "description": "the name of a list in the with of a repeat around it"},
    },
    "minProperties": 1,
    "maxProperties": 1,
    "additionalProperties": False,
}
_EXTENT: Schema = {"type": "integer", "exclusiveMinimum": 0}
_SHAPE: Schema = {
    "type": "array",
    "minItems": 1,
    "anyOf": [
        {"items": {"anyOf": [_EXTENT, _ref("reference")]}, "maxItems": MOST_DIMENSIONS},
        {"items": {"anyOf": [_ref("shape"), _ref("reference")]}},
    ],
}
_REPEAT: Schema = {
    "description": "The layers, several times over, written out into the list that this stands in.",
    "type": "object",
    "properties": {
        "type": {"const": "repeat"},
        "times": {
            "description": "how often, 1 or more",
            "anyOf": [{"type": "integer", "minimum": 1}, _ref("reference")],
        },
        "layers": {"description": "what is repeated", "type": "array", "minItems": 1, "items": _ref("entry")},
        "with": {
            "description": 'lists with one item per iteration, referred to as {"$item": "name"}',
            "type": "object",
            "additionalProperties": {"anyOf": [{"type": "array"}, _ref("reference")]},
        },
        "note": _NOTE,
    },
    "required": ["type", "times", "layers"],
    "additionalProperties": False,
}


def _members(registry: Registry[Any]) -> dict[str, tuple[str, str]]:
    """Tag -> the name of its definition and what it is."""
    return {tag: (f"{registry.noun}.{tag}", _summary(cls)) for tag, cls in sorted(registry.registered().items())}


def _tagged(noun: str, *members: Mapping[str, tuple[str, str]]) -> Schema:
    """A document that its type decides, or a reference to one."""
    choices = {tag: member for group in members for tag, member in group.items()}
    return {
        "type": "object",
        "properties": {"type": _type(noun, {tag: summary for tag, (_, summary) in choices.items()})},
        "if": {"anyOf": [{"required": ["$item"]}, {"required": ["$var"]}]},
        "then": _ref("reference"),
        "else": {"required": ["type"]},
        "allOf": [_when(tag, _ref(definition)) for tag, (definition, _) in choices.items()],
    }


def _type(noun: str, summaries: Mapping[str, str]) -> Schema:
    return {
        "description": f"which {noun} this is",
        "enum": list(summaries),
        "enumDescriptions": list(summaries.values()),
    }


def _when(tag: str, then: Schema, key: str = "type") -> Schema:
    return {"if": {"properties": {key: {"const": tag}}, "required": [key]}, "then": then}


def _document(tag: str, cls: type, field_set: FieldSet, definitions: dict[str, Schema]) -> Schema:
    """The documents of one registered class."""
    plain = _model(field_set.values, definitions)["properties"]
    fields = {
        name: plain[name] if field.kind == "value" else _nested(field) for name, field in field_set.fields.items()
    }
    return {
        "description": _summary(cls),
        "type": "object",
        "properties": {"type": {"const": tag}, **fields, "note": _referable(_NOTE, _NOTE)},
        "required": ["type", *(name for name, field in field_set.fields.items() if field.required)],
        "additionalProperties": False,
    }


def _nested(field: JsonField) -> Schema:
    described: Schema = {"description": field.description} if field.description else {}
    if field.kind == "layers":
        return _referable(_ref("layers"), described)
    if field.default is None:
        return {**described, "default": None, "anyOf": [_ref(field.kind), {"type": "null"}]}
    return described | _ref(field.kind)


def _above(name: str, registry: Registry[Any], described: Schema) -> Schema:
    """The head or the prior."""
    allowed = [_ref(name)] if registry.registered() else []
    return {"description": described["description"], "anyOf": [*allowed, {"type": "null"}]}


def _model(model: type[BaseModel], definitions: dict[str, Schema]) -> Schema:
    """What pydantic says of a model, in the form of this schema; what it refers to goes into the definitions."""
    schema = model.model_json_schema()
    found = schema.pop("$defs", {})
    for name, inner in found.items():
        definitions[name] = _object(inner, found)
    return _object(schema, found)


def _object(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    kept = {key: value for key, value in schema.items() if key != "title"}
    if "properties" not in schema:
        return kept
    properties = {
        name: inner if name == "$schema" or "const" in inner else _referable(_value(inner, definitions), inner)
        for name, inner in schema["properties"].items()
    }
    return {**kept, "properties": {name: _untitled(inner) for name, inner in properties.items()}}


def _value(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The schema of a value, in which references may stand; without its description and default."""
    if "discriminator" in schema:
        key = schema["discriminator"]["propertyName"]
        tags = {tag: ref.rsplit("/", 1)[-1] for tag, ref in schema["discriminator"]["mapping"].items()}
        summaries = {tag: definitions[name].get("description", "") for tag, name in tags.items()}
        return {
            "type": "object",
            "properties": {key: _type("one", summaries)},
            "required": [key],
            "allOf": [_when(tag, _ref(name), key) for tag, name in tags.items()],
        }
    value = {key: inner for key, inner in schema.items() if key not in _DROPPED}
    for key in ("anyOf", "prefixItems"):
        if key in value:
            value[key] = [_value(inner, definitions) for inner in value[key]]
    if "prefixItems" in value:
        value["prefixItems"] = [_referable(inner, {}) for inner in value["prefixItems"]]
    if value.get("items"):
        value["items"] = _referable(_value(value["items"], definitions), {})
    return value


def _referable(value: Schema, described: Schema) -> Schema:
    """A value or a reference, with what the original said of it."""
    kept: Schema = {key: described[key] for key in ("description", "default") if key in described}
    options = value["anyOf"] if set(value) == {"anyOf"} else [value]
    options = [{key: part for key, part in option.items() if key not in kept} for option in options]
    return {**kept, "anyOf": [*options, _ref("reference")]}


def _untitled(schema: Schema) -> Schema:
    return {key: value for key, value in schema.items() if key != "title"}


def _summary(cls: type) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].replace("``", "`").split())


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
