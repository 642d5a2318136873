"""From a validated spec to modules: shapes flow through the layers, and each layer is built for the shape it gets."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..bijection import Bijection
from ..errors import InvflowError, ShapeError
from ..models import Classifier, ContextNet, Dequantizer, Flow, Hybrid, Prior
from ..models.levels import shape_of_others
from ..numerics.modes import FLOAT
from ..sequential import Sequential
from ..state import Shape, is_tensor_shape
from .document import Spec, SpecSource, load_spec
from .layers import LayerBuilder, numbers_of
from .limits import DEFAULT_LIMITS, Limits
from .nodes import Node
from .text import JsonPath


def build(source: SpecSource, *, limits: Limits = DEFAULT_LIMITS) -> Sequential:
    """The chain of bijections that a spec describes, without its head or prior.

    If the spec has a context_net, the chain is given what that makes of the context.

    Args:
        source: a file's path, a dict, or a Spec.
        limits: the bounds that the spec must respect; they are checked before memory is allocated.

    Raises:
        SpecError: with the place of every fault.

    Examples:
        >>> chain = build({"input": {"shape": [1, 4, 4]}, "layers": [{"type": "psi", "block_size": 2}]})
        >>> chain.output_shape((1, 4, 4))
        (4, 2, 2)
    """
    return _build(load_spec(source, limits=limits), limits).chain


def build_model(source: SpecSource, *, limits: Limits = DEFAULT_LIMITS) -> Classifier | Flow:
    """The model that a spec describes: its chain with its head, a `Classifier`, with its prior, a `Flow`, or with both.

    Raises:
        SpecError: with the place of every fault; also if the spec has neither.

    Examples:
        >>> flow = build_model({"input": {"shape": [2]}, "layers": [], "prior": {"type": "standard_normal"}})
        >>> type(flow).__name__, flow.shape
        ('Flow', (2,))
    """
    spec = load_spec(source, limits=limits)
    built = _build(spec, limits)
    if built.head is None and built.prior is None:
        raise spec.error((), "a model needs a head or a prior, the spec has neither; use build to get only the chain")
    try:
        if built.prior is None:
            return Classifier(built.chain, cast(nn.Module, built.head), built.context_net)
        more = built.context_net, built.dequantizer
        if built.head is None:
            return Flow(built.chain, built.prior, *more)
        return Hybrid(built.chain, built.head, built.prior, *more)
    except InvflowError as error:
        place = ("prior",) if isinstance(error, ShapeError) else ("head",)
        raise spec.error(place, error) from error


def count(spec: Spec, limits: Limits = DEFAULT_LIMITS) -> _Builder:
    """The cost of a spec's model, counted on the meta device: faults and sizes show before memory is allocated."""
    builder = _Builder(spec, limits, count=True)
    with torch.device("meta"):
        builder.everything()
    return builder


class Built(NamedTuple):
    """What a spec describes."""

    chain: Sequential
    head: nn.Module | None
    prior: Prior | None
    context_net: ContextNet | None
    dequantizer: Dequantizer | None


def _build(spec: Spec, limits: Limits) -> Built:
    count(spec, limits)
    return _Builder(spec, limits, count=False).everything()


class _Builder(LayerBuilder):
    """Constructs the modules of one spec: the chain, and what stands on it and beside it."""

    def everything(self) -> Built:
        shape = self.spec.input_shape
        self.check_state(shape, ("input", "shape"))
        self.check_context(self.context, ("input", "context_shape"))
        context_net = self._context_net() if self.spec.context_nets else None
        if context_net is not None:
            self.context = context_net.made_shape
            self.check_context(self.context, ("context_net",))
        layers: list[Bijection] = []
        for i, node in enumerate(self.spec.layers):
            layer, shape = (self.count_layer if self.count else self.layer)(node, ("layers", i), shape)
            layers.append(layer)
        top = self.spec.top
        try:
            chain = Sequential(*layers, backprop=top.backprop, monitor=top.monitor, numerics=top.numerics)
        except InvflowError as error:
            raise self.error(("numerics",), error) from error
        chain.declared_shape, chain.declared_output_shape = self.spec.input_shape, shape
        chain.declared_context_shape = self.context
        above: dict[str, Any] = {"head": None, "prior": None}
        for name, document in (("head", self.spec.head), ("prior", self.spec.prior)):
            if document is not None:
                self.context = self.spec.context_shape
                with self.seeing(document, (name,)):
                    filled = {"shape": shape, "context_shape": self.context}
                    if name == "prior":
                        filled["shape"] = self._without_levels(chain, shape)
                    above[name] = self.construct(document, (name,), filled, {})
                if self.count:
                    self.spend_parameters(numbers_of(above[name]), (name,))
        dequantizer = None if self.spec.dequantization is None else self._dequantizer(self.spec.dequantization)
        return Built(chain, **above, context_net=context_net, dequantizer=dequantizer)

    def _without_levels(self, chain: Sequential, shape: Shape) -> Shape:
        """The shape of what the prior has parameters for: on a grid, the nets of `factor_out` have the others."""
        try:
            return shape_of_others(chain, shape)
        except InvflowError as error:
            raise self.error(("prior",), error) from error

    def _dequantizer(self, node: Node) -> Dequantizer:
        """The flow of the noise of pixels, which are its context."""
        shape, place = self.spec.input_shape, ("dequantization",)
        if not is_tensor_shape(shape):
            raise self.error(place, f"dequantization is for images, got a tuple state of shape {shape}")
        self.numerics, self.context = FLOAT, shape
        layer, after = (self.count_layer if self.count else self.layer)(node, place, shape)
        if after != shape:
            raise self.error(place, f"dequantization must map {shape} to {shape}, but returns {after}")
        if layer.numerics != FLOAT:
            raise self.error(place, f"dequantization is for float numerics, got {layer.numerics.model_dump()}")
        try:
            return Dequantizer(layer)
        except InvflowError as error:
            raise self.error(place, error) from error

    def _context_net(self) -> ContextNet:
        """The net from the context to what the layers see."""
        place: JsonPath = ("context_net",)
        if self.context is None:
            raise self.error(place, "a context_net expects a context: give the input a context_shape")
        if self.numerics.integer_nets:
            message = "exact numerics cannot have a context_net, whose floating-point output depends on the batch"
            raise self.error(place, message)
        made = {}
        for name, node in self.spec.context_nets.items():
            path = (*place, name) if name else place
            with self.seeing(node.net, path):
                if not isinstance(self.context, tuple):
                    came = "none" if self.context is None else ", ".join(map(repr, self.context))
                    message = f'a context_net takes one entry of the context, got {came}; name it, as "context"'
                    raise self.error(path, message)
                filled = {"in_shape": self.context, "out_shape": node.out_shape}
                self.context = None  # the net is called with what it sees, and with nothing beside
                made[name] = self.construct(node.net, path, filled, {})
                self.check_net(node.net, path, made[name], filled["in_shape"], node.out_shape)
            if self.count:
                self.spend_parameters(numbers_of(made[name]), path)
        out_shapes = {name: node.out_shape for name, node in self.spec.context_nets.items()}
        return ContextNet(made, out_shapes, self.context)
