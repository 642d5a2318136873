"""Parts made of parts: residual and dense blocks, and channels that are carried past a block."""

from __future__ import annotations

import torch
from pydantic import PositiveInt
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


class Carried(nn.Sequential):
    """``f(x)`` with the last channels of x behind it, f being the modules inside."""

    def __init__(self, *modules: nn.Module, channels: int) -> None:
        super().__init__(*modules)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), x[:, -self.channels :]], dim=1)  # type: ignore[no-untyped-call]


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


@register_part("carry")
class Carry(Part):
    """``(f(x), last channels of x)``: what the last channels say reaches the next part too.

    A net of `continuous` has the time as the last channel of its input, and behind it the context if there is one. Each
    convolution or linear layer in a `carry` sees the time, and so does the one after the last `carry`: these are the
    "concat" layers of FFJORD.

    Reference: Grathwohl et al.: FFJORD, 2018, https://arxiv.org/abs/1810.01367

    Args:
        *parts: the parts of f.
        channels: the number of channels that are carried.

    Raises:
        ShapeError: x has fewer channels, or f does not keep its positions.
    """

    def __init__(self, *parts: Part, channels: PositiveInt = 1) -> None:
        self.parts = parts
        self.channels = channels

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        if shape[0] < self.channels:
            raise ShapeError(f"{self.tag} expects at least {self.channels} channels to carry, got {shape}")
        modules, made = make_all(self.parts, shape, None)
        if made[1:] != shape[1:]:
            raise ShapeError(f"{self.tag} expects parts that keep the positions of {shape}, got {made}")
        return Carried(*modules, channels=self.channels), (made[0] + self.channels, *shape[1:])
