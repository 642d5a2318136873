"""A scale and a shift per channel."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..context import Context
from ..registry import register
from ..state import Shape
from .channels import OfChannels, everywhere, spread

_FARTHEST = {
    t: math.floor(math.log(torch.finfo(t).max)) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
"""Where the exponentials of log-scales would overflow; and zeros times infinity are no numbers."""


class ScaleAndShift(OfChannels):
    """``y = exp(log_scale) * x + shift`` per channel; the log-determinant is ``sum(log_scale)`` times the positions."""

    learned: ClassVar[bool] = True
    """Whether the scale and the shift are parameters; if not, they are buffers."""

    log_scale: Tensor
    shift: Tensor | None

    def __init__(self, shape: Shape, *, shifts: bool = True) -> None:
        super().__init__(shape)
        for name in ("log_scale", "shift") if shifts else ("log_scale",):
            values = torch.zeros(self.channels)
            if self.learned:
                self.register_parameter(name, nn.Parameter(values))
            else:
                self.register_buffer(name, values)
        if not shifts:
            self.register_parameter("shift", None)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return self._forward(x, self.log_scales())

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return self._inverse(y, self.log_scales())

    # The log-scales are cut once in a call: beside so little arithmetic, another operation is time.

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        log_scales = self.log_scales()
        return self._forward(x, log_scales), everywhere(log_scales.sum(), x)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        log_scales = self.log_scales()
        return self._inverse(y, log_scales), -everywhere(log_scales.sum(), y)

    def _forward(self, x: Tensor, log_scales: Tensor) -> Tensor:
        self.require(x)
        y = x * spread(log_scales.exp(), x)
        return y if self.shift is None else y + spread(self.shift, x)  # addcmul is slow where it broadcasts

    def _inverse(self, y: Tensor, log_scales: Tensor) -> Tensor:
        self.require(y)
        x = y if self.shift is None else y - spread(self.shift, y)
        return x * spread(torch.exp(-log_scales), y)

    def log_scales(self) -> Tensor:
        """The log-scales, within the range of exponentials."""  # by hardtanh: clamp has a slow gradient
        farthest = _FARTHEST[self.log_scale.dtype]
        return functional.hardtanh(self.log_scale, -farthest, farthest)

    @torch.no_grad()
    def lipschitz_bounds(self) -> tuple[float, float]:
        """The largest scale, and 1 over the smallest."""
        log_scales = self.log_scales()
        return float(log_scales.max().exp()), float(torch.exp(-log_scales.min()))


@register("affine")
class Affine(ScaleAndShift):
    """``y = exp(log_scale) * x + shift``, both learned, one pair per channel.

    Use it for a scale and a shift that start as the identity; those of `actnorm` start from data.

    The log-determinant is ``height * width * sum(log_scale)``. It starts as the identity.

    Reference: Dinh, Krueger, Bengio: NICE, 2014, https://arxiv.org/abs/1410.8516, for the one without a shift

    Args:
        shape: the incoming shape, channels first.
        shift: whether a shift is learned; without it, ``y = exp(log_scale) * x``.

    Examples:
        >>> Affine(shape=(3, 4, 4)).forward_and_log_det(torch.ones(1, 3, 4, 4))[1].tolist()
        [0.0]
    """

    examples = [({}, (3,)), ({}, (2, 3, 2)), ({"shift": False}, (3, 2))]

    def __init__(self, shape: Shape, shift: bool = True) -> None:
        super().__init__(shape, shifts=shift)
