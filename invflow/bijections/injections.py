"""Maps that add dimensions and lose none."""

from __future__ import annotations

import math

from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional

from ..bijection import Injection
from ..context import Context
from ..errors import ShapeError
from ..numerics.modes import NONE
from ..registry import register
from ..state import Shape, TensorShape, require_channels, require_pair, require_tensor, shape_of
from .split import Pair


@register("pad")
class Pad(Injection):
    """Zeros as further channels: ``x -> (x, 0)``; the inverse cuts them off. The injective padding of i-RevNet.

    Use it before a classifier's first coupling, to give few channels more room.

    Exact for every dtype. It adds dimensions, so it has no log-determinant.

    Reference: Jacobsen, Smeulders, Oyallon: i-RevNet: Deep Invertible Networks, 2018, https://arxiv.org/abs/1802.07088

    Args:
        channels: the number of zero channels to add, behind the others.

    Examples:
        >>> import torch
        >>> Pad(channels=2)(torch.tensor([[1, 2]])).tolist()
        [[1, 2, 0, 0]]
    """

    limit = NONE
    cheap_inverse = True
    examples = [({"channels": 2}, (3,)), ({"channels": 1}, (2, 3, 4)), ({"channels": 3}, (1, 2))]

    def __init__(self, channels: PositiveInt) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        self.output_shape(shape_of(x))
        return functional.pad(x, [0, 0] * (x.dim() - 2) + [0, self.channels])

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return y.narrow(1, 0, self.input_shape(shape_of(y))[0])

    def output_shape(self, shape: Shape) -> TensorShape:
        channels, *positions = require_channels("pad", shape)
        return channels + self.channels, *positions

    def input_shape(self, shape: Shape) -> TensorShape:
        channels, *positions = require_channels("the inverse of pad", shape)
        if channels <= self.channels:
            raise ShapeError(f"the inverse of pad expects more than {self.channels} channels, got {shape}")
        return channels - self.channels, *positions

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0


@register("duplicate")
class Duplicate(Injection):
    """The same tensor twice: ``x -> (x, x)``, the two streams from which a reversible vision transformer starts.

    Use it where two streams begin with the same tokens.

    The left inverse returns the first of the two, and not their mean, which rounding or an overflow would change: so
    it is exact for every dtype. It adds dimensions, so it has no log-determinant.

    Reference: Mangalam et al.: Reversible Vision Transformers, 2022, https://arxiv.org/abs/2302.04869

    Examples:
        >>> Duplicate().output_shape((3, 4, 4))
        ((3, 4, 4), (3, 4, 4))
    """

    limit = NONE
    cheap_inverse = True
    examples = [({}, (3,)), ({}, (2, 3, 4))]

    def forward(self, x: Tensor, context: Context = None) -> Pair:
        self.output_shape(shape_of(x))
        return x, x

    def inverse(self, y: Pair, context: Context = None) -> Tensor:
        self.input_shape(shape_of(y))
        return y[0]

    def output_shape(self, shape: Shape) -> tuple[TensorShape, TensorShape]:
        same = require_tensor("duplicate", shape)
        return same, same

    def input_shape(self, shape: Shape) -> TensorShape:
        first, second = require_pair("the inverse of duplicate", shape)
        if first != second:
            raise ShapeError(f"the inverse of duplicate expects two tensors of one shape, got {shape}")
        return require_tensor("the inverse of duplicate", first)

    def lipschitz_bounds(self) -> tuple[float, float]:
        return math.sqrt(2), 1.0
