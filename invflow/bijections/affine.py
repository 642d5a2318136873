"""A scale and a shift per channel."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..registry import register
from ..state import Shape, shape_of
from .channels import PerPosition, spread


class ScaleAndShift(PerPosition):
    """``y = exp(log_scale) * x + shift`` per channel; the log-determinant is ``sum(log_scale)`` times the positions."""

    learned: ClassVar[bool] = True
    """Whether the scale and the shift are parameters; if not, they are buffers."""

    log_scale: Tensor
    shift: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        for name in ("log_scale", "shift"):
            values = torch.zeros(self.channels)
            if self.learned:
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.output_shape(shape_of(x))
        return x * spread(self.log_scale.exp(), x) + spread(self.shift, x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        self.output_shape(shape_of(y))
        return (y - spread(self.shift, y)) * spread(torch.exp(-self.log_scale), y)

    @torch.no_grad()
    def lipschitz_bounds(self) -> tuple[float, float]:
        """The largest scale, and 1 over the smallest."""
        return float(self.log_scale.max().exp()), float(torch.exp(-self.log_scale.min()))

    def log_abs_det(self) -> Tensor:
        return self.log_scale.sum()


@register("affine")
class Affine(ScaleAndShift):
    """``y = exp(log_scale) * x + shift``, both learned, one pair per channel.

    The log-determinant is ``height * width * sum(log_scale)``. It starts as the identity.

    Args:
        shape: the incoming shape, channels first.

    Examples:
        >>> Affine(shape=(3, 4, 4)).forward_and_log_det(torch.ones(1, 3, 4, 4))[1].tolist()
        [0.0]
    """

    examples = [({}, (3,)), ({}, (2, 3, 2))]
