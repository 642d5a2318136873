"""From a checked spec to modules: shapes flow through the layers, and each is constructed for what reaches it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..bijection import Bijection
from ..bijections import Inverse
from ..errors import InvflowError, NumericsError, ShapeError, SpecError
from ..models import Classifier, Flow, Prior
from ..numerics.options import FLOAT, Exact, Float, Grid
from ..sequential import Sequential
from ..state import Shape, flat_size
from .document import Node, Spec, SpecSource, load_spec
from .limits import DEFAULT_LIMITS, Limits
from .text import JsonPath

# What constructors raise for values that pass each on its own but do not fit together; anything else is a bug.
_REFUSALS = (ValueError, RuntimeError, OverflowError)


def build(source: SpecSource, *, limits: Limits = DEFAULT_LIMITS) -> Sequential:
    """The chain of bijections that a spec describes; its head or prior, if it has one, is left out.

    Args:
        source: a file's path, a dict, or a Spec.
        limits: what the spec is refused for, before memory is taken.

    Raises:
        SpecError: with the place of every fault.

    >>> chain = build({"input": {"shape": [1, 4, 4]}, "layers": [{"type": "psi", "block_size": 2}]})
    >>> chain.output_shape((1, 4, 4))
    (4, 2, 2)
    """
    spec = load_spec(source, limits=limits)
    return _build(spec, limits)[0]


def build_model(source: SpecSource, *, limits: Limits = DEFAULT_LIMITS) -> Classifier | Flow:
    """The model that a spec describes: its chain with its head, a `Classifier`, or with its prior, a `Flow`.

    Raises:
        SpecError: with the place of every fault; also where the spec has neither.
    """
    spec = load_spec(source, limits=limits)
    chain, above = _build(spec, limits)
    if above is None:
        raise spec.error((), "a model needs a head or a prior, got a spec without; use build for the chain alone")
    return Classifier(chain, above) if spec.prior is None else Flow(chain, cast(Prior, above))


def _build(spec: Spec, limits: Limits) -> tuple[Sequential, nn.Module | None]:
    # First on the meta device: whatever is wrong or too large shows before memory is taken.
    with torch.device("meta"):
        _Builder(spec, limits, count=True).everything()
    return _Builder(spec, limits, count=False).everything()


class _Builder:
    """Constructs the modules of one spec; with ``count`` it also keeps account of their size."""

    def __init__(self, spec: Spec, limits: Limits, count: bool) -> None:
        self.spec = spec
        self.limits = limits
        self.count = count
        self.numerics = spec.top.numerics  # of the chain that is being built
        self.parameters = 0
        self._counted: dict[tuple[int, Shape], tuple[Bijection, Shape, int]] = {}

    def everything(self) -> tuple[Sequential, nn.Module | None]:
        shape = self.spec.input_shape
        self._check_state(shape, ("input", "shape"))
        layers: list[Bijection] = []
        for i, node in enumerate(self.spec.layers):
            layer, shape = self._top_layer(node, ("layers", i), shape)
            layers.append(layer)
        top = self.spec.top
        chain = Sequential(*layers, backprop=top.backprop, monitor=top.monitor, numerics=top.numerics)
        chain.declared_shape = self.spec.input_shape
        chain.declared_context_shape = self.spec.context_shape
        for name, document in (("head", self.spec.head), ("prior", self.spec.prior)):
            if document is not None:
                above = self._construct(document, (name,), {"shape": shape}, {})
                self._add_parameters(_size(above), (name,))
                return chain, above
        return chain, None

    def _top_layer(self, node: Node, path: JsonPath, shape: Shape) -> tuple[Bijection, Shape]:
        if not self.count:
            return self._layer(node, path, shape)
        # Equal documents that meet equal shapes are the same module as far as counting goes.
        key = (id(node), shape)
        if key not in self._counted:
            layer, after = self._layer(node, path, shape)
            self._counted[key] = (layer, after, _size(layer))
        layer, after, size = self._counted[key]
        self._add_parameters(size, path)
        return layer, after

    def _layer(self, node: Node, path: JsonPath, shape: Shape) -> tuple[Bijection, Shape]:
        """The layer that takes a state of this shape, and the shape of what it returns."""
        if node.cls is Inverse:
            layer, after = self._layer_backwards(self._only_child(node), (*path, "layer"), shape)
            bijection: Bijection = Inverse(layer)
        else:
            bijection = self._construct_layer(node, path, shape, self._layer)
            after = self._shape(bijection.output_shape, shape, path)
        self._check_state(after, path)
        return bijection, after

    def _layer_backwards(self, node: Node, path: JsonPath, shape: Shape) -> tuple[Bijection, Shape]:
        """The layer that returns a state of this shape, and the shape of what it takes."""
        if node.cls is Inverse:
            layer, before = self._layer(self._only_child(node), (*path, "layer"), shape)
            return Inverse(layer), before
        if any(isinstance(child, tuple) or child.registry is node.registry for child in node.children.values()):
            bijection = self._construct_layer(node, path, shape, self._layer_backwards)
            return bijection, self._shape(bijection.input_shape, shape, path)
        # Constructors want the incoming shape, and only a constructed layer can tell it: ask one built for a guess.
        with torch.device("meta"):
            guess = self._construct_layer(node, path, shape, self._layer_backwards)
            before = self._shape(guess.input_shape, shape, path)
        bijection = self._construct_layer(node, path, before, self._layer_backwards)
        after = self._shape(bijection.output_shape, before, path)
        if after != shape:
            raise self.spec.error(path, f"{node.tag} has no inverse at shape {shape}: it would return {after}")
        return bijection, before

    def _construct_layer(self, node: Node, path: JsonPath, shape: Shape, build_inner: Any) -> Bijection:
        """The module of a layer, its nets built for ``shape`` and its inner layers by ``build_inner``."""
        around = self.numerics
        self.numerics = self._numerics(node, path)
        bijection = self._construct_with_children(node, path, shape, build_inner)
        self.numerics = around
        return bijection

    def _numerics(self, node: Node, path: JsonPath) -> Any:
        """The numerics of the layers inside a layer: its own, or those of the chain around it."""
        own = node.values.get("numerics", FLOAT) if node.cls is Sequential else FLOAT
        if isinstance(own, Float) or own == self.numerics:
            return self.numerics
        if isinstance(self.numerics, Grid | Exact):
            outer, inner = (one.model_dump(exclude_defaults=True) for one in (self.numerics, own))
            message = f"a chain in {outer} numerics holds none with {inner}: name numerics once, at the chain outside"
            raise self.spec.error((*path, "numerics"), message)
        return own

    def _construct_with_children(self, node: Node, path: JsonPath, shape: Shape, build_inner: Any) -> Bijection:
        children: dict[str, Any] = {}
        net_shapes: dict[str, tuple[Shape, Shape]] | None = None
        for name, child in node.children.items():
            if isinstance(child, tuple):
                children[name] = self._inner_chain(child, (*path, name), shape, build_inner)
            elif issubclass(child.cls, Bijection):
                find = getattr(node.cls, "layer_shape", None)
                inner = shape if find is None else self._shape(find, shape, path)
                children[name], _ = build_inner(child, (*path, name), inner)
            else:
                if net_shapes is None:
                    net_shapes = self._shape(node.cls.net_shapes, shape, path)  # type: ignore[attr-defined]
                shape_in, shape_out = net_shapes[name]
                filled = {"in_shape": shape_in, "out_shape": shape_out, "context_shape": self.spec.context_shape}
                children[name] = self._construct(child, (*path, name), filled, {})
        filled = {"shape": shape, "context_shape": self.spec.context_shape}
        bijection = cast(Bijection, self._construct(node, path, filled, children))
        if isinstance(self.numerics, Grid | Exact):
            try:
                bijection.set_numerics(self.numerics)
            except NumericsError as error:
                raise self.spec.error(path, error) from error
        return bijection

    def _inner_chain(self, nodes: tuple[Node, ...], path: JsonPath, shape: Shape, build_inner: Any) -> list[Bijection]:
        backwards = build_inner == self._layer_backwards
        layers: list[Bijection] = []
        for i, node in sorted(enumerate(nodes), reverse=backwards):
            layer, shape = build_inner(node, (*path, i), shape)
            layers.append(layer)
        return layers[::-1] if backwards else layers

    def _construct(self, node: Node, path: JsonPath, filled: dict[str, Any], children: dict[str, Any]) -> nn.Module:
        field_set = node.registry.fields(node.cls)
        arguments = {**node.values, **children}
        arguments.update({name: value for name, value in filled.items() if name in field_set.signature.parameters})
        variadic = [
            layer
            for name, field in field_set.fields.items()
            if field.kind == "layers"
            for layer in arguments.pop(name, ())
        ]
        try:
            return node.cls(*variadic, **arguments)
        except SpecError:
            raise
        except InvflowError as error:
            raise self.spec.error(path, error) from error
        except _REFUSALS as error:
            raise self.spec.error(path, f"{node.tag} cannot be made of these fields: {error}") from error

    def _shape(self, find: Any, shape: Shape, path: JsonPath) -> Any:
        try:
            return find(shape)
        except ShapeError as error:
            raise self.spec.error(path, error) from error

    def _check_state(self, shape: Shape, path: JsonPath) -> None:
        if flat_size(shape) > self.limits.state:
            message = f"a state of shape {shape} holds {flat_size(shape)} numbers, the limit is {self.limits.state}"
            raise self.spec.error(path, message)

    def _add_parameters(self, size: int, path: JsonPath) -> None:
        self.parameters += size
        if self.parameters > self.limits.parameters:
            raise self.spec.error(
                path, f"{self.parameters} parameters up to here, the limit is {self.limits.parameters}"
            )

    @staticmethod
    def _only_child(node: Node) -> Node:
        return cast(Node, node.children["layer"])


def _size(module: nn.Module) -> int:
    """How many numbers the weights and buffers of a module hold."""
    return sum(tensor.numel() for tensor in module.state_dict().values())
