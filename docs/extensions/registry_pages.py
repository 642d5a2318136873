"""The reference of what a spec can name, one page a registry, made of the registered classes themselves.

A new class has its entry without a line here: its docstring, its fields with their types and defaults, the shapes and
the exactness of its examples, a document, and a picture if it maps the plane.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from plane_pictures import plane_picture
from sphinx.application import Sphinx

import invflow
from invflow import registry
from invflow.bijection import Bijection
from invflow.errors import InvflowError
from invflow.fields import JsonField
from invflow.sequential import Sequential
from invflow.state import Shape

FOLDER = "generated"
PAGES = {
    "layers": ("Every layer", registry.bijections, "What `layers` of a spec lists: bijections, each with its inverse."),
    "nets": (
        "Every net",
        registry.nets,
        "What a coupling, a residual block or a `context_net` computes: any function.",
    ),
    "parts": ("Every part of a net", registry.parts, "What the `parts` of a `stack`, a stem and a `joint` list."),
    "heads": ("Every head", registry.heads, "What computes the logits of a classifier from the last state."),
    "priors": ("Every prior", registry.priors, "The distribution of the last state of a flow."),
    "data": ("Every data set", registry.data, "What `data` of a training block names."),
}


def write_pages(app: Sphinx) -> None:
    """Writes the pages; one that has not changed keeps its time, so that Sphinx does not read it again."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(exist_ok=True)
    for name, (title, kind, about) in PAGES.items():
        text = "\n".join([f"# {title}", "", about, "", *_index(name, kind), *_entries(name, kind, folder)])
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _index(page: str, kind: registry.Registry[Any]) -> Iterator[str]:
    yield "| tag | what it is |"
    yield "| --- | --- |"
    for tag, cls in sorted(kind.registered().items()):
        yield f"| [`{tag}`](#{_label(page, tag)}) | {_summary(cls)} |"
    yield ""


def _entries(page: str, kind: registry.Registry[Any], folder: Path) -> Iterator[str]:
    for tag, cls in sorted(kind.registered().items()):
        name = f"{cls.__module__}.{cls.__qualname__}"
        yield f"({_label(page, tag)})="
        yield f"## {tag}"
        yield ""
        # The chain is what a program handles, so that its methods count; those of all layers are those of a bijection.
        members = "members" if cls is Sequential else "no-members"
        yield f"```{{eval-rst}}\n.. autoclass:: {name}\n   :{members}:\n```"
        yield ""
        yield from _fields(kind, cls)
        if issubclass(cls, Bijection):
            yield from _shapes(tag, cls)
            yield from _picture(tag, folder)


def _fields(kind: registry.Registry[Any], cls: type) -> Iterator[str]:
    fields = kind.fields(cls).fields.values()
    if not fields:
        yield "It has no fields."
        yield ""
        return
    yield "| field | value | default |"
    yield "| --- | --- | --- |"
    schema = kind.fields(cls).values.model_json_schema(by_alias=True)
    for field in fields:
        default = "required" if field.required else _code(json.dumps(_plain(field.default)))
        yield f"| `{field.name}` | {_kind(field, schema)} | {default} |"
    yield ""


def _kind(field: JsonField, schema: dict[str, Any]) -> str:
    named = {"layer": "a layer", "layers": "a list of layers", "net": "a net", "parts": "a list of parts"}
    if field.kind in named:
        return named[field.kind]
    return _described(schema["properties"][field.name], schema.get("$defs", {}))


def _described(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", maxsplit=1)[-1]]
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_described(choice, definitions) for choice in choices))
    if "enum" in schema or "const" in schema:
        return " or ".join(_code(json.dumps(value)) for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any JSON value")
    if kind == "array":
        return f"a list of {_described(schema.get('items', {}), definitions)}"
    if kind == "object":
        properties = schema.get("properties", {})
        return "an object" + (" with " + ", ".join(_code(name) for name in properties) if properties else "")
    words = {"integer": "an integer", "number": "a number", "string": "a string", "boolean": "true or false"}
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {schema[key]:g}" for key, word in bounds.items() if key in schema]
    return ", ".join([words.get(kind, kind), *limits])


def _shapes(tag: str, cls: type[Bijection]) -> Iterator[str]:
    """The shapes of its examples, a document of the first, and what is known of the map."""
    rows = [row for fields, shape in cls.examples if (row := _row({"type": tag, **fields}, shape))]
    if not rows:
        return
    yield "| example | input | output | inverse, at best | keeps volume |"
    yield "| --- | --- | --- | --- | --- |"
    yield from rows
    yield ""


def _row(document: dict[str, Any], shape: Shape) -> str:
    try:
        with torch.device("meta"):
            layer: Any = invflow.build({"input": {"shape": shape}, "layers": [document]})[0]
        out = layer.output_shape(shape)
    except InvflowError:
        return ""
    cells = [_code(json.dumps(document)), _code(str(shape)), _code(str(out)), layer.limit.level]
    return f"| {' | '.join(cells)} | {'yes' if layer.volume_preserving else 'no'} |"


def _picture(tag: str, folder: Path) -> Iterator[str]:
    path = plane_picture(tag, folder)
    if path is not None:
        yield f"```{{figure}} {path.name}\n:alt: A square grid of the plane, and what a {tag} layer makes of it"
        yield ":width: 560px"
        yield "A grid, and what the layer makes of it, with weights drawn at random.\n```"
        yield ""


def _summary(cls: type) -> str:
    """The first paragraph of its docstring, as one line of a table."""
    text = " ".join((inspect.getdoc(cls) or "").split("\n\n", maxsplit=1)[0].split())
    return text.replace("``", "`").replace("|", "\\|")


def _label(page: str, tag: str) -> str:
    return f"{page}-{tag}".replace("_", "-").replace(".", "-")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def setup(app: Sphinx) -> dict[str, Any]:
    """Tells Sphinx of the extension."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
