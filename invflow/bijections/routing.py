"""The parts that layers act on, and the order of the tensors of a tuple: enough to write any graph of bijections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import Field, NonNegativeInt

from ..bijection import Bijection, Rearrangement
from ..context import Context
from ..errors import InvflowError, ShapeError
from ..fields import shortened
from ..registry import register
from ..state import Path, Shape, described, is_tensor_shape, leaf_paths
from ..wires import Ask, Several

Group: TypeAlias = Annotated[list[NonNegativeInt], Field(min_length=2)]
Order: TypeAlias = Annotated[list[NonNegativeInt | Group], Field(min_length=2)]

_HALVES = [{"type": "permute", "seed": 1}, {"type": "split"}]


@register("parallel")
class Parallel(Several):
    """One layer for each part of a tuple: ``(a, b, ...) -> (f(a), g(b), ...)``.

    Use it for branches that need different layers.

    The log-determinant is the sum of theirs. A part may be a tuple itself, and a layer may turn a tensor into a tuple.

    Args:
        *layers: the bijections, one for each part, at least two.

    Raises:
        ShapeError: fewer than two layers.

    Examples:
        >>> from invflow.bijections import Psi, Split
        >>> Parallel(Psi(2), Split()).output_shape(((1, 4, 4), (2, 3, 3)))
        ((4, 2, 2), ((1, 3, 3), (1, 3, 3)))
    """

    examples = [
        ({"layers": [{"type": "affine"}, {"type": "sequential", "layers": _HALVES}]}, ((2,), (4,))),
        ({"layers": [{"type": "psi", "block_size": 2}, {"type": "actnorm"}]}, ((1, 2, 4), (3, 2))),
    ]

    def __init__(self, *layers: Bijection) -> None:
        super().__init__(*layers)
        _require_several(len(layers))

    @classmethod
    def wiring(cls, count: int, shape: Ask, fields: Mapping[str, Any]) -> Sequence[tuple[int, Path]]:
        """Layer i on part i."""
        _require_several(count)
        of_state = shape()
        if is_tensor_shape(of_state) or len(of_state) != count:
            raise ShapeError(f"parallel with {count} layers expects a tuple of {count} states, got shape {of_state}")
        return [(position, (position,)) for position in range(count)]

    @property
    def domain(self) -> str:
        """The intersection of the layers' domains, since the whole tuple has one domain."""
        domains = {layer.domain for _, layer in self.named_layers()} - {"reals"}
        return "reals" if not domains else domains.pop() if len(domains) == 1 else "unit"

    def lipschitz_bounds(self) -> tuple[float, float]:
        """The largest of the layers' bounds, since the parts are orthogonal."""
        forward, inverse = zip(*(layer.lipschitz_bounds() for _, layer in self.named_layers()), strict=True)
        return max(forward), max(inverse)


def _require_several(count: int) -> None:
    if count < 2:
        raise ShapeError(f"parallel expects at least two layers, one for each part of a tuple, got {count}")


@register("on")
class On(Several):
    """Layers, one after another, on one part of a tuple: ``(a, b) -> (a, f(b))``; the other parts stay unchanged.

    Use it in multi-scale networks, for the part of the state that goes on.

    A single tensor counts as the part itself, so that the same layers serve every level of a multi-scale network,
    whether anything was split off before or not; the layers must then return a single tensor.

    Args:
        *layers: the bijections, first applied first.
        index: the part, counted from 0, or from the end if negative.

    Examples:
        >>> from invflow.bijections import Psi
        >>> On(Psi(2), index=-1).output_shape(((3,), (1, 4, 4))), On(Psi(2)).output_shape((1, 4, 4))
        (((3,), (4, 2, 2)), (4, 2, 2))
    """

    examples = [
        ({"index": 0, "layers": [{"type": "psi", "block_size": 2}, {"type": "actnorm"}]}, ((1, 2, 4), (3,))),
        ({"layers": [{"type": "affine"}, {"type": "permute", "seed": 0}]}, (3, 2)),
        ({"index": -1, "layers": [{"type": "split"}]}, ((2,), (4,))),
    ]

    def __init__(self, *layers: Bijection, index: int = -1) -> None:
        super().__init__(*layers)
        self.index = index

    @classmethod
    def wiring(cls, count: int, shape: Ask, fields: Mapping[str, Any]) -> Sequence[tuple[int, Path]]:
        """Every layer on the part."""
        of_state, index = shape(), fields["index"]
        if is_tensor_shape(of_state):
            return [(position, ()) for position in range(count)]
        if not -len(of_state) <= index < len(of_state):
            raise ShapeError(f"on expects a tuple with a part {index}, got one of {len(of_state)}, shape {of_state}")
        return [(position, (index % len(of_state),)) for position in range(count)]

    def lipschitz_bounds(self) -> tuple[float, float]:
        """The products of the layers' bounds, and at least 1 for the parts that stay unchanged."""
        forward, inverse = super().lipschitz_bounds()
        return max(1.0, forward), max(1.0, inverse)

    def _require_fit(self, given: Any, made: Any) -> None:
        if leaf_paths(given) == [()] != leaf_paths(made):
            raise ShapeError(
                f"on expects its layers to turn a single tensor into one tensor, got a state {described(made)}"
            )


@register("exchange")
class Exchange(Rearrangement):
    """Reorders and regroups the parts of a tuple: part i of the output is part ``order[i]`` of the input.

    Use it to say which part meets which, in a graph of bijections with branches.

    A list within the order groups several parts: ``[[0, 2], 1]`` turns ``(a, b, c)`` into ``((a, c), b)``. The inverse
    undoes the grouping. Log-determinant 0.

    Args:
        order: the parts from 0, each once.

    Raises:
        InvflowError: the order omits a part, or names one twice.

    Examples:
        >>> Exchange(order=[[0, 2], 1]).output_shape(((1,), (2,), (3,)))
        (((1,), (3,)), (2,))
    """

    examples = [
        ({"order": [1, 0]}, ((2,), (3, 2))),
        ({"order": [[2, 0], 1]}, ((1, 2), (2,), ((3,), (2,)))),
    ]

    def __init__(self, order: Order) -> None:
        super().__init__()
        named = [part for entry in order for part in (entry if isinstance(entry, list) else [entry])]
        if sorted(named) != list(range(len(named))):
            raise InvflowError(
                f"exchange expects an order that holds each of 0 .. {len(named) - 1} once, got {shortened(order)}"
            )
        self.order = order
        self.count = len(named)

    def forward(self, x: Any, context: Context = None) -> Any:
        return self._exchanged(x)

    def inverse(self, y: Any, context: Context = None) -> Any:
        return self._put_back(y)

    def output_shape(self, shape: Shape) -> Shape:
        return self._exchanged(shape)  # type: ignore[no-any-return]

    def input_shape(self, shape: Shape) -> Shape:
        return self._put_back(shape)  # type: ignore[no-any-return]

    # These serve states and shapes alike.

    def _exchanged(self, whole: Any) -> Any:
        parts = _parts("exchange", whole, self.count)
        return tuple(
            tuple(parts[i] for i in entry) if isinstance(entry, list) else parts[entry] for entry in self.order
        )

    def _put_back(self, whole: Any) -> Any:
        who = "the inverse of exchange"
        found: dict[int, Any] = {}
        for entry, part in zip(self.order, _parts(who, whole, len(self.order)), strict=True):
            if isinstance(entry, list):
                found.update(zip(entry, _parts(who, part, len(entry)), strict=True))
            else:
                found[entry] = part
        return tuple(found[i] for i in range(self.count))


def _parts(who: str, whole: Any, count: int) -> tuple[Any, ...]:
    """A state or a shape, checked to be a tuple of this length."""
    if isinstance(whole, tuple) and not is_tensor_shape(whole) and len(whole) == count:
        return whole
    raise ShapeError(f"{who} expects a tuple of {count} states, got one {described(whole)}")
