"""The spec language as JSON Schema (2020-12), for all registered classes: for editors and other validators.

The schema is written for VS Code's JSON language service, its completions, explanations and marks: the ``type`` of a
document selects its fields by ``if`` and ``then``, because the error of a large ``oneOf`` is only that nothing matches.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from pydantic import BaseModel

from ..fields import LISTS, JsonField
from ..registry import REGISTRIES, REGISTRY_OF, Registry, bijections, data, nets, priors
from .nodes import TopLevel
from .shapes import ENTRY, MOST_DIMENSIONS

Schema: TypeAlias = dict[str, Any]
Members: TypeAlias = dict[str, tuple[str, str]]
"""Tag -> the name of its definition, and its summary."""

_CONTEXT: Schema = {
    "description": "what it sees of the context: the name of an entry, a list of names, or null; all by default",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
        {"type": "null"},
        {"$ref": "#/$defs/reference"},
    ],
}
_NOTE = {"type": "string", "description": "a remark for people, without effect"}


def json_schema(*, plug_ins: bool = False) -> Schema:
    """The JSON Schema of a spec with everything that is registered.

    Args:
        plug_ins: load every installed plug-in first, not only those that a spec named; broken ones are left out.

    Examples:
        >>> sorted(json_schema()["$defs"]["layer.split"]["properties"])
        ['context', 'dim', 'note', 'sizes', 'type']
    """
    if plug_ins:
        for registry in REGISTRIES:
            registry.load_plug_ins()
    definitions: dict[str, Schema] = {
        "reference": _REFERENCE,
        "shape": _SHAPE,
    }
    for kind in LISTS:
        registry, entry, repeat = REGISTRY_OF[kind], f"entry.{kind}", f"repeat.{kind}"
        definitions[kind] = {"type": "array", "items": _ref(entry)}
        definitions[repeat] = _repeat(kind, entry)
        definitions[entry] = _tagged(
            registry.noun, {**_members(registry), "repeat": (repeat, definitions[repeat]["description"])}
        )
    for registry in REGISTRIES:
        if registry is not data:
            definitions[registry.noun] = _tagged(registry.noun, _members(registry))
        for tag, cls in sorted(registry.registered().items()):
            definitions[_definition(registry, tag)] = _document(tag, cls, registry, definitions)
    top = _model(TopLevel, definitions)
    fields, of_input = top["properties"], definitions["Input"]["properties"]
    definitions["Data"] = _data_set(definitions)
    _add_context_nets(definitions)
    fields["context_net"] = {
        "description": fields["context_net"]["description"],
        "anyOf": [
            _ref("context net"),
            {"type": "object", "propertyNames": {"pattern": ENTRY}, "additionalProperties": _ref("context net")},
            {"type": "null"},
        ],
    }
    for name, of in (("head", "head"), ("prior", "prior"), ("dequantization", "layer")):
        fields[name] = {"description": fields[name]["description"], "anyOf": [_ref(of), {"type": "null"}]}
    fields["stem"] = {
        "description": "a net before the layers, made of parts; what lies below it has no inverse",
        "type": "object",
        "properties": {"type": {"const": "stack"}, "parts": _ref("parts"), "note": _NOTE},
        "required": ["type"],
        "additionalProperties": False,
    }
    fields["vars"] = {"type": "object", "description": 'constants, referred to as {"$var": "name"}'}
    fields["layers"] = _referable(_ref("layers"), fields["layers"])
    of_input["shape"] = _referable(_ref("shape"), of_input["shape"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "invflow spec",
        **top,
        "description": "An invertible neural network: the layers in data order, and a head, a prior, or both.",
        "$defs": definitions,
    }


def _add_context_nets(definitions: dict[str, Schema]) -> None:
    """The documents of nets with the shape that they return, which a context_net has."""
    members = {}
    for tag, (definition, summary) in _members(nets).items():
        net, name = definitions[definition], f"context_net.{tag}"
        shape = {**definitions["shape"], "description": "the shape that it returns, without the batch"}
        properties = {**net["properties"], "out_shape": shape}
        definitions[name] = {**net, "properties": properties, "required": [*net["required"], "out_shape"]}
        members[tag] = name, summary
    definitions["context net"] = _tagged("net", members)


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


_REFERENCE: Schema = {
    "description": 'a constant of vars, {"$var": "name"}, or an item of an enclosing repeat, {"$item": "name"}',
    "type": "object",
    "properties": {
        "$var": {"type": "string", "description": "the name of a constant in the vars at the top"},
        "$item": {"type": "string", "description": "the name of a list in the with of an enclosing repeat"},
    },
    "minProperties": 1,
    "maxProperties": 1,
    "additionalProperties": False,
}
_SHAPE: Schema = {
    "type": "array",
    "minItems": 1,
    "anyOf": [
        {"maxItems": MOST_DIMENSIONS, "items": {"anyOf": [{"type": "integer", "minimum": 1}, _ref("reference")]}},
        {"items": {"anyOf": [_ref("shape"), _ref("reference")]}},
    ],
}


def _repeat(kind: str, entry: str) -> Schema:
    """The macro in a list of this kind, whose entries have a definition of that name."""
    return {
        "description": f"The {kind} several times, inserted into the enclosing list.",
        "type": "object",
        "properties": {
            "type": {"const": "repeat"},
            "times": {
                "description": "the number of repetitions, 1 or more",
                "anyOf": [{"type": "integer", "minimum": 1}, _ref("reference")],
            },
            kind: {"description": f"the repeated {kind}", "type": "array", "minItems": 1, "items": _ref(entry)},
            "with": {
                "description": 'lists with one item per iteration, referred to as {"$item": "name"}',
                "type": "object",
                "additionalProperties": {"anyOf": [{"type": "array"}, _ref("reference")]},
            },
            "note": _NOTE,
        },
        "required": ["type", "times", kind],
        "additionalProperties": False,
    }


def _members(registry: Registry[Any]) -> Members:
    return {tag: (_definition(registry, tag), _summary(cls)) for tag, cls in sorted(registry.registered().items())}


def _definition(registry: Registry[Any], tag: str) -> str:
    return f"{registry.noun.replace(' ', '_')}.{tag}"


def _tagged(noun: str, members: Members) -> Schema:
    """A document whose type decides its fields, or a reference to one."""
    return {
        **_choice(noun, members),
        "if": {"anyOf": [{"required": ["$item"]}, {"required": ["$var"]}]},
        "then": _ref("reference"),
        "else": {"required": ["type"]},
    }


def _choice(noun: str, members: Members, key: str = "type") -> Schema:
    """An object in which one key decides which other keys there are."""
    summaries = [summary for _, summary in members.values()]
    decides = {"description": f"which {noun} this is", "enum": list(members), "enumDescriptions": summaries}
    return {
        "type": "object",
        "properties": {key: decides},
        "allOf": [
            {"if": {"properties": {key: {"const": tag}}, "required": [key]}, "then": _ref(definition)}
            for tag, (definition, _) in members.items()
        ],
    }


def _data_set(definitions: dict[str, Schema]) -> Schema:
    """A data set: the fields of its source, beside those that all have."""
    common, members = definitions["Data"]["properties"], _members(data)
    default = common.pop("name")["default"]
    definitions.update({f"Data.{name}": schema for name, schema in common.items()})
    for definition, _ in members.values():
        definitions[definition]["properties"].update({name: _ref(f"Data.{name}") for name in common})
        definitions[definition]["required"].remove(data.key)  # which may be absent, for the default
    choice = _choice(data.noun, members, data.key)
    choice["properties"][data.key]["default"] = default
    chosen = next(one["if"] for one in choice["allOf"] if one["if"]["properties"][data.key]["const"] == default)
    del chosen["required"]
    return {**choice, "description": definitions["Data"]["description"]}


def _document(tag: str, cls: type, registry: Registry[Any], definitions: dict[str, Schema]) -> Schema:
    """The documents of one registered class."""
    field_set = registry.fields(cls)
    plain = _model(field_set.values, definitions)["properties"]
    shown = {name: plain[name] if field.kind == "value" else _nested(field) for name, field in field_set.fields.items()}
    seen = {"context": _CONTEXT} if registry in (bijections, nets, priors) else {}
    return {
        "description": _summary(cls),
        "type": "object",
        "properties": {registry.key: {"const": tag}, **shown, **seen, "note": _referable(_NOTE, _NOTE)},
        "required": [registry.key, *(name for name, field in field_set.fields.items() if field.required)],
        "additionalProperties": False,
    }


def _nested(field: JsonField) -> Schema:
    described: Schema = {"description": field.description} if field.description else {}
    if field.kind in LISTS:
        return _referable(_ref(field.kind), described)
    if field.default is None:
        return {**described, "default": None, "anyOf": [_ref(field.kind), {"type": "null"}]}
    return described | _ref(field.kind)


def _model(model: type[BaseModel], definitions: dict[str, Schema]) -> Schema:
    """Pydantic's schema of a model in the form of this schema; the models it refers to are added to the definitions."""
    schema = model.model_json_schema()
    found = schema.pop("$defs", {})
    definitions.update({name: _object(inner, found) for name, inner in found.items()})
    return _object(schema, found)


def _object(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    kept = _without(schema, "title")
    properties = {
        name: _without(inner, "title")
        if name == "$schema" or "const" in inner
        else _referable(_value(inner, definitions), inner)
        for name, inner in schema.get("properties", {}).items()
    }
    return {**kept, "properties": properties} if properties else kept


def _value(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The schema of a value that may contain references, without its description and default."""
    if "discriminator" in schema:
        key = schema["discriminator"]["propertyName"]
        names = {tag: ref.rsplit("/", 1)[-1] for tag, ref in schema["discriminator"]["mapping"].items()}
        members = {tag: (name, definitions[name].get("description", "")) for tag, name in names.items()}
        return {**_choice("one", members, key), "required": [key]}
    value = _without(schema, "title", "description", "default")
    for key in ("anyOf", "oneOf", "prefixItems"):
        if key in value:
            value[key] = [_value(inner, definitions) for inner in value[key]]
    if "prefixItems" in value:
        value["prefixItems"] = [_referable(inner) for inner in value["prefixItems"]]
    if value.get("items"):
        value["items"] = _referable(_value(value["items"], definitions))
    return value


def _referable(value: Schema, described: Mapping[str, Any] = MappingProxyType({})) -> Schema:
    """A value or a reference, with the description and the default of the original."""
    kept: Schema = {key: described[key] for key in ("description", "default") if key in described}
    options = value["anyOf"] if set(value) == {"anyOf"} else [value]
    return {**kept, "anyOf": [*(_without(option, *kept) for option in options), _ref("reference")]}


def _without(schema: Schema, *dropped: str) -> Schema:
    return {key: value for key, value in schema.items() if key not in dropped}


def _summary(cls: type) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].replace("``", "`").split())


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
