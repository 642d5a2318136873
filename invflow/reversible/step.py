"""A layer as one step of a chain that computes its states again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ..bijection import Bijection, Replay, Retraced

Backprop: TypeAlias = Literal["stored", "reversible", "checkpoint"]
POLICIES = ("stored", "reversible", "checkpoint")


Outcome: TypeAlias = tuple[Any, Tensor | None]
"""A step's output and its log-determinant, None where that was not asked for."""


@dataclass(slots=True)
class Step:
    """A layer with its place and its direction.

    Attributes:
        name: where the layer stands in the chain, as in its ``state_dict``: ``layers.3``, ``layers.1.layers.0``.
        layer: the bijection.
        reversible: whether its input is computed again by inverting it; else the input is kept.
        backwards: whether the step is the layer's inverse.
    """

    name: str
    layer: Bijection
    reversible: bool
    backwards: bool

    def __str__(self) -> str:
        return f"{self.name}, {'the inverse of ' if self.backwards else ''}{self.layer!r}"

    def forward(self, x: Any, context: Tensor | None, log_det: bool) -> Outcome:
        """The step's output, and its log-determinant where that is asked for."""
        if self.backwards:
            return self.layer.inverse_and_log_det(x, context) if log_det else (self.layer.inverse(x, context), None)
        return self.layer.forward_and_log_det(x, context) if log_det else (self.layer(x, context), None)

    def inverse(self, y: Any, context: Tensor | None) -> Any:
        """The step's input."""
        return self.layer(y, context) if self.backwards else self.layer.inverse(y, context)

    def retrace(self, y: Any, context: Tensor | None, replay: Replay, log_det: bool) -> Retraced:
        """See `Bijection.retrace`."""
        retrace = self.layer.retrace_inverse if self.backwards else self.layer.retrace
        return retrace(y, context, replay, log_det=log_det)
