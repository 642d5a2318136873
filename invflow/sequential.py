"""Chains of bijections."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from .bijection import Bijection
from .bijections.inverse import Inverse
from .errors import NumericsError, ShapeError
from .numerics.modes import FLOAT, NONE, Level, Limit, Mode, Numerics, least
from .registry import register
from .reversible import Backprop, Monitor, Reconstruction, run_chain
from .state import Path, Shape, State, TensorShape, shape_of, zero_log_det
from .wires import Ask, Step, Wired, steps_inside


@register("sequential")
class Sequential(Wired):
    """A chain in data order: ``Sequential(a, b, c)(x) == c(b(a(x)))``; its log-determinant is the sum of theirs.

    Chains nest, and behave as sequences: ``len``, iteration, ``chain[2]``, ``chain[1:3]`` (a chain that shares its
    layers with this one), ``chain[::-1]`` (the inverse chain).

    Args:
        *layers: the bijections, first applied first; none of them is the identity.
        backprop: what training keeps of the states in between: "stored" all of them, "reversible" none of those that
            are cheap to compute again by inverting, "checkpoint" the inputs of the layers.
        monitor: what "reversible" does where a layer's input comes back wrong, as some numbers kept of it tell:
            "warn", "raise" an error, "anchor" (keep that input from then on); "off" keeps and compares nothing.
        numerics: how exact the inverse has to be: ``{"mode": "float"}``, or "snap", "grid", "exact" with their options;
            every layer is asked for it, and has to be able to give it. In "exact", conditioners become integer ones.

    Attributes:
        reconstruction: what the monitor found in backward, layer by layer, and the anchors.
        declared_shape: the input shape that the chain was built for from a spec, else None.
        declared_context_shape: likewise the shape of the context.
        own_numerics: the numerics it was made with; ``numerics`` may be those of a chain around it.

    Examples:
        >>> from invflow.bijections import Psi, Split
        >>> chain = Sequential(Psi(2), Split())
        >>> chain.output_shape((1, 4, 4))
        ((2, 2, 2), (2, 2, 2))
        >>> chain[::-1].output_shape(((2, 2, 2), (2, 2, 2)))
        (1, 4, 4)
    """

    examples = [
        ({"layers": []}, (2, 3)),
        (
            {
                "layers": [
                    {"type": "split"},
                    {"type": "additive_coupling", "net": {"type": "mlp"}},
                    {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [3]}},
                    {"type": "merge"},
                ]
            },
            (5,),
        ),
    ]

    _is_its_wires = True  # the loops below do what wires do, and name the layer that complains
    declared_shape: Shape | None = None
    declared_context_shape: TensorShape | None = None

    def __init__(
        self,
        *layers: Bijection,
        backprop: Backprop = "stored",
        monitor: Monitor = "warn",
        numerics: Numerics = FLOAT,
    ) -> None:
        super().__init__()
        for position, layer in enumerate(layers):
            if not isinstance(layer, Bijection):
                raise ShapeError(f"Sequential expects bijections, got {type(layer).__name__} at position {position}")
        self.layers = nn.ModuleList(layers)
        self.backprop = backprop
        self.own_numerics = numerics
        if numerics.on_grid:
            self.set_numerics(numerics)
        self.numerics = numerics
        self.monitor = monitor
        self.reconstruction = Reconstruction()

    def named_layers(self) -> list[tuple[str, Bijection]]:
        return [(f"layers.{position}", layer) for position, layer in enumerate(self)]

    @classmethod
    def wiring(cls, count: int, shape: Ask, fields: Mapping[str, Any]) -> Sequence[tuple[int, Path]]:
        """Every layer on all of the state."""
        return [(position, ()) for position in range(count)]

    @property
    def taken_apart(self) -> bool:
        return super().taken_apart and self.own_numerics == FLOAT

    @property
    def inverts(self) -> bool:
        return self.backprop != "checkpoint"

    @property
    def limit(self) -> Limit:
        own = self.numerics.limit
        return own if own != NONE else super().limit

    @property
    def exactness(self) -> Level:
        return least([self.numerics.limit.level, super().exactness])

    def set_numerics(self, numerics: Mode) -> None:
        """Sets the numerics of every layer, as a chain around this one asks.

        Raises:
            NumericsError: a layer cannot give them, or this chain has others of its own.
        """
        if self.own_numerics not in (FLOAT, numerics):
            raise NumericsError(
                f"sequential has numerics of its own, {self.own_numerics.model_dump()}, in a chain with "
                f"{numerics.model_dump()}; name them once, at the chain outside"
            )
        for position, layer in enumerate(self):
            try:
                layer.set_numerics(numerics)
            except NumericsError as error:
                raise NumericsError(f"layer {position} of {len(self)}: {error}") from error
        self.numerics = numerics

    @property
    def cheap_inverse(self) -> bool:
        return not self.numerics.rounds and super().cheap_inverse

    def forward(self, x: Any, context: Tensor | None = None) -> Any:
        x = self.numerics.enter(x)
        if self.backprop != "stored" and torch.is_grad_enabled():
            return self._recomputed(x, context, log_det=False)[0]
        try:
            for layer in self.layers:
                x = layer(x, context)
        except NumericsError as error:
            raise self._located(layer, error) from error
        return x

    def inverse(self, y: Any, context: Tensor | None = None) -> Any:
        y = self.numerics.enter(y)
        if self.backprop != "stored" and torch.is_grad_enabled():
            return self.numerics.leave(self._recomputed(y, context, log_det=False, backwards=True)[0])
        try:
            for layer in reversed(list(self)):
                y = layer.inverse(y, context)
        except NumericsError as error:
            raise self._located(layer, error) from error
        return self.numerics.leave(y)

    def _located(self, layer: nn.Module, error: NumericsError) -> NumericsError:
        position = next(i for i, other in enumerate(self.layers) if other is layer)
        return NumericsError(f"layer {position} of {len(self)}: {error}")

    def forward_and_log_det(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        x = self.numerics.enter(x)
        if self.backprop != "stored" and torch.is_grad_enabled():
            return self._recomputed(x, context, log_det=True)
        total = zero_log_det(x)
        try:
            for layer in self:
                x, log_det = layer.forward_and_log_det(x, context)
                total = total + log_det
        except NumericsError as error:
            raise self._located(layer, error) from error
        return x, total

    def inverse_and_log_det(self, y: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        y = self.numerics.enter(y)
        if self.backprop != "stored" and torch.is_grad_enabled():
            x, log_det = self._recomputed(y, context, log_det=True, backwards=True)
            return self.numerics.leave(x), log_det
        total = zero_log_det(y)
        try:
            for layer in reversed(list(self)):
                y, log_det = layer.inverse_and_log_det(y, context)
                total = total + log_det
        except NumericsError as error:
            raise self._located(layer, error) from error
        return self.numerics.leave(y), total

    def lipschitz_bounds(self) -> tuple[float, float]:
        """The products of the layers'."""
        bounds = [layer.lipschitz_bounds() for layer in self]
        return math.prod(forward for forward, _ in bounds), math.prod(inverse for _, inverse in bounds)

    def steps(self, shape: Shape | None = None, *, backwards: bool = False) -> list[Step]:
        """The chain taken apart, each step with what constant-memory training does about its input.

        Args:
            shape: of the state that goes in; if ``backwards``, of the one that `inverse` is given. Without, it is the
                one that the chain was built for; a chain of nothing but layers and chains needs none.
            backwards: whether these are to be the steps of the inverse.
        """
        if not self._is_its_wires:  # a subclass that does more
            return [Step("", self, (), backwards, self.cheap_inverse)]
        return self._steps(shape, backwards)

    def _steps(self, shape: Shape | None, backwards: bool) -> list[Step]:
        invertible = self.backprop == "reversible"
        if backwards and self.declared_shape is not None:
            # Read off the forward, which asks the layers for no more than they had to tell when the chain was built.
            forwards = steps_inside(self, self.declared_shape, backwards=False, invertible=invertible)
            found = [step.turned(invertible and step.reversible) for step in reversed(forwards)]
        else:
            told = self.declared_shape if shape is None else shape
            found = steps_inside(self, told, backwards=backwards, invertible=invertible)
        for step in found if self.reconstruction.anchors else ():
            step.reversible = step.reversible and step.name not in self.reconstruction.anchors
        return found

    def _recomputed(self, x: Any, context: Tensor | None, *, log_det: bool, backwards: bool = False) -> tuple[Any, Any]:
        """The chain, or its inverse, under a policy that does not keep all states."""
        steps = self._steps(shape_of(x), backwards)
        return run_chain(steps, x, context, log_det=log_det, monitor=self.monitor, record=self.reconstruction)

    def trace(self, x: State, context: Tensor | None = None) -> list[State]:
        """Every intermediate state: the input, then what each of the `steps` makes of it."""
        states = [self.numerics.enter(x)]
        for step in self.steps(shape_of(x)):
            states.append(step.after(states[-1], context))
        return states

    def output_shape(self, shape: Shape) -> Shape:
        for position, layer in enumerate(self):
            try:
                shape = layer.output_shape(shape)
            except ShapeError as error:
                raise ShapeError(f"layer {position} of {len(self)}: {error}") from error
        return shape

    def input_shape(self, shape: Shape) -> Shape:
        for position, layer in reversed(list(enumerate(self))):
            try:
                shape = layer.input_shape(shape)
            except ShapeError as error:
                raise ShapeError(f"layer {position} of {len(self)}: {error}") from error
        return shape

    def shapes(self, shape: Shape) -> list[Shape]:
        """The shape of every state of `trace`, for an input of this shape."""
        found = [shape]
        for step in self.steps(shape):
            found.append(step.shape_after(found[-1]))
        return found

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.layers)  # type: ignore[arg-type]

    @overload
    def __getitem__(self, index: int) -> Bijection: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Bijection:
        layers = list(self)
        if not isinstance(index, slice):
            return layers[index]
        if index.step not in (None, 1, -1):
            raise ShapeError(f"a slice of a Sequential expects step 1 or -1 (the inverse chain), got {index.step}")
        forwards = sorted(range(len(layers))[index])
        # Data lie on their grid where the chain begins, and nowhere else.
        snaps = self.numerics.about_data and forwards[:1] == [0]
        numerics: Any = FLOAT if self.numerics.about_data and not snaps else self.numerics
        if index.step == -1 and not snaps:
            backwards = (Inverse(layers[i]) for i in reversed(forwards))
            return Sequential(*backwards, backprop=self.backprop, monitor=self.monitor, numerics=numerics)
        inside = (layers[i] for i in forwards)
        part = Sequential(*inside, backprop=self.backprop, monitor=self.monitor, numerics=numerics)
        return part if index.step != -1 else Sequential(Inverse(part), backprop=self.backprop, monitor=self.monitor)

    def __repr__(self) -> str:
        """One layer a line, with the shapes as they flow where the input's is known."""
        lines = _lines(self, self.declared_shape)
        width = max(len(text) for text, _ in lines)
        return "\n".join(text if shape is None else f"{text:<{width}}  {shape}" for text, shape in lines)


def _lines(chain: Sequential, shape: Shape | None) -> list[tuple[str, Shape | None]]:
    """Each line of a chain's repr with the shape of the state after it."""
    lines: list[tuple[str, Shape | None]] = [("Sequential(", shape)]
    for position, layer in enumerate(chain):
        start = f"  ({position}): "
        if isinstance(layer, Sequential):
            first, *others = _lines(layer, shape)
            lines += [(start + first[0], first[1]), *(("  " + text, after) for text, after in others)]
            shape = None if shape is None else layer.output_shape(shape)
        else:
            shape = None if shape is None else layer.output_shape(shape)
            lines.append((start + repr(layer), shape))
    return [*lines, (")", None)] if len(chain) else [("Sequential()", shape)]
