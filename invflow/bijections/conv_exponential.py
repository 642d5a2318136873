"""An invertible convolution of any kernel size: the exponential of a convolution."""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..context import Context
from ..errors import ShapeError
from ..nets.sizes import OddInt
from ..numerics.backend import exact_kernels, own_precision
from ..registry import register
from ..state import Shape, TensorShape, require_positions, shape_of
from .channels import PerPosition
from .linear import single

Bound: TypeAlias = Annotated[float, Field(gt=0, le=4)]

_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TAIL = 0.25
"""In units of eps, the part of the exponential's series that is left out."""


@register("conv_exponential")
class ConvExponential(PerPosition):
    """``y = exp(M) x = x + M x + M M x / 2! + ...``, where M is a learned convolution with zeros around the border.

    Use it to let neighbouring positions mix in a linear layer, as a `linear_1x1` mixes channels.

    The inverse is ``exp(-M)``, the same series with another sign, so that it costs no more; the log-determinant is the
    trace of M: the sum of the kernel's diagonal at its centre, times the number of positions. For sequences, images
    and volumes. It starts as the identity.

    It is the convolution, of those that can be inverted, that no weights make singular: a determinant that is an
    exponential is never 0. The kernel is scaled down as far as needed for a norm of M of at most ``bound``, by the
    sums of its absolute values, so that a fixed number of terms is exact to rounding: for a bound of 1, 11 in float32
    and 18 in float64. A circular convolution is singular as soon as the determinant of one of its frequencies is 0. A
    causal one (emerging convolutions) takes a step for each position to invert, and errors may grow from step to step.

    Reference: Hoogeboom et al.: The Convolution Exponential and Generalized Sylvester Flows, 2020,
    https://arxiv.org/abs/2006.01910

    Args:
        shape: the incoming shape, channels first.
        kernel_size: the side of the kernel, odd.
        bound: the largest norm of M: singular values of the map lie between exp(-bound) and exp(bound).

    Examples:
        >>> layer = ConvExponential(shape=(3, 8, 8))
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(layer(x), x), layer.forward_and_log_det(x)[1].tolist()
        (True, [0.0, 0.0])
    """

    examples = [
        ({}, (2, 4, 3)),
        ({"kernel_size": 5, "bound": 2.0}, (3, 2, 4)),
        ({}, (2, 5)),
        ({"kernel_size": 1}, (2, 2, 1, 3)),
    ]

    def __init__(self, shape: Shape, kernel_size: OddInt = 3, bound: Bound = 1.0) -> None:
        super().__init__(require_positions("conv_exponential", shape))
        self.bound = bound
        self.kernel = nn.Parameter(torch.zeros(self.channels, self.channels, *[kernel_size] * (len(shape) - 1)))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return self._exponential(x, 1.0)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return self._exponential(y, -1.0)

    def log_abs_det(self) -> Tensor:
        """The trace of the kernel's centre."""
        positions = self._bounded().flatten(2)
        return positions[..., positions.shape[2] // 2].trace()

    def output_shape(self, shape: Shape) -> TensorShape:
        extents = require_positions("conv_exponential", shape, self.channels)
        if len(extents) != self.kernel.dim() - 1:
            raise ShapeError(
                f"conv_exponential expects {self.kernel.dim() - 1} dimensions besides the batch, got {extents}"
            )
        return extents

    @torch.no_grad()
    def lipschitz_bounds(self) -> tuple[float, float]:
        """The exponential of the kernel's norm."""
        bound = math.exp(_norm(self._bounded()))
        return bound, bound

    def _exponential(self, x: Tensor, sign: float) -> Tensor:
        self.output_shape(shape_of(x))
        convolve, padding = _CONVOLUTIONS[x.dim() - 3], self.kernel.shape[-1] // 2
        with own_precision(x):
            # In float32 at least: in bfloat16, oneDNN's convolution of a volume returns NaN now and then.
            kernel, wide = single(self._bounded()), single(x)
            made = wide
            with exact_kernels(wide):
                for count in range(_terms(self.bound, x.dtype), 0, -1):
                    made = torch.add(wide, convolve(made, kernel, padding=padding), alpha=sign / count)
        return made.to(x.dtype)

    def _bounded(self) -> Tensor:
        """The kernel of M."""
        return self.kernel * (self.bound / _norm(self.kernel).clamp(min=self.bound))


def _norm(kernel: Tensor) -> Tensor:
    """A bound of the norm of a convolution: the most that any input or output has to do with all others."""
    sizes = kernel.abs().flatten(2).sum(2)
    return torch.maximum(sizes.sum(0).amax(), sizes.sum(1).amax())


def _terms(bound: float, dtype: torch.dtype) -> int:
    """The number of terms after which the rest of exp(bound) is less than a rounding of exp(-bound)."""
    allowed = _TAIL * torch.finfo(dtype).eps * math.exp(-bound)
    count, term = 1, bound
    while term * bound / (count + 1) > allowed:
        count += 1
        term *= bound / count
    return count
