"""Hypothesis strategies for what is registered: documents, shapes they accept, and input states.

Whatever is registered is drawn: plain fields from their types, ranges and literals, nested nets and layers from their
registries. A class's ``examples`` are where the drawing starts; each draw varies one of them as far as it still builds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from ..bijection import Bijection
from ..errors import SpecError
from ..fields import FieldSet
from ..registry import bijections, nets
from ..sequential import Sequential
from ..spec import build
from ..state import Shape, State, is_tensor_shape
from .trial import BATCHES, DOMAINS, DTYPES, KINDS, LAYOUTS, Setting

LARGEST_EXTENT = 6
RESTRICTING = frozenset({"numerics"})
"""Fields that say which inputs there may be: who draws them has to draw the inputs too."""
LARGEST_INT = 5  # above a field's own minimum: small tensors find the same faults as large ones

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Case:
    """Layer documents and an input shape that they accept.

    Attributes:
        layers: the documents, as in a spec.
        shape: the shape of the input, without the batch.
        context_shape: the shape of the context, None for none.
        options: what the document says of the chain as a whole: how it is trained, for example.
    """

    layers: tuple[dict[str, Any], ...]
    shape: Shape
    context_shape: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        """The whole document."""
        declared = {"shape": self.shape, "context_shape": self.context_shape}
        return {"input": declared, "layers": list(self.layers), **self.options}

    def chain(self, seed: int = 0) -> Sequential:
        """The chain of these layers, its weights drawn from ``seed`` without moving anybody's generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(self.spec)

    def bijection(self, seed: int = 0) -> Bijection:
        """The only layer; where there are several, or something is said of all of them, the chain."""
        chain = self.chain(seed)
        return chain[0] if len(chain) == 1 and not self.options else chain

    def builds(self) -> bool:
        """Whether a spec with these layers is accepted."""
        try:
            self.chain()
        except SpecError:
            return False
        return True


@st.composite
def cases(draw: Draw, tag: str) -> Case:
    """A layer of a registered type with a shape that it accepts."""
    fields, shape = draw(st.sampled_from(list(bijections.find(tag).examples)))
    example = {"type": tag, **fields}
    context_shape = draw(st.none() | st.just((2,)))
    varied, other_shape = draw(_varied(example)), draw(_similar_shapes(shape))
    for layer, accepted in ((varied, other_shape), (varied, shape), (example, other_shape)):
        case = Case((layer,), accepted, context_shape)
        if case.builds():
            return case
    return Case((example,), shape, context_shape if Case((example,), shape, context_shape).builds() else None)


@st.composite
def chain_cases(draw: Draw, max_depth: int = 12, numerics: dict[str, Any] | None = None) -> Case:
    """A chain of up to ``max_depth`` layers of any registered types, each accepting what reaches it.

    With ``numerics``, such as ``{"mode": "grid"}``, of types that can be so exact.

    The fields that a `sequential` has besides its layers are drawn for the whole chain, where all its layers can do so.
    """
    shape = draw(st.sampled_from([(5,), (4, 4, 4), (1, 4, 6), ((2, 2, 2), (3, 2, 2)), ((3,), (2,))]))
    context_shape = draw(st.none() | st.just((2,)))
    layers: list[dict[str, Any]] = []
    reached = shape
    said = {} if numerics is None else {"numerics": numerics}
    key = json.dumps(said)
    for _ in range(draw(st.integers(1, max_depth))):
        example = draw(st.sampled_from(_accepting(tuple(bijections.registered()), reached, context_shape, key)))
        varied = draw(_varied(example))
        after = _shape_after(json.dumps(varied), reached, context_shape, key)
        layers.append(example if after is None else varied)
        reached = after or _shape_after(json.dumps(example), reached, context_shape, key) or reached
    drawn = draw(plain_fields(bijections.fields(Sequential)))
    case = Case(tuple(layers), shape, context_shape, {**drawn, **said})
    return case if case.builds() else dataclasses.replace(case, options=said)


@functools.cache
def _accepting(
    tags: tuple[str, ...], shape: Shape, context_shape: tuple[int, ...] | None, said: str
) -> list[dict[str, Any]]:
    """The examples of these layers that accept a shape."""
    examples = [{"type": tag, **fields} for tag in tags for fields, _ in bijections.find(tag).examples]
    return [one for one in examples if _shape_after(json.dumps(one), shape, context_shape, said) is not None]


@functools.lru_cache(maxsize=4096)
def _shape_after(document: str, shape: Shape, context_shape: tuple[int, ...] | None, said: str) -> Shape | None:
    """The shape after a layer in a chain of which this is said.

    None if it does not accept the one before, or not all numbers: what reaches a layer inside a chain may be anything.
    """
    try:
        chain = Case((json.loads(document),), shape, context_shape, json.loads(said)).chain()
    except SpecError:
        return None
    return chain.output_shape(shape) if chain.domain == "reals" else None


@st.composite
def conditions(draw: Draw) -> Setting:
    """A setting to try a property in: inputs, memory layout, batch, dtype, mode, and weights moved or as they are."""
    return Setting(
        kind=draw(st.sampled_from(KINDS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        batch=draw(st.sampled_from(BATCHES)),
        dtype=draw(st.sampled_from(DTYPES)),
        training=draw(st.booleans()),
        weights=draw(st.integers(0, 2**16) | st.none()),  # layers that start as the identity hide what they do
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def states(draw: Draw, shape: Shape, batch: int | None = None, dtype: torch.dtype = torch.float64) -> State:
    """An input state: ordinary, huge, tiny, zero or repeated values, in one of several memory layouts."""
    setting: Setting = draw(conditions())
    size = setting.batch if batch is None else batch
    return dataclasses.replace(setting, batch=size, dtype=dtype).draw(shape, DOMAINS["reals"])


@st.composite
def _varied(draw: Draw, document: dict[str, Any]) -> dict[str, Any]:
    """A document of the same type with some plain fields drawn anew, and what is nested varied likewise."""
    varied = dict(document)
    fields = bijections.fields(bijections.find(document["type"]))
    for name, part in fields.fields.items():
        if part.kind == "net" and name in document:
            varied[name] = draw(st.just(document[name]) | net_documents(bijections.find(document["type"])))
        elif part.kind == "layer" and name in document:
            varied[name] = draw(_varied(document[name]))
        elif part.kind == "layers":
            varied[name] = [draw(_varied(layer)) for layer in document.get(name, [])]
    return {**varied, **draw(plain_fields(fields))}


@st.composite
def net_documents(draw: Draw, layer: type) -> dict[str, Any]:
    """The document of a registered net: this library's, or the layer's own package's, for nobody vouches for others."""
    packages = {_package(Bijection), _package(layer)}
    tag = draw(st.sampled_from(sorted(tag for tag, net in nets.registered().items() if _package(net) in packages)))
    return {"type": tag, **draw(plain_fields(nets.fields(nets.find(tag))))}


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


@st.composite
def plain_fields(draw: Draw, fields: FieldSet) -> dict[str, Any]:
    """Values for some of the plain fields of a class, by their types and ranges."""
    schema = fields.values.model_json_schema()
    chosen = [name for name in fields.plain if name not in RESTRICTING and draw(st.booleans())]
    return {name: draw(_json_values(schema["properties"][name], schema.get("$defs", {}))) for name in chosen}


def _json_values(schema: dict[str, Any], definitions: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that fit a JSON schema as pydantic writes it, small ones."""
    if "$ref" in schema:
        return _json_values(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return st.one_of(*(_json_values(option, definitions) for option in schema[several]))
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
            high = min(
                schema.get("maximum", low + LARGEST_INT), schema.get("exclusiveMaximum", low + LARGEST_INT + 1) - 1
            )
            step = schema.get("not", {}).get("multipleOf")
            return st.integers(low, high).filter(lambda value: step is None or value % step)
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum", -2.0))
            high = schema.get("maximum", schema.get("exclusiveMaximum", low + 4.0))
            # Sixteenths: exact in JSON text, and never a bound that is excluded.
            return st.integers(1, 15).map(lambda part: low + (high - low) * part / 16)
        case "array":
            if "prefixItems" in schema:
                return st.tuples(*(_json_values(item, definitions) for item in schema["prefixItems"])).map(list)
            low = schema.get("minItems", 0)
            high = min(schema.get("maxItems", low + 2), low + 2)
            return st.lists(_json_values(schema["items"], definitions), min_size=low, max_size=high)
        case "object" if "properties" in schema:
            drawn = {name: _json_values(inner, definitions) for name, inner in schema["properties"].items()}
            needed = {name: drawn.pop(name) for name in schema.get("required", ())}
            return st.fixed_dictionaries(needed, optional=drawn)
        case _:
            raise TypeError(f"no strategy for a field with the schema {schema}: give its type a range or literals")


@st.composite
def _similar_shapes(draw: Draw, shape: Shape) -> Shape:
    """A shape of the same structure: other channels, and other sizes that agree where they agreed."""
    sizes: dict[int, int] = {}

    def vary(part: Shape) -> Shape:
        if not is_tensor_shape(part):
            return tuple(vary(inner) for inner in part)  # type: ignore[arg-type]
        _, *rest = part
        for size in rest:
            if size not in sizes:
                sizes[size] = draw(st.integers(1, LARGEST_EXTENT))
        return (draw(st.integers(1, LARGEST_EXTENT)), *(sizes[size] for size in rest))

    return vary(shape)
