"""Hypothesis strategies for what is registered: documents, shapes they accept, and input states.

Whatever is registered is drawn: plain fields from their types, ranges and literals, nested nets and layers from their
registries. A class's ``examples`` are where the drawing starts; each draw varies one of them as far as it still builds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..bijection import Bijection
from ..errors import SpecError
from ..fields import FieldSet
from ..registry import bijections, nets
from ..sequential import Sequential
from ..spec import build
from ..state import Shape, State, is_tensor_shape, make_state

LARGEST_EXTENT = 6
LARGEST_INT = 5  # above a field's own minimum: small tensors find the same faults as large ones
BATCHES = (2, 3, 1, 0, 5)

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Case:
    """Layer documents and an input shape that they accept.

    Attributes:
        layers: the documents, as in a spec.
        shape: the shape of the input, without the batch.
        context_shape: the shape of the context, None for none.
    """

    layers: tuple[dict[str, Any], ...]
    shape: Shape
    context_shape: tuple[int, ...] | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The whole document."""
        declared = {"shape": self.shape, "context_shape": self.context_shape}
        return {"input": declared, "layers": list(self.layers)}

    def chain(self, seed: int = 0) -> Sequential:
        """The chain of these layers, its weights drawn from ``seed`` without moving anybody's generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(self.spec)

    def bijection(self, seed: int = 0) -> Bijection:
        """The only layer."""
        return self.chain(seed)[0]

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
    return Case((example,), shape, context_shape)


@st.composite
def chain_cases(draw: Draw, max_depth: int = 12) -> Case:
    """A chain of up to ``max_depth`` layers of any registered types, each accepting what reaches it."""
    shape = draw(st.sampled_from([(5,), (4, 4, 4), (1, 4, 6), ((2, 2, 2), (3, 2, 2)), ((3,), (2,))]))
    case = Case((), shape, draw(st.none() | st.just((2,))))
    examples = [
        {"type": tag, **fields} for tag in bijections.registered() for fields, _ in bijections.find(tag).examples
    ]
    for _ in range(draw(st.integers(1, max_depth))):
        layer = draw(st.sampled_from(examples).flatmap(_varied))
        longer = Case((*case.layers, layer), shape, case.context_shape)
        if longer.builds():
            case = longer
    return case


@st.composite
def states(draw: Draw, shape: Shape, batch: int | None = None, dtype: torch.dtype = torch.float64) -> State:
    """An input state: ordinary, huge, tiny, zero or repeated values, in one of several memory layouts."""
    size = draw(st.sampled_from(BATCHES)) if batch is None else batch
    scale = draw(st.sampled_from([1.0, 1e6, 1e-6, 0.0]))
    constant = draw(st.booleans()) and draw(st.booleans())
    layout = draw(st.sampled_from([_contiguous, _strided, _channels_last]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(leaf: tuple[int, ...]) -> Tensor:
        values = torch.randn((size, *leaf), generator=generator, dtype=torch.float64)
        if constant and values.numel():
            values = values.flatten()[0].expand(values.shape)
        made: Tensor = layout((values * scale).to(dtype))
        return made

    return make_state(tensor, shape)


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@st.composite
def _varied(draw: Draw, document: dict[str, Any]) -> dict[str, Any]:
    """A document of the same type with some plain fields drawn anew, and what is nested varied likewise."""
    varied = dict(document)
    fields = bijections.fields(bijections.find(document["type"]))
    for name, field in fields.fields.items():
        if field.kind == "net" and name in document:
            varied[name] = draw(st.just(document[name]) | net_documents())
        elif field.kind == "layer" and name in document:
            varied[name] = draw(_varied(document[name]))
        elif field.kind == "layers":
            varied[name] = [draw(_varied(layer)) for layer in document.get(name, [])]
    return {**varied, **draw(plain_fields(fields))}


@st.composite
def net_documents(draw: Draw) -> dict[str, Any]:
    """The document of a registered net."""
    tag = draw(st.sampled_from(sorted(nets.registered())))
    return {"type": tag, **draw(plain_fields(nets.fields(nets.find(tag))))}


@st.composite
def plain_fields(draw: Draw, fields: FieldSet) -> dict[str, Any]:
    """Values for some of the plain fields of a class, by their types and ranges."""
    schema = fields.values.model_json_schema()
    chosen = [name for name in fields.plain if draw(st.booleans())]
    return {name: draw(_json_values(schema["properties"][name], schema.get("$defs", {}))) for name in chosen}


def _json_values(schema: dict[str, Any], definitions: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that fit a JSON schema as pydantic writes it, small ones."""
    if "$ref" in schema:
        return _json_values(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    if "anyOf" in schema:
        return st.one_of(*(_json_values(option, definitions) for option in schema["anyOf"]))
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
