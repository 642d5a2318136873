"""Psi, the invertible downsampling of i-RevNet."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from ..bijection import Rearrangement
from ..errors import ShapeError
from ..part import Made, Part
from ..registry import register, register_part
from ..state import Shape, TensorShape, require_tensor, shape_of
from .inverse import Inverse

# Orders of (batch, channel, row, row in block, column, column in block): the batch first, then the three dimensions
# that become the new channel, slowest first, then row and column.
_TO_CHANNELS = {"block": (0, 3, 5, 1, 2, 4), "channel": (0, 1, 3, 5, 2, 4)}
_FROM_CHANNELS = {"block": (0, 3, 4, 1, 5, 2), "channel": (0, 1, 4, 2, 5, 3)}


@register("psi")
class Psi(Rearrangement):
    """Moves each ``block_size`` x ``block_size`` block of pixels into the channels.

    ``y[(i * bl + j) * d + c, r, s] = x[c, r * bl + i, s * bl + j]`` in the block layout of i-RevNet,
    ``y[c * bl**2 + i * bl + j, r, s]`` in the channel layout of `torch.nn.functional.pixel_unshuffle`; ``(d, h, w)``
    becomes ``(d * bl**2, h / bl, w / bl)``. A permutation: exact for every dtype, log-determinant 0.

    Reference: Jacobsen, Smeulders, Oyallon: i-RevNet: Deep Invertible Networks, 2018, https://arxiv.org/abs/1802.07088

    Args:
        block_size: the side of a block, in pixels; it must divide height and width.
        layout: the order of the new channels: "block" or "channel".

    Examples:
        >>> import torch
        >>> Psi(2)(torch.arange(8).reshape(1, 2, 2, 2)).flatten().tolist()
        [0, 4, 1, 5, 2, 6, 3, 7]
    """

    examples = [
        ({}, (1, 8, 4)),
        ({"block_size": 2}, (3, 4, 6)),
        ({"block_size": 3, "layout": "channel"}, (2, 3, 6)),
    ]

    def __init__(self, block_size: PositiveInt = 4, layout: Literal["block", "channel"] = "block") -> None:
        super().__init__()
        self.block_size = block_size
        self.layout = layout

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        channels, height, width = self.output_shape(shape_of(x))
        blocks = x.reshape(*x.shape[:2], height, self.block_size, width, self.block_size)
        return blocks.permute(_TO_CHANNELS[self.layout]).reshape(x.shape[0], channels, height, width)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        channels, height, width = self.input_shape(shape_of(y))
        side = self.block_size
        split = (side, side, channels) if self.layout == "block" else (channels, side, side)
        blocks = y.reshape(y.shape[0], *split, *y.shape[2:])
        return blocks.permute(_FROM_CHANNELS[self.layout]).reshape(y.shape[0], channels, height, width)

    def output_shape(self, shape: Shape) -> TensorShape:
        channels, height, width = require_tensor("psi", shape, dims=3)
        side = self.block_size
        if height % side or width % side:
            raise ShapeError(
                f"psi with block_size {side} expects a height and a width that {side} divides, got {height} x {width}"
            )
        return channels * side**2, height // side, width // side

    def input_shape(self, shape: Shape) -> TensorShape:
        channels, height, width = require_tensor("the inverse of psi", shape, dims=3)
        side = self.block_size
        if channels % side**2:
            raise ShapeError(
                f"the inverse of psi with block_size {side} expects channels that {side**2} divides, got {channels}"
            )
        return channels // side**2, height * side, width * side


@register_part("psi")
class PsiPart(Part):
    """`Psi` within a net: blocks of positions become channels; or its inverse, which undoes it.

    Args:
        block_size: the side of a block.
        layout: the order of the new channels, as in the layer.
        inverse: whether channels become blocks of positions instead.

    Raises:
        ShapeError: the block's side does not divide the positions, or its size the channels.
    """

    def __init__(
        self, block_size: PositiveInt = 4, layout: Literal["block", "channel"] = "block", inverse: bool = False
    ) -> None:
        self.block_size = block_size
        self.layout = layout
        self.inverse = inverse

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        psi = Psi(self.block_size, self.layout)
        return (Inverse(psi), psi.input_shape(shape)) if self.inverse else (psi, psi.output_shape(shape))
