"""Fixed maps of single numbers."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from ..bijection import Bijection
from ..registry import register


@register("logit")
class Logit(Bijection):
    """``y = log(p / (1 - p))`` with ``p = alpha + (1 - 2 alpha) x``, elementwise: from pixels in [0, 1] to the reals.

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

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        p, q = self._probabilities(x)
        return torch.log(p / q)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        # The half width is rounded down, so that no image lies outside, where it would have no density.
        below, above = (_floor(end, y.dtype, inside=True) for end in self._ends)
        return 0.5 + torch.tanh(y / 2) * _floor(min(above - 0.5, below + 0.5), y.dtype)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p, q = self._probabilities(x)
        inverse_slope = p * q * sum(self._ends)
        outside = inverse_slope <= 0
        slope = -torch.log(inverse_slope.masked_fill(outside, math.inf))
        return torch.log((p / q).masked_fill(outside, 1.0)), slope.flatten(1).sum(1)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        slope = functional.logsigmoid(y) + functional.logsigmoid(-y) + math.log(sum(self._ends))
        return self.inverse(y, context), slope.flatten(1).sum(1)

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


def _floor(value: float, dtype: torch.dtype, *, inside: bool = False) -> float:
    """The largest number of this dtype that is at most a positive value, or below it if ``inside``."""
    unit = math.ldexp(torch.finfo(dtype).eps, math.frexp(value)[1] - 1)
    return (math.ceil(value / unit) - 1 if inside else math.floor(value / unit)) * unit
