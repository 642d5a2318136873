"""Maps between the reals and an interval, number by number."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from ..bijection import Bijection
from ..context import Context
from ..registry import register
from .linear import single

_INSIDE = 0.5
"""A number inside of all these intervals: it stands for those outside, which have no image."""


@register("logit")
class Logit(Bijection):
    """``y = log(p / (1 - p))`` with ``p = alpha + (1 - 2 alpha) x``, elementwise: from pixels in [0, 1] to the reals.

    Use it first in a flow of pixels, whose samples then stay in their range.

    The log-determinant is ``sum(log(1 - 2 alpha) - log(p) - log(1 - p))``. Densities of images are easier to fit in
    logits, because pixels crowd at both ends of their interval. Outside ``0 < p < 1`` y is NaN; with its
    log-determinant, which is -inf there, y is 0, so that the density of a chain is 0.

    Reference: Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2016, https://arxiv.org/abs/1605.08803

    Args:
        alpha: keeps p away from 0 and 1, so that x may exceed [0, 1] by less than ``alpha / (1 - 2 alpha)``.

    Examples:
        >>> Logit()(torch.tensor([[0.5]])).tolist()
        [[0.0]]
        >>> Logit().forward_and_log_det(torch.tensor([[0.5], [1.5]]))[1]
        tensor([1.2809,   -inf])
    """

    domain = "unit"
    cheap_inverse = True
    examples = [({}, (3,)), ({"alpha": 0.01}, (2, 3, 2))]

    def __init__(self, alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        p, q = self._probabilities(x)
        return torch.log(p / q)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        # The half width is rounded down, so that no image lies outside, where it would have no density.
        below, above = (_floor(end, y.dtype, inside=True) for end in self._ends)
        return 0.5 + torch.tanh(y / 2) * _floor(min(above - 0.5, below + 0.5), y.dtype)

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        p, q = self._probabilities(x)
        outside = (p <= 0) | (q <= 0)
        p, q = (single(share.masked_fill(outside, _INSIDE)) for share in (p, q))
        return torch.log(p / q).to(x.dtype), _summed(-torch.log(p * q * sum(self._ends)), outside, x)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        slope = _log_slope_of_sigmoid(single(y)) + math.log(sum(self._ends))
        return self.inverse(y, context), slope.flatten(1).sum(1).to(y.dtype)

    def lipschitz_bounds(self) -> tuple[float, float]:
        """Infinite for the map, arbitrarily steep near the ends of its domain; the slope at 0 for its inverse."""
        return math.inf, sum(self._ends) / 4

    @property
    def _ends(self) -> tuple[float, float]:
        """How far p = 0 is below, and p = 1 above, x = 0; together the width of the domain."""
        margin = self.alpha / (1 - 2 * self.alpha)
        return margin, 1 + margin

    def _probabilities(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """P and 1 - p. Next to an end a dtype shorter than float64 would lose one of them to the rounding of p."""
        if x.dtype == torch.float64:
            p = self.alpha + (1 - 2 * self.alpha) * x
            return p, 1 - p
        below, above = self._ends
        # Each end is the sum of two numbers of the dtype, so that the distance of x from it is right to its last bits.
        near, far = (_floor(end, x.dtype) for end in (below, above))
        return ((x + near) + (below - near)) / (below + above), ((far - x) + (above - far)) / (below + above)


class _Onto(Bijection):
    """The base of maps of all reals onto an open interval, whose images stay inside of it when they are rounded."""

    cheap_inverse = True
    low = 0.0
    high = 1.0
    steepest = 1.0
    """The largest slope; that of the inverse has no bound."""

    @abstractmethod
    def _log_slope(self, x: Tensor) -> Tensor:
        """``log(dy/dx)``, elementwise."""

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        return self(x), self._log_slope(single(x)).flatten(1).sum(1).to(x.dtype)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        outside = (y <= self.low) | (y >= self.high)
        x = self.inverse(y.masked_fill(outside, _INSIDE))
        return x, _summed(-self._log_slope(single(x)), outside, y)

    def lipschitz_bounds(self) -> tuple[float, float]:
        """The largest slope; infinite for the inverse, arbitrarily steep near the ends of the interval."""
        return self.steepest, math.inf


@register("sigmoid")
class Sigmoid(_Onto):
    """``y = 1 / (1 + exp(-x))``, elementwise: from the reals to (0, 1). The inverse is ``x = log(y / (1 - y))``.

    Use it last where the states must end in an interval, under a `uniform` prior for instance.

    The log-determinant is ``sum(-softplus(x) - softplus(-x))``. Far from 0, y rounds to an end of the interval, and is
    the number next to it: a round trip in float32 returns x up to about 16, and in float64 up to 36, and down to -87
    and -708. Outside of the interval the inverse is NaN, or infinite at its ends; with its log-determinant, which is
    -inf there, x is 0.

    Examples:
        >>> Sigmoid().forward_and_log_det(torch.tensor([[0.0]]))
        (tensor([[0.5000]]), tensor([-1.3863]))
    """

    codomain = "unit"
    steepest = 0.25
    examples = [({}, (3,)), ({}, (2, 3, 2))]

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        info = torch.finfo(x.dtype)
        return torch.sigmoid(x).clamp(info.tiny, 1 - info.eps / 2)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return torch.logit(y)

    def _log_slope(self, x: Tensor) -> Tensor:
        return _log_slope_of_sigmoid(x)


@register("tanh")
class Tanh(_Onto):
    """``y = tanh(x)``, elementwise: from the reals to (-1, 1). The inverse is ``x = artanh(y)``.

    Use it where the states must end between -1 and 1.

    The log-determinant is ``sum(2 (log(2) - |x| - softplus(-2 |x|)))``. Far from 0, y rounds to an end of the interval,
    and is the number next to it: a round trip in float32 returns x up to about 8, and in float64 up to 18. Outside of
    the interval the inverse is NaN, or infinite at its ends; with its log-determinant, which is -inf there, x is that
    of 0.5.

    Examples:
        >>> Tanh().forward_and_log_det(torch.tensor([[0.5]]))
        (tensor([[0.4621]]), tensor([-0.2402]))
    """

    codomain = "symmetric"
    low = -1.0
    examples = [({}, (3,)), ({}, (2, 3, 2))]

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        end = 1 - torch.finfo(x.dtype).eps / 2
        return torch.tanh(x).clamp(-end, end)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return torch.atanh(y)

    def _log_slope(self, x: Tensor) -> Tensor:
        return _log_slope_of_sigmoid(2 * x) + math.log(4)


@register("softplus")
class Softplus(_Onto):
    """``y = log(1 + exp(x))``, elementwise: from the reals to the positive numbers.

    Use it backwards, as `inverse`, to start from data that are positive.

    Its inverse is ``x = y + log(1 - exp(-y))``, its log-determinant ``sum(-softplus(-x))``. Far below 0, where y would
    round to 0, it is the smallest positive number that has all of its digits: a round trip in float32 returns x down to
    -87, and in float64 down to -708. Of numbers below 0 the inverse is NaN, and that of 0 -inf; with its
    log-determinant, which is -inf there, x is that of 0.5.

    Examples:
        >>> Softplus().forward_and_log_det(torch.tensor([[0.0]]))
        (tensor([[0.6931]]), tensor([-0.6931]))
    """

    codomain = "positive"
    high = math.inf
    examples = [({}, (3,)), ({}, (2, 3, 2))]

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        # Not torch's softplus, which is the identity from 20 on, as it is in float32 only.
        return -functional.logsigmoid(-x).clamp(max=-torch.finfo(x.dtype).tiny)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return y + torch.log(-torch.expm1(-y))

    def _log_slope(self, x: Tensor) -> Tensor:
        return functional.logsigmoid(x)


def _log_slope_of_sigmoid(x: Tensor) -> Tensor:
    return functional.logsigmoid(x) + functional.logsigmoid(-x)


def _summed(log_slope: Tensor, outside: Tensor, like: Tensor) -> Tensor:
    """The log-determinant, ``(batch,)``: -inf for a sample with a number outside of the interval."""
    return log_slope.masked_fill(outside, -math.inf).flatten(1).sum(1).to(like.dtype)


def _floor(value: float, dtype: torch.dtype, *, inside: bool = False) -> float:
    """The largest number of this dtype that is at most a positive value, or below it if ``inside``."""
    unit = math.ldexp(torch.finfo(dtype).eps, math.frexp(value)[1] - 1)
    return (math.ceil(value / unit) - 1 if inside else math.floor(value / unit)) * unit
