"""Haar wavelets, an invertible downsampling that separates averages from differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..bijection import Bijection
from ..context import Context
from ..registry import register
from ..state import Shape, TensorShape, require_positions, shape_of
from .psi import from_blocks, into_blocks
from .stripes import evens_and_odds, interleaved


@register("haar")
class Haar(Bijection):
    """Haar wavelets: the sums and differences of each block of 2 positions along every dimension, as channels.

    Use it as `psi`, where averages and details of an image shall go separate ways.

    On images, ``(d, h, w)`` becomes ``(4 * d, h / 2, w / 2)``: of a block ``[[p, q], [r, s]]`` come four bands,

    - 0, the average, ``(p + q + r + s) / 2``,
    - 1, the difference along the width, ``(p - q + r - s) / 2``,
    - 2, that along the height, ``(p + q - r - s) / 2``,
    - 3, that along both, ``(p - q - r + s) / 2``.

    In general, band b is `psi` of block size 2 with its places i in a block replaced by
    ``2^(-n/2) sum_i (-1)^popcount(b & i) x_i``, for n dimensions of positions: 2 bands of a sequence, 8 of a volume.
    Orthonormal: an isometry of log-determinant 0, its own inverse but for the places of the numbers.

    Reference: Ardizzone et al.: Guided Image Generation with Conditional Invertible Neural Networks, 2019,
    https://arxiv.org/abs/1907.02392

    Args:
        layout: the order of the new channels: "block" is ``band * d + c``, "channel" is ``c * 2**n + band``.

    Raises:
        ShapeError: a dimension of positions is odd.

    Examples:
        >>> Haar()(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])).flatten().tolist()
        [5.0, -1.0, -2.0, 0.0]
    """

    volume_preserving = True
    cheap_inverse = True
    examples = [
        ({}, (2, 4, 2)),
        ({"layout": "channel"}, (3, 2, 4)),
        ({}, (2, 6)),
        ({"layout": "channel"}, (2, 2, 2, 4)),
    ]

    def __init__(self, layout: Literal["block", "channel"] = "block") -> None:
        super().__init__()
        self.layout = layout
        self._band = 1 if layout == "block" else 2  # the place of the bands before they join the channels

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        channels, *sides = self.output_shape(shape_of(x))
        parts = [x]
        for dim in range(2, x.dim()):
            parts = [half for part in parts for half in evens_and_odds(part, dim)]
        bands = torch.stack(_hadamard(parts), self._band)
        return (bands * _scale(len(sides))).reshape(x.shape[0], channels, *sides)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        channels, *sides = self.input_shape(shape_of(y))
        count = 2 ** len(sides)
        split = (count, channels) if self.layout == "block" else (channels, count)
        bands = (y * _scale(len(sides))).reshape(y.shape[0], *split, *y.shape[2:])
        parts = _hadamard(bands.unbind(self._band))
        for dim in reversed(range(2, y.dim())):
            parts = [interleaved(*pair, dim) for pair in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def output_shape(self, shape: Shape) -> TensorShape:
        return into_blocks("haar", require_positions("haar", shape), 2)

    def input_shape(self, shape: Shape) -> TensorShape:
        who = "the inverse of haar"
        return from_blocks(who, require_positions(who, shape), 2)

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0


def _hadamard(parts: Sequence[Tensor]) -> list[Tensor]:
    """Of 2^n tensors, the sums ``sum_i (-1)^popcount(b & i) x_i``."""
    if len(parts) == 1:
        return list(parts)
    half = len(parts) // 2
    pairs = list(zip(_hadamard(parts[:half]), _hadamard(parts[half:]), strict=True))
    return [a + b for a, b in pairs] + [a - b for a, b in pairs]


def _scale(dims: int) -> float:
    """What makes sums and differences along as many dimensions orthonormal."""
    return math.sqrt(0.5**dims)
