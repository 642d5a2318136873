"""Psi, the invertible downsampling of i-RevNet."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from ..bijection import Rearrangement
from ..context import Context
from ..errors import ShapeError
from ..part import Made, Part
from ..registry import register, register_part
from ..state import Shape, TensorShape, require_positions, shape_of
from .inverse import Inverse


def _orders(count: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of each layout, the orders of dimensions there and back, for this number of positions.

    There: of (batch, channel, row, row in block, column, column in block), the batch first, then the three dimensions
    that become the new channel, slowest first, then row and column.
    """
    inside, across = range(3, 2 * count + 2, 2), range(2, 2 * count + 2, 2)
    there = {"block": (0, *inside, 1, *across), "channel": (0, 1, *inside, *across)}
    return {layout: (order, tuple(map(order.index, range(len(order))))) for layout, order in there.items()}


_ORDERS = tuple(map(_orders, range(4)))


@register("psi")
class Psi(Rearrangement):
    """Moves each block of neighbouring positions into the channels, of sequences, images and volumes.

    Use it to make images smaller without losing a pixel, where another network would pool.

    On images, ``y[(i * bl + j) * d + c, r, s] = x[c, r * bl + i, s * bl + j]`` in the block layout of i-RevNet,
    ``y[c * bl**2 + i * bl + j, r, s]`` in the channel layout of `torch.nn.functional.pixel_unshuffle`; ``(d, h, w)``
    becomes ``(d * bl**2, h / bl, w / bl)``. Likewise ``(d, l)`` becomes ``(d * bl, l / bl)``, and a volume
    ``(d, depth, h, w)`` becomes ``(d * bl**3, depth / bl, h / bl, w / bl)``, the positions in a block in row-major
    order. A permutation: exact for every dtype, log-determinant 0.

    Reference: Jacobsen, Smeulders, Oyallon: i-RevNet: Deep Invertible Networks, 2018, https://arxiv.org/abs/1802.07088

    Args:
        block_size: the side of a block; it must divide the length, or height and width, and the depth of a volume.
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
        ({"block_size": 2}, (2, 6)),
        ({"block_size": 2, "layout": "channel"}, (2, 2, 4, 2)),
    ]

    def __init__(self, block_size: PositiveInt = 4, layout: Literal["block", "channel"] = "block") -> None:
        super().__init__()
        self.block_size = block_size
        self.layout = layout

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        channels, *sides = self.output_shape(shape_of(x))
        there, _ = _ORDERS[len(sides)][self.layout]
        split = [part for side in sides for part in (side, self.block_size)]
        return x.reshape(*x.shape[:2], *split).permute(there).reshape(x.shape[0], channels, *sides)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        channels, *sides = self.input_shape(shape_of(y))
        _, back = _ORDERS[len(sides)][self.layout]
        inside = [self.block_size] * len(sides)
        split = [*inside, channels] if self.layout == "block" else [channels, *inside]
        return y.reshape(y.shape[0], *split, *y.shape[2:]).permute(back).reshape(y.shape[0], channels, *sides)

    def output_shape(self, shape: Shape) -> TensorShape:
        return into_blocks(f"psi with block_size {self.block_size}", require_positions("psi", shape), self.block_size)

    def input_shape(self, shape: Shape) -> TensorShape:
        who = "the inverse of psi"
        return from_blocks(f"{who} with block_size {self.block_size}", require_positions(who, shape), self.block_size)


def into_blocks(who: str, shape: TensorShape, block: int) -> TensorShape:
    """The shape after each block of positions has become a position with more channels, else a ShapeError."""
    channels, *sides = shape
    smaller = [side // block for side in sides]
    if [side * block for side in smaller] != sides:
        kind = ("a length", "a height and a width", "a depth, a height and a width")[len(sides) - 1]
        raise ShapeError(f"{who} expects {kind} that {block} divides, got {' x '.join(map(str, sides))}")
    return channels * block ** len(sides), *smaller


def from_blocks(who: str, shape: TensorShape, block: int) -> TensorShape:
    """The shape before `into_blocks`, else a ShapeError."""
    channels, *sides = shape
    size = block ** len(sides)
    if channels % size:
        raise ShapeError(f"{who} expects channels that {size} divides, got {channels}")
    return channels // size, *[side * block for side in sides]


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
