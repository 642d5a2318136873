"""Steps: the layers of a chain, taken apart until none is made of others, each with its place and its direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .arguments import one_line
from .bijection import Bijection
from .context import Context, Names, seen
from .errors import ShapeError
from .state import Path, Shape, part_of, with_part
from .wires import Ask, Outcome, Wire, Wired, call, shape_after


@dataclass(slots=True)
class Step:
    """A layer that is taken apart no further, with its place in a chain and its direction.

    Attributes:
        name: the layer's name in the chain's ``state_dict``: ``layers.3``, ``layers.1.layer@0.layers.2``.
        layer: the bijection.
        path: the part of the chain's state that it acts on.
        backwards: whether the step is the layer's inverse.
        reversible: whether training recomputes the input by inverting the layer; if not, the input is kept.
        within: what of the context each of the layers sees that hold this one, the outermost first.
    """

    name: str
    layer: Bijection
    path: Path
    backwards: bool
    reversible: bool
    within: tuple[Names, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}, {self.title}"

    @property
    def title(self) -> str:
        """What the step does, on one line."""
        return f"{'the inverse of ' if self.backwards else ''}{one_line(self.layer)}"

    def __post_init__(self) -> None:
        # A left inverse maps many inputs to one output.
        self.reversible = self.reversible and (self.layer.surjective or not self.backwards)

    def turned(self, invertible: bool) -> Step:
        """The step of the inverse that undoes this one."""
        reversible = invertible and self.layer.cheap_inverse
        return Step(self.name, self.layer, self.path, not self.backwards, reversible, self.within)

    def around(self, context: Any) -> Any:
        """What of the chain's context, or of its shape, the layers see that hold this one."""
        for names in self.within:
            context = seen(context, names)
        return context

    def forward(self, state: Any, context: Context, log_det: bool) -> Outcome:
        """The whole state after the step, and the log-determinant if ``log_det`` is set."""
        made, change = self.of_part(part_of(state, self.path), context, log_det)
        return with_part(state, self.path, made), change

    def after(self, state: Any, context: Context) -> Any:
        """The whole state after the step, without the log-determinant."""
        return self.forward(state, context, log_det=False)[0]

    def before(self, state: Any, context: Context) -> Any:
        """The whole state before the step, recovered from the state after it."""
        part = part_of(state, self.path)
        before, _ = call(self.layer, part, self.around(context), log_det=False, backwards=not self.backwards)
        return with_part(state, self.path, before)

    def of_part(self, part: Any, context: Context, log_det: bool) -> Outcome:
        """The step applied to its part of the state."""
        return call(self.layer, part, self.around(context), log_det, self.backwards)

    def shape_after(self, shape: Shape) -> Shape:
        """The shape of the whole state after the step."""
        part = shape_after(self.layer, part_of(shape, self.path), self.backwards)
        return with_part(shape, self.path, part)  # type: ignore[no-any-return]


def steps_of(bijection: Bijection, shape: Shape) -> list[Step]:
    """The steps that a bijection consists of; a single one if it is not made of others.

    Args:
        bijection: the bijection to take apart.
        shape: of the input.
    """
    if isinstance(bijection, Wired) and bijection.taken_apart:
        return steps_inside(bijection, shape, backwards=False, invertible=True)
    return [Step("", bijection, (), False, bijection.cheap_inverse)]


def steps_inside(bijection: Wired, shape: Shape | None, *, backwards: bool, invertible: bool) -> list[Step]:
    """The steps that the layers of a bijection consist of, in the order in which they run.

    Args:
        bijection: the bijection to take apart, whatever else it does to the state.
        shape: of the input; of the input of `inverse` if ``backwards``. None is enough unless a layer needs it, as
            `each` does.
        backwards: whether to return the steps of the inverse.
        invertible: whether training may invert cheap layers rather than keep their inputs.

    Raises:
        ShapeError: the shape is needed and missing, or does not fit.
    """

    def told() -> Shape:
        if shape is None:
            raise ShapeError(f"the steps of {bijection.tag} depend on the shape of the state: pass it as shape")
        return shape

    return list(_inside(bijection, "", (), backwards, invertible, told, ()))


def _inside(
    bijection: Wired,
    name: str,
    path: Path,
    backwards: bool,
    invertible: bool,
    shape: Ask,
    within: tuple[Names, ...],
) -> Iterator[Step]:
    against = backwards is not bijection.runs_backwards
    wires = bijection.wires(shape)
    flow = _Flow(shape, wires[::-1] if against else wires, against)
    for position, (inner, layer, place) in enumerate(flow.wires):
        inner = f"{name}.{inner}" if name else inner  # noqa: PLW2901 -- the same name, in full
        if isinstance(layer, Wired) and layer.taken_apart:
            further, told = invertible and layer.inverts, flow.asked(position)
            narrowed = within if layer.sees is ... else (*within, layer.sees)
            yield from _inside(layer, inner, path + place, against, further, told, narrowed)
        else:
            yield Step(inner, layer, path + place, against, invertible and layer.cheap_inverse, within)


class _Flow:
    """The shape of a state as it passes along wires, computed only as far as it is needed."""

    def __init__(self, shape: Ask, wires: list[Wire], backwards: bool) -> None:
        self.wires = wires
        self._start = shape
        self._backwards = backwards
        self._shape: Shape | None = None
        self._passed = 0

    def asked(self, position: int) -> Ask:
        """A function that returns the shape of the part that the wire at a position acts on."""
        return lambda: part_of(self._before(position), self.wires[position].path)

    def _before(self, position: int) -> Shape:
        shape = self._start() if self._shape is None else self._shape
        for wire in self.wires[self._passed : position]:
            shape = with_part(shape, wire.path, shape_after(wire.layer, part_of(shape, wire.path), self._backwards))
        self._shape, self._passed = shape, position
        return shape
