"""One layer, applied to every tensor of a tuple state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..bijection import Bijection
from ..errors import ShapeError
from ..registry import register
from ..state import Path, Shape, State, is_tensor_shape, leaf_paths, leaves
from ..wires import Ask, Wrapper


@register("each")
class Each(Wrapper):
    """Applies one layer, its parameters shared, to every tensor of a tuple state: ``(a, b) -> (f(a), f(b))``.

    The log-determinant is the sum over the tensors. The layer maps one tensor to one tensor.

    Args:
        layer: the bijection to apply.

    Examples:
        >>> from invflow.bijections import Psi
        >>> Each(Psi(2)).output_shape(((1, 4, 4), (3, 4, 4)))
        ((4, 2, 2), (12, 2, 2))
    """

    examples = [
        ({"layer": {"type": "psi", "block_size": 2}}, ((1, 2, 4), (3, 2, 4))),
        ({"layer": {"type": "permute", "seed": 3}}, ((3,), (3,))),
        (
            {
                "layer": {
                    "type": "sequential",
                    "layers": [
                        {"type": "split"},
                        {"type": "additive_coupling", "net": {"type": "mlp"}},
                        {"type": "merge"},
                    ],
                }
            },
            ((4,), (4,)),
        ),
    ]

    def __init__(self, layer: Bijection) -> None:
        super().__init__(layer)

    @classmethod
    def wiring(cls, count: int, shape: Ask, fields: Mapping[str, Any]) -> Sequence[tuple[int, Path]]:
        """The layer on each tensor."""
        of_state = shape()
        if is_tensor_shape(of_state):
            raise ShapeError(
                "each expects a tuple state, got one tensor; use the layer without each, or put a split before"
            )
        return [(0, path) for path in leaf_paths(of_state)]

    def lipschitz_bounds(self) -> tuple[float, float]:
        return self.layer.lipschitz_bounds()

    def _run(self, state: State, context: Tensor | None, *, log_det: bool, backwards: bool) -> tuple[Any, Any]:
        made, total = super()._run(state, context, log_det=log_det, backwards=backwards)
        if len(list(leaves(made))) != len(list(leaves(state))):
            raise _several_tensors("tuple")
        return made, total

    def _shape(self, shape: Shape, *, backwards: bool) -> Shape:
        found = super()._shape(shape, backwards=backwards)
        if len(leaf_paths(found)) != len(leaf_paths(shape)):
            raise _several_tensors(f"a state of shape {found}")
        return found


def _several_tensors(came: str) -> ShapeError:
    return ShapeError(f"each expects its layer to map one tensor to one tensor, got {came}")
