"""Parts made of parts: residual and dense blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..part import Made, Part
from ..registry import register_part
from ..state import TensorShape
from .stack import make_all


class Skip(nn.Sequential):
    """``x + f(x)``, with f the modules inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)  # type: ignore[no-any-return, no-untyped-call]


class Append(nn.Sequential):
    """``x`` with ``f(x)`` as further channels, f being the modules inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], dim=1)  # type: ignore[no-untyped-call]


@register_part("residual")
class ResidualBlock(Part):
    """``x + f(x)``, with f some parts one after another; the last that chooses its channels returns those of x.

    Args:
        *parts: the parts of f.

    Raises:
        ShapeError: f does not return the shape of x.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        modules, made = make_all(self.parts, shape, shape)
        if made != shape:
            raise ShapeError(f"{self.tag} expects parts that keep the shape {shape}, got {made}")
        return Skip(*modules), shape


@register_part("dense")
class DenseBlock(Part):
    """``(x, f(x))``: the channels of f, some parts one after another, behind those of x.

    Reference: Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, 2016,
    https://arxiv.org/abs/1608.06993

    Args:
        *parts: the parts of f.

    Raises:
        ShapeError: f does not keep the positions of x.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        modules, made = make_all(self.parts, shape, None)
        if made[1:] != shape[1:]:
            raise ShapeError(f"{self.tag} expects parts that keep the positions of {shape}, got {made}")
        return Append(*modules), (shape[0] + made[0], *shape[1:])
