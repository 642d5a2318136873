"""One layer, applied to every tensor of a tuple state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..bijection import Bijection
from ..errors import ShapeError
from ..registry import register
from ..state import Shape, State, is_tensor_shape, leaf_shapes, leaves, zero_log_det
from .wrapper import Wrapper


@register("each")
class Each(Wrapper):
    """Applies one layer, its parameters shared, to every tensor of a tuple state: ``(a, b) -> (f(a), f(b))``.

    The log-determinant is the sum over the tensors. The layer maps one tensor to one tensor.

    Args:
        layer: the bijection to apply.

    >>> from invflow.bijections import Psi
    >>> Each(Psi(2)).output_shape(((1, 4, 4), (3, 4, 4)))
    ((4, 2, 2), (12, 2, 2))
    """

    examples = [
        ({"layer": {"type": "psi", "block_size": 2}}, ((1, 2, 4), (3, 2, 4))),
        ({"layer": {"type": "permute", "seed": 3}}, ((3,), (3,))),
    ]

    def __init__(self, layer: Bijection) -> None:
        super().__init__(layer)

    def lipschitz_bounds(self) -> tuple[float, float]:
        return self.layer.lipschitz_bounds()

    def initialize(self, x: State, context: Tensor | None = None) -> None:
        """Initialises the layer from the first tensor, whose shape it was built for."""
        self.layer.initialize(next(leaves(x)), context)

    @staticmethod
    def layer_shape(shape: Shape) -> Shape:
        """The shape that the layer is built for: the first tensor's."""
        _require_tuple(is_tensor_shape(shape))
        return next(leaf_shapes(shape))

    def forward(self, x: State, context: Tensor | None = None) -> Any:
        return _map(lambda leaf: self.layer(leaf, context), x)

    def inverse(self, y: State, context: Tensor | None = None) -> Any:
        return _map(lambda leaf: self.layer.inverse(leaf, context), y)

    def forward_and_log_det(self, x: State, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return _map_and_sum(lambda leaf: self.layer.forward_and_log_det(leaf, context), x)

    def inverse_and_log_det(self, y: State, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return _map_and_sum(lambda leaf: self.layer.inverse_and_log_det(leaf, context), y)

    def output_shape(self, shape: Shape) -> Shape:
        return _map_shape(self.layer.output_shape, shape)

    def input_shape(self, shape: Shape) -> Shape:
        return _map_shape(self.layer.input_shape, shape)


def _require_tuple(is_tensor: bool) -> None:
    if is_tensor:
        raise ShapeError(
            "each expects a tuple state, got one tensor; use the layer without each, or put a split before"
        )


def _require_tensor(result: object, is_tensor: bool) -> None:
    if not is_tensor:
        raise ShapeError(f"each expects its layer to map one tensor to one tensor, got {result}")


def _map(function: Callable[[Tensor], Any], state: State) -> Any:
    _require_tuple(isinstance(state, Tensor))
    return _map_leaves(function, state)


def _map_leaves(function: Callable[[Tensor], Any], state: State) -> Any:
    if isinstance(state, tuple):
        return tuple(_map_leaves(function, part) for part in state)
    result = function(state)
    _require_tensor(type(result).__name__, isinstance(result, Tensor))
    return result


def _map_and_sum(function: Callable[[Tensor], tuple[Any, Tensor]], state: State) -> tuple[Any, Tensor]:
    total = zero_log_det(state)

    def map_one(leaf: Tensor) -> Any:
        nonlocal total
        result, log_det = function(leaf)
        total = total + log_det
        return result

    return _map(map_one, state), total


def _map_shape(function: Callable[[Shape], Shape], shape: Shape) -> Shape:
    _require_tuple(is_tensor_shape(shape))

    def map_part(part: Shape) -> Shape:
        if not is_tensor_shape(part):
            return tuple(map_part(inner) for inner in part)  # type: ignore[arg-type]
        result = function(part)
        _require_tensor(result, is_tensor_shape(result))
        return result

    return map_part(shape)
