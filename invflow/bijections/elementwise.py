"""Maps of all real numbers, number by number."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..bijection import Bijection
from ..context import Context
from ..numerics.modes import NONE, Limit
from ..registry import register
from ..state import Shape
from .channels import OfChannels, spread


@register("leaky_relu")
class LeakyRelu(Bijection):
    """``y = x`` for positive x, else ``y = slope * x``, elementwise.

    Use it between linear bijections, which would otherwise amount to one.

    The log-determinant is log(slope) times the number of those that are not positive; at 0, where there is no
    derivative, it is that of the left, as in PyTorch.

    Args:
        slope: the slope below 0.

    Examples:
        >>> y, log_det = LeakyRelu(slope=0.5).forward_and_log_det(torch.tensor([[-2.0, 3.0]]))
        >>> y.tolist(), log_det
        ([[-1.0, 3.0]], tensor([-0.6931]))
    """

    cheap_inverse = True
    examples = [({}, (3,)), ({"slope": 3.0}, (2, 3, 2))]

    def __init__(self, slope: Annotated[float, Field(ge=1e-4, le=1e4)] = 0.01) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return functional.leaky_relu(x, self.slope)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return functional.leaky_relu(y, 1 / self.slope)

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self(x), (x <= 0).flatten(1).sum(1).to(x.dtype) * math.log(self.slope)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y), (y <= 0).flatten(1).sum(1).to(y.dtype) * -math.log(self.slope)

    def lipschitz_bounds(self) -> tuple[float, float]:
        """The larger slope of two, and 1 over the smaller."""
        return max(1.0, self.slope), max(1.0, 1 / self.slope)


@register("scale")
class Scale(Bijection):
    """``y = 2^exponent * x``, elementwise: exact, because only exponents change.

    Use it to bring data to another range without a rounding, such as pixels of 0 to 255.

    A round trip returns every bit of a float, if y neither overflows nor is subnormal. It is no bijection of a grid,
    though: ``2 x`` leaves gaps, and ``x / 2`` is off the grid; so `grid` and `exact` numerics refuse it. The
    log-determinant is ``exponent * log(2)`` for each number.

    Args:
        exponent: of 2; negative for a smaller y.

    Examples:
        >>> Scale(exponent=3)(torch.tensor([[0.5]])).tolist()
        [[4.0]]
    """

    cheap_inverse = True
    examples = [({"exponent": 3}, (3,)), ({"exponent": -2}, (2, 3, 2)), ({"exponent": 0}, (2,))]

    def __init__(self, exponent: Annotated[int, Field(ge=-64, le=64)]) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return x * 2.0**self.exponent

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return y * 2.0**-self.exponent

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self(x), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y), -self._log_det(y)

    @property
    def limit(self) -> Limit:
        reason = f"of a grid, 2^{self.exponent} x {'leaves gaps' if self.exponent > 0 else 'leads off it'}"
        return Limit("float", reason) if self.exponent else NONE

    def lipschitz_bounds(self) -> tuple[float, float]:
        """The factor, and 1 over it."""
        return 2.0**self.exponent, 2.0**-self.exponent

    def _log_det(self, x: Tensor) -> Tensor:
        return x.new_full((x.shape[0],), x.shape[1:].numel() * self.exponent * math.log(2))


_LARGEST_LOG = 2.0
"""The bound of the logarithm of a tailweight."""


@register("sinh_arcsinh")
class SinhArcsinh(OfChannels):
    """``y = sinh((arcsinh(x) + skewness) * tailweight)``, both learned, one pair per channel: other tails of a density.

    Use it last in a flow of data with heavy or lopsided tails.

    A tailweight above 1 makes the tails of y heavier than those of x, one below 1 lighter, and a skewness moves their
    weight to one side. The inverse is of the same form, ``x = sinh(arcsinh(y) / tailweight - skewness)``. The
    log-determinant is ``sum(log(tailweight) + log(cosh(t)) - log(cosh(arcsinh(x))))`` with the argument t of the sinh.
    It starts as the identity. The tailweight, ``exp(2 tanh(log_tailweight / 2))``, lies between exp(-2) and exp(2). A y
    beyond an eighth of the dtype's largest number becomes that.

    Reference: Jones, Pewsey: Sinh-arcsinh distributions, Biometrika 96, 2009, https://doi.org/10.1093/biomet/asp053

    Args:
        shape: the incoming shape, channels first.

    Examples:
        >>> layer = SinhArcsinh(shape=(1,))
        >>> _ = layer.skewness.data.fill_(1.0)
        >>> layer(torch.zeros(1, 1))
        tensor([[1.1752]], grad_fn=<SinhBackward0>)
    """

    rounding_growth = 8.0  # arcsinh of numbers up to 1e9, times a tailweight, and back
    examples = [({}, (3,)), ({}, (2, 3, 2))]

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.skewness = nn.Parameter(torch.zeros(self.channels))
        self.log_tailweight = nn.Parameter(torch.zeros(self.channels))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return torch.sinh(self._stretched(torch.asinh(x)))

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return torch.sinh(self._shrunk(torch.asinh(y)))

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        before = torch.asinh(x)
        after = self._stretched(before)
        return torch.sinh(after), self._log_det(before, after, 1)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        before = torch.asinh(y)
        after = self._shrunk(before)
        return torch.sinh(after), self._log_det(before, after, -1)

    def _stretched(self, x: Tensor) -> Tensor:
        self.require(x)
        return _within((x + spread(self.skewness, x)) * spread(self._log_weight().exp(), x))

    def _shrunk(self, y: Tensor) -> Tensor:
        self.require(y)
        return _within(y * spread(torch.exp(-self._log_weight()), y) - spread(self.skewness, y))

    def _log_weight(self) -> Tensor:
        return _LARGEST_LOG * torch.tanh(self.log_tailweight / _LARGEST_LOG)

    def _log_det(self, before: Tensor, after: Tensor, sign: int) -> Tensor:
        slope = _log_cosh(after) - _log_cosh(before) + sign * spread(self._log_weight(), before)
        return slope.flatten(1).sum(1)


def _within(t: Tensor) -> Tensor:
    """Numbers whose sinh, and cosh times a tailweight, do not overflow."""
    farthest = math.log(torch.finfo(t.dtype).max / 4)
    return t.clamp(-farthest, farthest)


def _log_cosh(t: Tensor) -> Tensor:
    """``log(2 cosh(t))``."""
    return -t - functional.logsigmoid(-2 * t)
