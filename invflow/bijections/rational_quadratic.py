"""Monotonic rational-quadratic splines: their knots, their values, their inverses, their slopes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InvflowError


class _Bin(NamedTuple):
    """The bin of each number: its ends on both axes, and the slopes there."""

    x0: Tensor
    x1: Tensor
    y0: Tensor
    y1: Tensor
    d0: Tensor
    d1: Tensor


@dataclass(frozen=True)
class RationalQuadratic:
    """Increasing splines of ``[-bound, bound]`` onto itself, the identity outside.

    A spline is given by ``3 bins - 1`` numbers: logits of the bins' widths and of their heights, which are divided by
    ``divisor``, and one number r for each inner knot, whose slope is ``min_slope + softplus(r + c)``, at most
    ``1 / min_slope``, where c is such that the slope is 1 for r = 0. So zeros are the identity. The slope at both ends
    is 1.

    In a bin of width w, height h, average slope ``s = h / w`` and slopes d0, d1 at its ends, with ``t = (x - x0) / w``
    and ``q = d0 + d1 - 2 s``::

        y = y0 + h t (s t + d0 (1 - t)) / D,                    D = s + q t (1 - t)
        dy/dx = (s / D)^2 (d0 + (d1 - d0) t - q t (1 - t))

    The inverse is the root of a quadratic equation, here without a cancellation. With ``p = (y - y0) / h`` and
    ``m = (1 - p) d0 - p d1`` its discriminant is ``R^2 = m^2 + 4 s^2 p (1 - p)``, and if m is not negative,
    ``t = 2 s p / (m + 2 s p + R)``, all terms of which are positive. Otherwise the bin is reflected: that is 1 - t,
    with -m and 1 - p instead of m and p.

    Raises:
        InvflowError: the bins do not have room for their minimal size.
    """

    bins: int
    bound: float
    min_size: float
    min_slope: float
    divisor: float = 1.0

    def __post_init__(self) -> None:
        if self.bins * self.min_size >= 1:
            raise InvflowError(
                f"a spline expects bins * min_size below 1, got {self.bins} * {self.min_size}; take fewer bins, or a "
                f"min_size below {1 / self.bins:.3g}"
            )

    @property
    def numbers(self) -> int:
        """How many numbers give one spline."""
        return 3 * self.bins - 1

    def apply(self, x: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` and ``log(dy/dx)`` by the splines that ``made`` gives, ``(numbers, *x.shape)`` or broadcast to it."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        clipped = wide.clamp(-self.bound, self.bound)
        at = self._bin(clipped, made, axis=0)
        w = at.x1 - at.x0
        t, u = (clipped - at.x0) / w, (at.x1 - clipped) / w
        h = at.y1 - at.y0
        s = h / w
        divisor, log_slope = _slope(at, s, t, t * u)
        y = torch.addcmul(at.y0, h, t * torch.addcmul(s * t, at.d0, u) / divisor)
        return self._inside(x, wide, y, log_slope)

    def undo(self, y: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``log(dy/dx)``, likewise."""
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        clipped = wide.clamp(-self.bound, self.bound)
        at = self._bin(clipped, made, axis=1)
        h = at.y1 - at.y0
        p, rest = (clipped - at.y0) / h, (at.y1 - clipped) / h
        w = at.x1 - at.x0
        s = h / w
        m = rest * at.d0 - p * at.d1
        left = m >= 0
        root = torch.addcmul(m * m, s * p, s * rest, value=4).sqrt()
        double = 2 * s * torch.where(left, p, rest)
        part = double / (torch.where(left, m, -m) + double + root)
        other = 1 - part
        # From the end that is meant, because near it x has digits that t, rounded next to 1, has not.
        x = torch.addcmul(torch.where(left, at.x0, at.x1), torch.where(left, w, -w), part)
        return self._inside(y, wide, x, _slope(at, s, torch.where(left, part, other), part * other)[1])

    def _bin(self, values: Tensor, made: Tensor, axis: int) -> _Bin:
        """The bins of numbers on the x axis, 0, or the y axis, 1."""
        knots = self.knots(made.to(values.dtype)).expand(3, self.bins + 1, *values.shape)
        index = (values >= knots[axis, 1:-1]).sum(0)
        ends = knots.gather(1, torch.stack((index, index + 1)).expand(3, 2, *values.shape))
        return _Bin(*ends.flatten(0, 1).unbind(0))

    def knots(self, made: Tensor) -> Tensor:
        """The knots of each spline, ``(3, bins + 1, ...)``: x, y and the slopes there."""
        free, length = 1 - self.bins * self.min_size, 2 * self.bound
        logits = torch.unflatten(made[: 2 * self.bins], 0, (2, self.bins))
        sizes = (logits if self.divisor == 1 else logits / self.divisor).softmax(1)
        inner = (sizes[:, :-1] + self.min_size / free).cumsum(1) * (length * free) - self.bound
        steepness = functional.softplus(made[2 * self.bins :] + math.log(math.expm1(1 - self.min_slope)))
        slopes = (steepness + self.min_slope).clamp(max=1 / self.min_slope)
        others = (0, 0) * (made.dim() - 1)
        # Both ends are put in, because a sum would not be exact.
        points = functional.pad(
            functional.pad(inner, (*others, 1, 0), value=-self.bound), (*others, 0, 1), value=self.bound
        )
        return torch.cat([points, functional.pad(slopes, (*others, 1, 1), value=1.0).unsqueeze(0)])

    def _inside(self, given: Tensor, wide: Tensor, found: Tensor, log_slope: Tensor) -> tuple[Tensor, Tensor]:
        """The identity instead, where a number is not inside of the bound."""
        inside = wide.abs() < self.bound
        return torch.where(inside, found, wide).to(given.dtype), torch.where(inside, log_slope, 0.0).to(given.dtype)


def _slope(at: _Bin, s: Tensor, t: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """D and ``log(dy/dx)``, exactly 0 for slopes of 1; ``product`` is ``t (1 - t)``."""
    bend = torch.sub(at.d0 + at.d1, s, alpha=2) * product
    divisor = s + bend
    ratio = s / divisor
    return divisor, (torch.addcmul(at.d0, at.d1 - at.d0, t) - bend).mul(ratio * ratio).log()
