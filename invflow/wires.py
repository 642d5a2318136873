"""Wires: bijections that are made of others say which part of the state each of these acts on.

A *path* leads to a part of a state: ``()`` is all of it, ``(1,)`` the second of a tuple, ``(1, 0)`` the first of the
second. Every tool that looks into a chain goes over its *steps* (`invflow.steps`), so that no wrapper loses
what its contents promise.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

from ._torch import is_hooked, made_by_sharding
from .bijection import Bijection
from .context import Context, seen
from .errors import NumericsError, ShapeError
from .numerics.modes import LEVELS, NONE, Level, Limit, Mode, least
from .state import Path, Shape, State, part_of, shape_of, with_part, zero_log_det

Ask: TypeAlias = Callable[[], Shape]
"""Returns the shape of a state; it is computed only if it is needed."""

Outcome: TypeAlias = tuple[Any, Tensor | None]
"""A state and a log-determinant; the latter is None if it was not requested."""


class Wire(NamedTuple):
    """A layer and the part of the state that it acts on.

    Attributes:
        name: of the layer within its bijection, as in the ``state_dict``; followed by ``@0``, ``@1``, ... if layers act
            several times.
        layer: the layer.
        path: the place of the part within the state.
    """

    name: str
    layer: Bijection
    path: Path


class Wired(Bijection):
    """A bijection that consists of layers, each acting on its part of the state, one after another.

    A subclass defines `named_layers` and `wiring`; everything else follows from them, and may be overridden.

    Attributes:
        runs_backwards: whether the layers are run, and built from a spec, in the inverse direction.
    """

    runs_backwards: ClassVar[bool] = False
    volume_preserving = False
    _is_its_wires: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        overridden = own.keys() & {"forward", "inverse", "forward_and_log_det", "inverse_and_log_det"}
        if overridden and "_is_its_wires" not in own and not made_by_sharding(cls):
            cls._is_its_wires = False  # it may do more than its layers do

    # --------------------------------------------------------------- The wires

    @abstractmethod
    def named_layers(self) -> list[tuple[str, Bijection]]:
        """The layers with their names in the ``state_dict``, in the order of the constructor's parameters."""

    def inner_layers(self) -> list[Bijection]:
        """The layers without their names, which take time in every call."""
        return [layer for _, layer in self.named_layers()]

    @classmethod
    @abstractmethod
    def wiring(cls, count: int, shape: Ask, fields: Mapping[str, Any]) -> Sequence[tuple[int, Path]]:
        """The wires in forward order, each the position of a layer and the path of the part that it acts on.

        The wires must be the same whether ``shape`` describes an input or the output that belongs to it.

        Args:
            count: the number of layers.
            shape: returns the shape of the state.
            fields: the bijection's own plain fields by name: its JSON fields in a spec, its attributes in a module,
                which must have the same names.

        Raises:
            ShapeError: the bijection takes no state of this shape.
        """

    @property
    def taken_apart(self) -> bool:
        """Whether its steps may replace it: nothing but its layers acts on the state."""
        return self._is_bare

    @property
    def _is_bare(self) -> bool:
        # A property of its own, because torch.compile cannot ask `super()` for one in every version.
        return self._is_its_wires and not is_hooked(self)

    @property
    def inverts(self) -> bool:
        """Whether constant-memory training may invert the layers rather than keep their inputs."""
        return True

    def wires(self, shape: Ask) -> list[Wire]:
        """The layers with the parts that they act on, in forward order."""
        named = self.named_layers()
        wiring = self.wiring(len(named), shape, vars(self))
        if len(wiring) <= len(named):
            return [Wire(*named[i], path) for i, path in wiring]
        times = [itertools.count() for _ in named]
        return [Wire(f"{named[i][0]}@{next(times[i])}", named[i][1], path) for i, path in wiring]

    # ----------------------------------------------------------------- The map

    def forward(self, x: Any, context: Context = None) -> Any:
        return self._run(x, context, log_det=False, backwards=False)[0]

    def inverse(self, y: Any, context: Context = None) -> Any:
        return self._run(y, context, log_det=False, backwards=True)[0]

    def forward_and_log_det(self, x: Any, context: Context = None) -> tuple[Any, Tensor]:
        return self._run(x, context, log_det=True, backwards=False)

    def inverse_and_log_det(self, y: Any, context: Context = None) -> tuple[Any, Tensor]:
        return self._run(y, context, log_det=True, backwards=True)

    def _run(self, given: State, context: Context, *, log_det: bool, backwards: bool) -> tuple[Any, Any]:
        """The state after all layers, and the log-determinant if ``log_det`` is set."""
        state, changes = given, []
        layers = self.inner_layers()
        wiring = self.wiring(len(layers), lambda: shape_of(given), vars(self))
        against = backwards is not self.runs_backwards
        path: Path = ()
        part: Any = given  # the part of the state at the path, which goes back into the state when the path changes
        for position, leads in reversed(wiring) if against else wiring:
            layer = layers[position]
            try:
                if leads != path:
                    state = with_part(state, path, part)
                    path, part = leads, part_of(state, leads)
                part, change = call(layer, part, context, log_det and not layer.volume_preserving, against)
            except (NumericsError, ShapeError) as error:
                self._blame(layer, error)
            if change is not None:
                changes.append(change)
        state = with_part(state, path, part)
        self._require_fit(given, state)
        return state, total(changes, given) if log_det else None

    def _require_fit(self, given: Any, made: Any) -> None:
        """Raises ShapeError if this bijection does not allow what its layers make of a state, or of a shape."""

    def _blame(self, layer: Bijection, error: Exception) -> NoReturn:
        """Raises the error of a layer, with its place if there are several."""
        raise error

    def output_shape(self, shape: Shape) -> Shape:
        return self._shape(shape, backwards=False)

    def input_shape(self, shape: Shape) -> Shape:
        return self._shape(shape, backwards=True)

    def _shape(self, given: Shape, *, backwards: bool) -> Shape:
        shape, wires = given, self.wires(lambda: given)
        against = backwards is not self.runs_backwards
        for wire in reversed(wires) if against else wires:
            try:
                shape = with_part(shape, wire.path, shape_after(wire.layer, part_of(shape, wire.path), against))
            except ShapeError as error:
                self._blame(wire.layer, error)
        self._require_fit(given, shape)
        return shape

    @torch.no_grad()
    def initialize(self, x: Any, context: Context = None) -> None:
        """Initialises each layer from the first input that reaches it, and stops after the last that needs it."""
        shape = shape_of(x)
        for wire in self.wires(lambda: shape) if self.awaits_data else ():
            part = part_of(x, wire.path)
            try:
                wire.layer.initialize(part, seen(context, wire.layer.sees))
            except (NumericsError, ShapeError) as error:
                self._blame(wire.layer, error)
            if not self.awaits_data:
                return
            x = with_part(x, wire.path, call(wire.layer, part, context, log_det=False, backwards=False)[0])

    # -------------------------------------------- What follows from its layers

    def set_numerics(self, numerics: Mode) -> None:
        for _, layer in self.named_layers():
            try:
                layer.set_numerics(numerics)
            except NumericsError as error:
                self._blame(layer, error)
        self.numerics = numerics

    @property
    def limit(self) -> Limit:
        return min((layer.limit for _, layer in self.named_layers()), key=_rank, default=NONE)

    @property
    def exactness(self) -> Level:
        return least(layer.exactness for _, layer in self.named_layers())

    @property
    def inverse_tolerance(self) -> float | None:
        return max((t for _, layer in self.named_layers() if (t := layer.inverse_tolerance) is not None), default=None)

    @property
    def log_det_is_estimated(self) -> bool:
        return any(layer.log_det_is_estimated for _, layer in self.named_layers())

    @property
    def surjective(self) -> bool:
        return all(layer.surjective for _, layer in self.named_layers())

    @property
    def invertible(self) -> bool:
        return all(layer.invertible for _, layer in self.named_layers())

    @property
    def cheap_inverse(self) -> bool:
        return all(layer.cheap_inverse for _, layer in self.named_layers())

    @property
    def domain(self) -> str:
        return next((layer.domain for _, layer in self.named_layers()), "reals")

    @property
    def codomain(self) -> str | None:
        ends = {end for _, layer in self.named_layers() for end in (layer.domain, layer.codomain)}
        return "reals" if ends <= {"reals"} else None

    @property
    def traceable(self) -> bool:
        return all(layer.traceable for _, layer in self.named_layers())

    @property
    def may_be_flat(self) -> bool:
        return any(layer.may_be_flat for _, layer in self.named_layers())

    @property
    def awaits_data(self) -> bool:
        return any(layer.awaits_data for _, layer in self.named_layers())


class Wrapper(Wired):
    """A bijection that applies one other bijection.

    Attributes:
        layer: the other bijection.
    """

    def __init__(self, layer: Bijection) -> None:
        super().__init__()
        self.layer = layer

    def named_layers(self) -> list[tuple[str, Bijection]]:
        return [("layer", self.layer)]

    @property
    def taken_apart(self) -> bool:
        """Only if it wraps a bijection of several steps: around a single layer it is one step."""
        return self._is_bare and isinstance(self.layer, Wired)


class Several(Wired):
    """A bijection that holds a list of other bijections.

    Args:
        *layers: the other bijections.

    Attributes:
        layers: the same, as an `nn.ModuleList`.
    """

    def __init__(self, *layers: Bijection) -> None:
        super().__init__()
        for position, layer in enumerate(layers):
            if not isinstance(layer, Bijection):
                raise ShapeError(f"{self.tag} expects bijections, got {type(layer).__name__} at position {position}")
        self.layers = nn.ModuleList(layers)

    def named_layers(self) -> list[tuple[str, Bijection]]:
        return [(f"layers.{position}", layer) for position, layer in enumerate(self.layers)]  # type: ignore[misc]

    def inner_layers(self) -> list[Bijection]:
        return [*self.layers]

    def lipschitz_bounds(self) -> tuple[float, float]:
        """The products of the layers' bounds, for layers that act one after another."""
        bounds = [layer.lipschitz_bounds() for _, layer in self.named_layers()]
        return math.prod(forward for forward, _ in bounds), math.prod(inverse for _, inverse in bounds)

    def _blame(self, layer: Bijection, error: Exception) -> NoReturn:
        position = next(i for i, other in enumerate(self.layers) if other is layer)
        kind = ShapeError if isinstance(error, ShapeError) else NumericsError
        raise kind(f"layer {position} of {len(self.layers)}: {error}") from error


def call(layer: Bijection, state: Any, context: Context, log_det: bool, backwards: bool) -> Outcome:
    """The output of a bijection, or of its inverse, and the log-determinant if ``log_det`` is set.

    The layer is handed what it sees of the context.
    """
    if context is not None and layer.sees is not ...:
        context = seen(context, layer.sees)
    if backwards:
        return layer.inverse_and_log_det(state, context) if log_det else (layer.inverse(state, context), None)
    return layer.forward_and_log_det(state, context) if log_det else (layer(state, context), None)


def total(log_dets: list[Tensor], state: State) -> Tensor:
    """The sum of log-determinants, in fewer operations than additions one by one; zeros for none."""
    if not log_dets:
        return zero_log_det(state)
    return torch.stack(log_dets).sum(0)


def shape_after(layer: Bijection, shape: Shape, backwards: bool) -> Shape:
    """The shape of the output of a bijection, or of its inverse, for a state of this shape."""
    return layer.input_shape(shape) if backwards else layer.output_shape(shape)


def _rank(limit: Limit) -> int:
    return LEVELS.index(limit.level)
