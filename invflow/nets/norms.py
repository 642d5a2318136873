"""Parts that normalise, scale or drop: batch, layer and group norm, scales, dropout."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ..errors import ShapeError
from ..part import Made, Part
from ..registry import register_part
from ..state import TensorShape
from .sizes import Probability

Norm: TypeAlias = Literal["batch", "layer"]

_BATCH_NORMS: dict[int, type[nn.Module]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm1d,
    3: nn.BatchNorm2d,
    4: nn.BatchNorm3d,
}


@register_part("batch_norm")
class BatchNorm(Part):
    """Batch normalisation per channel, with running statistics for eval mode.

    Args:
        momentum: the share of a batch in the running statistics.
        eps: what is added to the variance.
    """

    obstacle = None

    def __init__(self, momentum: Annotated[float, Field(gt=0, le=1)] = 0.1, eps: PositiveFloat = 1e-5) -> None:
        self.momentum = momentum
        self.eps = eps

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        if len(shape) not in _BATCH_NORMS:
            raise ShapeError(f"{self.tag} expects at most 3 dimensions besides the channels, got {shape}")
        return _BATCH_NORMS[len(shape)](shape[0], eps=self.eps, momentum=self.momentum), shape


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels at every position."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@register_part("layer_norm")
class LayerNorm(Part):
    """Layer normalisation over the channels, at every position alike, with a learned scale and shift per channel.

    Args:
        eps: what is added to the variance.
    """

    def __init__(self, eps: PositiveFloat = 1e-5) -> None:
        self.eps = eps

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        if shape[0] < 2:
            raise ShapeError(f"{self.tag} expects at least 2 channels to normalise over, got {shape}")
        return ChannelNorm(shape[0], eps=self.eps), shape


@register_part("group_norm")
class GroupNorm(Part):
    """Normalisation over groups of channels and all positions, with a learned scale and shift per channel.

    Args:
        groups: the number of groups, which divides the channels; 1 normalises over all numbers of a sample.
        eps: what is added to the variance.
    """

    def __init__(self, groups: PositiveInt = 1, eps: PositiveFloat = 1e-5) -> None:
        self.groups = groups
        self.eps = eps

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        if shape[0] % self.groups:
            raise ShapeError(f"{self.tag} with {self.groups} groups expects channels that it divides, got {shape[0]}")
        if math.prod(shape) == self.groups:
            raise ShapeError(f"{self.tag} with {self.groups} groups expects more than one number in each, got {shape}")
        return nn.GroupNorm(self.groups, shape[0], eps=self.eps), shape


class ChannelScale(nn.Module):
    """``exp(rate * log_scale) * x`` per channel."""

    def __init__(self, channels: int, dims: int, rate: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, *(1,) * (dims - 1)))
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.rate * self.log_scale)


@register_part("scale")
class Scale(Part):
    """``exp(rate * log_scale) * x`` with a learned log-scale per channel, as at the end of Glow's nets.

    Args:
        rate: how much faster than its parameter the log-scale learns.
    """

    keeps_zero = True

    def __init__(self, rate: PositiveFloat = 3.0) -> None:
        self.rate = rate

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        return ChannelScale(shape[0], len(shape), self.rate), shape


class ChannelGain(nn.Module):
    """``gain * x`` per channel."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, *(1,) * (dims - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


@register_part("gain")
class Gain(Part):
    """``gain * x`` with a learned gain per channel, from 1: behind a tanh, the bound of RealNVP's log-scales."""

    keeps_zero = True

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        return ChannelGain(shape[0], len(shape)), shape


@register_part("dropout")
class Dropout(Part):
    """Sets numbers to 0 at random in train mode, and scales the others so that the mean stays.

    Args:
        probability: of each number to be dropped.
    """

    obstacle = None
    keeps_zero = True

    def __init__(self, probability: Probability = 0.1) -> None:
        self.probability = probability

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        return nn.Dropout(self.probability), shape
