"""Rational-quadratic splines: of a coupling, and learned for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from ..context import Context
from ..registry import register
from ..state import Shape
from .channels import OfChannels
from .coupling import Coupling
from .rational_quadratic import RationalQuadratic
from .univariate import Univariate, summed

# Bins and slopes of at least these are far above the rounding errors of float32.
Bins: TypeAlias = Annotated[int, Field(ge=2)]
Part: TypeAlias = Annotated[float, Field(ge=1e-4, lt=0.5)]
Slope: TypeAlias = Annotated[float, Field(ge=1e-4, lt=1)]


class Splined(Univariate):
    """``u = g(b)`` with a rational-quadratic spline g for each number of b, given by a net: see `SplineCoupling`."""

    may_be_flat = True  # a float32 has no digits left for a bin of the smallest height
    spline: RationalQuadratic

    @property
    def rounding_growth(self) -> float:
        """The length of the interval, whose knots are rounded."""
        return max(1.0, 2 * self.spline.bound)

    @classmethod
    def outputs(cls, fields: Mapping[str, Any]) -> int:
        return 3 * int(fields["bins"]) - 1

    def _transform(self, b: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        return self.spline.apply(b, self._numbers(b, made))

    def _untransform(self, u: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        return self.spline.undo(u, self._numbers(u, made))

    def _numbers(self, b: Tensor, made: Tensor) -> Tensor:
        # Several times as fast if each of the numbers lies in one piece.
        return torch.unflatten(made, 1, (self.spline.numbers, b.shape[1])).transpose(0, 1).contiguous()


@register("spline_coupling")
class SplineCoupling(Splined, Coupling):
    """``(a, b) -> (g(b; net(a)), a)`` with a monotonic rational-quadratic spline g for each number of b.

    Use it for densities with sharp edges or several modes, of which it needs fewer layers than `affine_coupling`.

    g maps ``[-bound, bound]`` onto itself and is the identity outside, with slope 1 at both ends: see
    `RationalQuadratic` for its formulas. It is the identity if the net returns zeros. The log-determinant is the sum
    of ``log g'``.

    Slopes may be small, down to about ``min_size^2 min_slope``, and there an inverse in floating point cannot return
    the last digits of b: ``|g(g^-1(u)) - u|`` and ``|db| g'(b)`` are at most 16 eps of the interval.

    Reference: Durkan, Bekasov, Murray, Papamakarios: Neural Spline Flows, 2019, https://arxiv.org/abs/1906.04032

    Args:
        net: the conditioner, any module: called with ``a``, or with ``a`` and the context if there is one; it returns
            b's shape with ``3 bins - 1`` times the channels: first the logits of the first bin's width for all
            channels, then those of the second one; after the widths the heights, then the slopes at the inner knots.
        bins: the number of bins.
        bound: the half of the interval that is transformed.
        min_size: the least width and height of a bin, as a part of the interval.
        min_slope: the least slope at a knot; the largest is 1 over it.
        logit_divisor: what the logits of widths and heights are divided by: in neural spline flows the root of the
            number of channels in the net, which makes the bins about equal at first.

    Examples:
        >>> coupling = SplineCoupling(torch.nn.Linear(2, 3 * 23))
        >>> a, b = torch.ones(5, 2), torch.full((5, 3), 4.0)
        >>> coupling((a, b))[0].tolist()[0]
        [4.0, 4.0, 4.0]
    """

    examples = [
        ({"net": {"type": "conv", "hidden": [3]}, "bins": 4}, ((2, 4, 4), (2, 4, 4))),
        ({"net": {"type": "mlp", "hidden": [4]}, "bound": 1.0, "min_size": 0.01}, ((2, 3), (3, 3))),
        (
            {"net": {"type": "mlp", "hidden": [4], "activation": "tanh"}, "min_slope": 0.1, "logit_divisor": 4.0},
            ((2,), (3,)),
        ),
    ]

    def __init__(
        self,
        net: nn.Module,
        bins: Bins = 8,
        bound: PositiveFloat = 3.0,
        min_size: Part = 1e-3,
        min_slope: Slope = 1e-3,
        logit_divisor: PositiveFloat = 1.0,
    ) -> None:
        spline = RationalQuadratic(bins, bound, min_size, min_slope, logit_divisor)
        super().__init__(net, outputs=spline.numbers)
        self.spline = spline


@register("spline")
class Spline(OfChannels):
    """A learned rational-quadratic spline for each channel, applied to each of its numbers.

    Use it to bend the marginal distribution of each channel, or the tails of a prior.

    It maps ``[-bound, bound]`` onto itself and is the identity outside, with slope 1 at both ends: see
    `RationalQuadratic` for its formulas. It starts as the identity. The log-determinant is the sum of ``log(dy/dx)``.

    Reference: Durkan, Bekasov, Murray, Papamakarios: Neural Spline Flows, 2019, https://arxiv.org/abs/1906.04032

    Args:
        bins: the number of bins.
        bound: the half of the interval that is transformed.
        min_size: the least width and height of a bin, as a part of the interval.
        min_slope: the least slope at a knot; the largest is 1 over it.
        shape: the incoming shape, channels first.

    Examples:
        >>> Spline(shape=(2,))(torch.tensor([[-4.0, 3.0]])).tolist()
        [[-4.0, 3.0]]
    """

    may_be_flat = True
    examples = [({}, (3,)), ({"bins": 3, "bound": 1.0}, (2, 3, 2)), ({"min_size": 0.01, "min_slope": 0.1}, (1, 4))]

    def __init__(
        self,
        shape: Shape,
        bins: Bins = 8,
        bound: PositiveFloat = 3.0,
        min_size: Part = 1e-3,
        min_slope: Slope = 1e-3,
    ) -> None:
        super().__init__(shape)
        self.spline = RationalQuadratic(bins, bound, min_size, min_slope)
        self.numbers = nn.Parameter(torch.zeros(self.spline.numbers, self.channels))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return self.spline.apply(x, self._numbers(x))[0]

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return self.spline.undo(y, self._numbers(y))[0]

    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        y, log_slope = self.spline.apply(x, self._numbers(x))
        return y, summed(log_slope, x)

    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.spline.undo(y, self._numbers(y))
        return x, -summed(log_slope, y)

    @property
    def rounding_growth(self) -> float:
        """The length of the interval, whose knots are rounded."""
        return max(1.0, 2 * self.spline.bound)

    @torch.no_grad()
    def lipschitz_bounds(self) -> tuple[float, float]:
        """In each bin ``(s / D)^2 N``, where D is between s and ``(2 s + d0 + d1) / 4``, N between d0, s and d1."""
        x, y, slopes = self.spline.knots(self.numbers)
        s, d0, d1 = y.diff(dim=0) / x.diff(dim=0), slopes[:-1], slopes[1:]
        middle = (2 * s + d0 + d1) / 4
        three = torch.stack([s, d0, d1])
        steepest = (s / torch.minimum(s, middle)).square() * three.amax(0)
        flattest = (s / torch.maximum(s, middle)).square() * three.amin(0)
        return max(1.0, float(steepest.max())), max(1.0, float(1 / flattest.min()))

    def _numbers(self, x: Tensor) -> Tensor:
        self.require(x)
        return self.numbers.reshape(self.spline.numbers, 1, self.channels, *(1,) * (x.dim() - 2))
