"""One layer, applied to every tensor of a tuple state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ShapeError
from ..registry import register
from ..state import Path, described, is_tensor_shape, leaf_paths
from ..wires import Ask, Wrapper

_COUPLED = [{"type": "split"}, {"type": "additive_coupling", "net": {"type": "mlp"}}, {"type": "merge"}]


@register("each")
class Each(Wrapper):
    """Applies one layer, its parameters shared, to every tensor of a tuple state: ``(a, b) -> (f(a), f(b))``.

    Use it where all tensors of a tuple need the same treatment, such as the two halves of a split.

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
        ({"layer": {"type": "sequential", "layers": _COUPLED}}, ((4,), (4,))),
    ]

    @classmethod
    def wiring(cls, count: int, shape: Ask, fields: Mapping[str, Any]) -> Sequence[tuple[int, Path]]:
        """The layer on each tensor."""
        of_state = shape()
        if is_tensor_shape(of_state):
            raise ShapeError(
                "each expects a tuple state, got one tensor; use the layer without each, or put a split before it"
            )
        return [(0, path) for path in leaf_paths(of_state)]

    def lipschitz_bounds(self) -> tuple[float, float]:
        return self.layer.lipschitz_bounds()

    def _require_fit(self, given: Any, made: Any) -> None:
        if len(leaf_paths(made)) != len(leaf_paths(given)):
            raise ShapeError(f"each expects its layer to map one tensor to one tensor, got a state {described(made)}")
