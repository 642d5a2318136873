"""What a spec is made of: its top level, and validated documents of registered classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, WithJsonSchema

from ..context import Names
from ..fields import FieldSet
from ..numerics.modes import FLOAT, Numerics
from ..options import Options
from ..registry import Registry
from ..reversible import Backprop, Monitor
from ..state import TensorShape
from . import shapes
from .training import Training
from .versions import SPEC_VERSION


class Input(Options):
    """What goes into the chain."""

    shape: Annotated[list[Any], AfterValidator(shapes.nested_shape)] = Field(
        description="without the batch: [channels, height, width], [features], or a list of shapes for a tuple state"
    )
    context_shape: Annotated[Any, AfterValidator(shapes.context_shape), WithJsonSchema(shapes.CONTEXT_SHAPE)] = Field(
        default=None, description="the shape of the context, without the batch, or several by name"
    )


class CheckpointBlock(Options):
    """The weights that belong to a spec in a checkpoint folder."""

    weights: str = Field(pattern=r"^weights-[0-9a-f]{16}\.safetensors$", description="the file with the weights")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 over every byte of that file")
    hash: str = Field(pattern=r"^[0-9a-f]{64}$", description="the identity of the spec the weights were made for")


class TopLevel(Options):
    """The top of a spec."""

    schema_: str | None = Field(default=None, alias="$schema", description="where an editor finds the JSON schema")
    spec_version: int = Field(default=SPEC_VERSION, ge=1, le=SPEC_VERSION, description="version of the spec language")
    name: str | None = Field(default=None, description="a name for people")
    note: str | None = Field(default=None, description="a remark for people")
    input: Input = Field(description="the shapes that go in")
    layers: list[Any] = Field(description="the chain, first applied first")
    context_net: Any = Field(
        default=None,
        description="the net from the context to what the layers see, with its out_shape, or one for each entry",
    )
    head: Any = Field(default=None, description="the map from the last state to logits")
    prior: Any = Field(default=None, description="the distribution of the last state")
    dequantization: Any = Field(
        default=None,
        description="the layer from normal noise to the logits of that of pixels, its context; null: uniform noise",
    )
    training: Training | None = Field(default=None, description="how the model is trained")
    backprop: Backprop = Field(default="stored", description="which states between the layers training keeps")
    numerics: Numerics = Field(default=FLOAT, description="how exact the inverse must be")
    monitor: Monitor = Field(default="repair", description="what to do if an input is reconstructed wrongly")
    checkpoint: CheckpointBlock | None = Field(default=None, description="written by save")


_UNDECISIVE = frozenset({"backprop", "monitor"})
"""Fields that change how something is computed, not what: they are not part of a spec's identity."""


@dataclass(frozen=True)
class Node:
    """A validated document of a registered class.

    Attributes:
        values: the plain fields that were given, as the constructor takes them.
        children: the nested documents that were given: a node, or a tuple of them for a list of layers.
        sees: what of the context it sees: see `invflow.context.Names`.
    """

    registry: Registry[Any]
    cls: type
    tag: str
    values: Mapping[str, Any]
    children: Mapping[str, Node | tuple[Node, ...]]
    sees: Names = ...

    @property
    def field_set(self) -> FieldSet:
        """The fields of the class."""
        return self.registry.fields(self.cls)

    def plain(self) -> dict[str, Any]:
        """The plain fields, defaults included."""
        return {name: self.values.get(name, self.field_set.fields[name].default) for name in self.field_set.plain}

    def canonical(self) -> dict[str, Any]:
        """The document without the fields that equal their default."""
        nested = {
            name: [node.canonical() for node in child] if isinstance(child, tuple) else child.canonical()
            for name, child in self.children.items()
            if child != self.field_set.fields[name].default
        }
        decisive = {name: value for name, value in self.values.items() if name not in _UNDECISIVE}
        seen = {} if self.sees is ... else {"context": self.sees}
        return {"type": self.tag, **self.field_set.canonical(decisive), **nested, **seen}


class ContextNode(NamedTuple):
    """The document of a context_net, or of one for an entry.

    Attributes:
        net: the document of the net.
        out_shape: what it returns, without the batch.
    """

    net: Node
    out_shape: TensorShape

    def canonical(self) -> dict[str, Any]:
        """The document without the fields that equal their default."""
        return {**self.net.canonical(), "out_shape": self.out_shape}
