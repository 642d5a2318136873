"""Any bijection with its directions exchanged."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..bijection import Bijection, Replay, Retraced
from ..errors import InvflowError
from ..registry import register
from ..state import Shape
from .wrapper import Wrapper


@register("inverse")
class Inverse(Wrapper):
    """The inverse of a bijection, as a bijection: ``y = layer.inverse(x)``. ``Inverse(Inverse(b))`` is ``b``.

    Args:
        layer: the bijection to run backwards.

    >>> from invflow.bijections import Psi
    >>> Inverse(Psi(2)).output_shape((4, 7, 7))
    (1, 14, 14)
    """

    examples = [
        ({"layer": {"type": "psi", "block_size": 2}}, (4, 2, 3)),
        ({"layer": {"type": "split"}}, ((1, 2), (2, 2))),
        ({"layer": {"type": "additive_coupling", "net": {"type": "mlp"}}}, ((3,), (2,))),
    ]

    def __new__(cls, layer: Bijection | None = None) -> Any:  # unpickling calls it without a layer
        return layer.layer if isinstance(layer, Inverse) else super().__new__(cls)

    def __init__(self, layer: Bijection) -> None:
        super().__init__(layer)

    def lipschitz_bounds(self) -> tuple[float, float]:
        forward, inverse = self.layer.lipschitz_bounds()
        return inverse, forward

    def initialize(self, x: Any, context: Tensor | None = None) -> None:
        """Refuses: what a layer is to be initialised from is the inverse's output, which does not exist yet."""
        if self.awaits_data:
            raise InvflowError("a layer run backwards cannot be initialised from data; initialise it, then invert it")

    def forward(self, x: Any, context: Tensor | None = None) -> Any:
        return self.layer.inverse(x, context)

    def inverse(self, y: Any, context: Tensor | None = None) -> Any:
        return self.layer(y, context)

    def forward_and_log_det(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return self.layer.inverse_and_log_det(x, context)

    def inverse_and_log_det(self, y: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return self.layer.forward_and_log_det(y, context)

    def retrace(self, y: Any, context: Tensor | None, replay: Replay, *, log_det: bool) -> Retraced:
        return self.layer.retrace_inverse(y, context, replay, log_det=log_det)

    def retrace_inverse(self, x: Any, context: Tensor | None, replay: Replay, *, log_det: bool) -> Retraced:
        return self.layer.retrace(x, context, replay, log_det=log_det)

    def output_shape(self, shape: Shape) -> Shape:
        return self.layer.input_shape(shape)

    def input_shape(self, shape: Shape) -> Shape:
        return self.layer.output_shape(shape)
