"""Hypothesis strategies for all registered types: documents, shapes that they accept, and input states.

Plain fields are drawn from their types, ranges and literals, nested nets and layers from their registries. Each draw
starts from one of a class's ``examples`` and varies it as far as it still builds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from ..bijection import Bijection
from ..context import ContextShape
from ..errors import SpecError
from ..fields import FieldSet
from ..registry import Registry, bijections, nets, parts
from ..sequential import Sequential
from ..spec import build
from ..state import Shape, State, is_tensor_shape
from .trial import BATCHES, DOMAINS, DTYPES, KINDS, LAYOUTS, Setting

LARGEST_EXTENT = 6
LARGEST_INT = 5  # above a field's own minimum: small tensors find the same faults as large ones
MOST_WEIGHTS = 2**15  # of a layer: a net of its usual width takes minutes, and fails where a narrow one does
DEEPEST = 2  # of parts within parts
RESTRICTING = frozenset({"numerics"})
"""Fields that restrict the inputs: a test that draws them must draw the inputs to match."""

_CONTEXT_SHAPES: st.SearchStrategy[Any] = st.sampled_from([None, (2,), {"a": (2,), "b": (1,)}])

_SEEN: list[dict[str, Any]] = [{}, {"context": "a"}, {"context": ["a", "b"]}, {"context": None}]

Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Case:
    """Layer documents and an input shape that they accept.

    Attributes:
        layers: the documents, as in a spec.
        shape: the shape of the input, without the batch.
        context_shape: the shape of the context, or None.
        options: the document's fields for the whole chain: how it is trained, for example.
    """

    layers: tuple[dict[str, Any], ...]
    shape: Shape
    context_shape: ContextShape = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> dict[str, Any]:
        """The whole document."""
        declared = {"shape": self.shape, "context_shape": self.context_shape}
        return {"input": declared, "layers": list(self.layers), **self.options}

    def chain(self, seed: int = 0) -> Sequential:
        """The chain of these layers, with weights drawn from ``seed``; no global generator is changed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(self.spec)

    def bijection(self, seed: int = 0) -> Bijection:
        """The layer if it is the only one and there are no options, otherwise the chain."""
        chain = self.chain(seed)
        return chain[0] if len(chain) == 1 and not self.options and chain[0].sees is ... else chain

    def builds(self) -> bool:
        """Whether a spec with these layers is accepted, and none of them is large."""
        try:
            return all(_is_small(layer) for layer in self.chain())
        except SpecError:
            return False


@st.composite
def cases(draw: Draw, tag: str) -> Case:
    """A layer of a registered type with a shape that it accepts.

    Examples:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=3, database=None, deadline=None)
        ... @given(case=cases("psi"))
        ... def test(case):
        ...     assert case.layers[0]["type"] == "psi"
        >>> test()
    """
    fields, shape = draw(st.sampled_from(list(bijections.find(tag).examples)))
    example = {"type": tag, **fields}
    context_shape = draw(_CONTEXT_SHAPES)
    varied, other_shape = draw(_varied(example)), draw(_similar_shapes(shape))
    pairs = ((varied, other_shape), (varied, shape), (example, other_shape), (example, shape))
    drawn = (Case((layer,), accepted, context_shape) for layer, accepted in pairs)
    return next((case for case in drawn if case.builds()), Case((example,), shape))


@st.composite
def chain_cases(draw: Draw, max_depth: int = 12, numerics: dict[str, Any] | None = None) -> Case:
    """A chain of up to ``max_depth`` layers of any registered types, each accepting the state that reaches it.

    With ``numerics``, such as ``{"mode": "grid"}``, only types that can be as exact. The fields that a `sequential` has
    besides its layers are drawn for the whole chain, if all its layers allow them.

    Examples:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=3, database=None, deadline=None)
        ... @given(case=chain_cases(max_depth=2))
        ... def test(case):
        ...     assert len(case.layers) <= 2
        >>> test()
    """
    shape = draw(st.sampled_from([(5,), (4, 4, 4), (1, 4, 6), ((2, 2, 2), (3, 2, 2)), ((3,), (2,))]))
    context_shape = draw(_CONTEXT_SHAPES)
    options = {} if numerics is None else {"numerics": numerics}
    examples = [{"type": tag, **fields} for tag, cls in bijections.registered().items() for fields, _ in cls.examples]

    def shape_after(layer: dict[str, Any], before: Shape) -> Shape | None:
        return _shape_after(json.dumps(layer), before, json.dumps(context_shape), json.dumps(options))

    layers: list[dict[str, Any]] = []
    reached = shape
    for _ in range(draw(st.integers(1, max_depth))):
        example = draw(st.sampled_from([one for one in examples if shape_after(one, reached) is not None]))
        varied = draw(_varied(example))
        layers.append(example if shape_after(varied, reached) is None else varied)
        if isinstance(context_shape, dict):
            layers[-1] = {**layers[-1], **draw(st.sampled_from(_SEEN))}
        reached = shape_after(layers[-1], reached) or reached
    drawn = draw(plain_fields(bijections.fields(Sequential)))
    case = Case(tuple(layers), shape, context_shape, {**drawn, **options})
    return case if case.builds() else dataclasses.replace(case, options=options)


@functools.lru_cache(maxsize=2**14)
def _shape_after(layer: str, shape: Shape, context_shape: str, options: str) -> Shape | None:
    """The shape after a layer in a chain with this context and these options, all as JSON text, which can be cached.

    None if the layer is large, does not accept the shape before it, has a domain smaller than the reals, or maps them
    into an interval: inside a chain any number may reach it, those too that round to the end of an interval.
    """
    try:
        chain = Case((json.loads(layer),), shape, json.loads(context_shape), json.loads(options)).chain()
    except SpecError:
        return None
    if not _is_small(chain):
        return None
    unbounded = chain.domain == "reals" and (chain.codomain == "reals" or not chain.surjective)
    return chain.output_shape(shape) if unbounded else None


def _is_small(layer: Bijection) -> bool:
    return sum(weight.numel() for weight in layer.parameters()) <= MOST_WEIGHTS


def conditions() -> st.SearchStrategy[Setting]:
    """A setting to try a property in: inputs, memory layout, batch, dtype, mode, and weights with noise or without."""
    return st.builds(
        Setting,
        kind=st.sampled_from(KINDS),
        layout=st.sampled_from(LAYOUTS),
        batch=st.sampled_from(BATCHES),
        dtype=st.sampled_from(DTYPES),
        training=st.booleans(),
        stretched=st.booleans(),
        weights=st.integers(0, 2**16) | st.none(),  # layers that start as the identity hide their faults
        seed=st.integers(0, 2**16),
    )


@st.composite
def states(draw: Draw, shape: Shape, batch: int | None = None, dtype: torch.dtype = torch.float64) -> State:
    """An input state: ordinary, huge, tiny, zero or repeated values, in one of several memory layouts.

    Examples:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=3, database=None, deadline=None)
        ... @given(x=states((2,), batch=3))
        ... def test(x):
        ...     assert x.shape == (3, 2)
        >>> test()
    """
    setting: Setting = draw(conditions())
    size = setting.batch if batch is None else batch
    return dataclasses.replace(setting, batch=size, dtype=dtype).draw(shape, DOMAINS["reals"])


@st.composite
def _varied(draw: Draw, document: dict[str, Any]) -> dict[str, Any]:
    """A document of the same type with some plain fields redrawn, and nested nets and layers varied likewise."""
    varied = dict(document)
    cls = bijections.find(document["type"])
    fields = bijections.fields(cls)
    for name, part in fields.fields.items():
        if part.kind == "net" and name in document:
            varied[name] = draw(st.just(document[name]) | net_documents(cls))
        elif part.kind == "layer" and name in document:
            varied[name] = draw(_varied(document[name]))
        elif part.kind == "layers":
            varied[name] = [draw(_varied(layer)) for layer in document.get(name, [])]
    return {**varied, **draw(plain_fields(fields))}


@st.composite
def net_documents(draw: Draw, layer: type) -> dict[str, Any]:
    """The document of a registered net of this library or of the layer's own package; others are not trusted."""
    packages = {_package(Bijection), _package(layer)}
    tag = draw(st.sampled_from(sorted(tag for tag, net in nets.registered().items() if _package(net) in packages)))
    document: dict[str, Any] = draw(_documents(nets, tag))
    return document


@st.composite
def _documents(draw: Draw, registry: Registry[Any], tag: str, depth: int = 0) -> dict[str, Any]:
    """The document of a net or a part, with a few parts inside, the last of which chooses its channels."""
    fields = registry.fields(registry.find(tag))
    document = {"type": tag, **draw(plain_fields(fields))}
    for name in (name for name, one in fields.fields.items() if one.kind == "parts"):
        known = sorted(tag for tag, part in parts.registered().items() if _package(part) == _package(Bijection))
        last = [draw(_documents(parts, draw(st.sampled_from([tag for tag in known if parts.find(tag).chooses]))))]
        tags = draw(st.lists(st.sampled_from(known), max_size=2)) if depth < DEEPEST else []
        document[name] = [draw(_documents(parts, tag, depth + 1)) for tag in tags] + last
    return document


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]


@st.composite
def plain_fields(draw: Draw, fields: FieldSet) -> dict[str, Any]:
    """Values for some of the plain fields of a class, drawn from their types and ranges."""
    schema = fields.values.model_json_schema()
    chosen = [name for name in fields.plain if name not in RESTRICTING and draw(st.booleans())]
    return {name: draw(_json_values(schema["properties"][name], schema.get("$defs", {}))) for name in chosen}


def _json_values(schema: dict[str, Any], definitions: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Small values that fit a JSON schema as pydantic writes it."""
    if "$ref" in schema:
        return _json_values(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    if options := schema.get("anyOf", schema.get("oneOf")):
        return st.one_of(*(_json_values(option, definitions) for option in options))
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
            limits = (schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf) - 1)
            if low < 0 < min(limits):
                low = max(low, -LARGEST_INT // 2)  # around 0, where an integer of either sign is ordinary
            high = min(low + LARGEST_INT, *limits)
            step = schema.get("not", {}).get("multipleOf")
            return st.integers(low, high).filter(lambda value: step is None or value % step)
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum", -2.0))
            high = schema.get("maximum", schema.get("exclusiveMaximum", low + 4.0))
            # Sixteenths are exact in JSON text, and the bounds, which may be excluded, are left out.
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
    """A shape of the same structure: other channels, and other sizes, equal wherever they were equal."""
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
