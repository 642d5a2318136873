"""Parts without weights that change the shape: means, pools, zeros as further channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError
from ..part import Made, Part
from ..registry import register_part
from ..state import TensorShape, require_channels, require_positions

_AVERAGE: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


class MeanOverPositions(nn.Module):
    """``(batch, channels, ...) -> (batch, channels)``."""

    def forward(self, x: Tensor) -> Tensor:
        # A pool over all positions, as published networks compute it: `Tensor.mean` sums in another order.
        return _AVERAGE[x.dim() - 2](x, x.shape[2:]).flatten(1)


@register_part("mean")
class Mean(Part):
    """The mean over all positions: ``(channels, ...) -> (channels,)``, of which a `linear` makes logits."""

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        return MeanOverPositions(), (require_positions(self.tag, shape)[0],)


class _Pool(Part):
    """One number of each window of positions; windows that would reach beyond the end are left out."""

    pools: ClassVar[dict[int, Callable[..., nn.Module]]]

    def __init__(self, size: PositiveInt = 2, stride: PositiveInt | None = None) -> None:
        self.size = size
        self.stride = size if stride is None else stride

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        channels, *positions = require_positions(self.tag, shape)
        if min(positions) < self.size:
            raise ShapeError(f"{self.tag} expects at least {self.size} positions in every dimension, got {shape}")
        made = ((size - self.size) // self.stride + 1 for size in positions)
        return self.pools[len(shape)](self.size, self.stride), (channels, *made)


@register_part("average_pool")
class AveragePool(_Pool):
    """The mean of each window of positions.

    Args:
        size: the side of a window.
        stride: the distance between windows; by default the size.
    """

    pools: ClassVar = {2: nn.AvgPool1d, 3: nn.AvgPool2d, 4: nn.AvgPool3d}


@register_part("max_pool")
class MaxPool(_Pool):
    """The largest number of each window of positions.

    Args:
        size: the side of a window.
        stride: the distance between windows; by default the size.
    """

    pools: ClassVar = {2: nn.MaxPool1d, 3: nn.MaxPool2d, 4: nn.MaxPool3d}


class ZeroChannels(nn.Module):
    """``x -> (0, x, 0)``, along the channels."""

    def __init__(self, before: int, behind: int) -> None:
        super().__init__()
        self.before = before
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x, [0, 0] * (x.dim() - 2) + [self.before, self.behind])


@register_part("pad")
class PadChannels(Part):
    """Zeros as further channels on both sides, the larger half behind: how a ResNet without projections widens.

    Args:
        channels: the number of zero channels to add.
    """

    keeps_zero = True

    def __init__(self, channels: PositiveInt) -> None:
        self.channels = channels

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        channels, *positions = require_channels(self.tag, shape)
        before = self.channels // 2
        return ZeroChannels(before, self.channels - before), (channels + self.channels, *positions)
