"""A scale and a shift per channel."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..registry import register
from ..state import Shape
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
        self.require(x)
        return torch.addcmul(spread(self.shift, x), x, spread(self.log_scales().exp(), x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        self.require(y)
        return (y - spread(self.shift, y)) * spread(torch.exp(-self.log_scales()), y)

    def log_abs_det(self) -> Tensor:
        return self.log_scales().sum()

    def log_scales(self) -> Tensor:
        """The log-scales, cut where their exponentials would overflow, because zeros times infinity are no numbers."""
        farthest = math.floor(math.log(torch.finfo(self.log_scale.dtype).max))
        return self.log_scale.clamp(-farthest, farthest)

    @torch.no_grad()
    def lipschitz_bounds(self) -> tuple[float, float]:
        """The largest scale, and 1 over the smallest."""
        log_scales = self.log_scales()
        return float(log_scales.max().exp()), float(torch.exp(-log_scales.min()))


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
