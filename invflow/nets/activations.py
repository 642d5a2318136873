"""Activations as parts."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from ..part import Made, Part
from ..registry import register_part
from ..state import TensorShape

Activation: TypeAlias = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid"]


class _Activation(Part):
    """A function of every number."""

    module: ClassVar[type[nn.Module]]
    obstacle = None

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        return self.module(), shape


@register_part("relu")
class Relu(_Activation):
    """``max(x, 0)``."""

    module = nn.ReLU


@register_part("leaky_relu")
class LeakyRelu(_Activation):
    """``x``, or ``slope * x`` for negative x.

    Args:
        slope: the slope for negative x.
    """

    module = nn.LeakyReLU

    def __init__(self, slope: PositiveFloat = 0.01) -> None:
        self.slope = slope

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        return nn.LeakyReLU(self.slope), shape


class _ConcatenatedRelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, -x], dim=1).relu()


@register_part("crelu")
class ConcatenatedRelu(Part):
    """``(max(x, 0), max(-x, 0))``, one behind the other along the channels, so that nothing of x is lost.

    Reference: Shang, Sohn, Almeida, Lee: Understanding and Improving Convolutional Neural Networks via Concatenated
    Rectified Linear Units, 2016, https://arxiv.org/abs/1603.05201
    """

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        return _ConcatenatedRelu(), (2 * shape[0], *shape[1:])


@register_part("elu")
class Elu(_Activation):
    """``x``, or ``exp(x) - 1`` for negative x."""

    module = nn.ELU


@register_part("gelu")
class Gelu(_Activation):
    """``x Phi(x)``, with the distribution function of the normal distribution."""

    module = nn.GELU


@register_part("silu")
class Silu(_Activation):
    """``x sigmoid(x)``, also known as swish."""

    module = nn.SiLU


@register_part("softplus")
class Softplus(_Activation):
    """``log(1 + exp(x))``."""

    module = nn.Softplus


@register_part("tanh")
class Tanh(_Activation):
    """``tanh(x)``."""

    module = nn.Tanh


@register_part("sigmoid")
class Sigmoid(_Activation):
    """``1 / (1 + exp(-x))``."""

    module = nn.Sigmoid


ACTIVATIONS: dict[Activation, type[_Activation]] = {
    "relu": Relu,
    "leaky_relu": LeakyRelu,
    "elu": Elu,
    "gelu": Gelu,
    "silu": Silu,
    "softplus": Softplus,
    "tanh": Tanh,
    "sigmoid": Sigmoid,
}
"""The activations by name, for nets that have one for all of their layers."""
