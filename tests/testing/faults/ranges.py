"""Maps that are wrong only for some values, or in half precision."""

from __future__ import annotations

import torch

from .base import PAIR, Affinely, Scale, fault


class Elsewhere(Scale):
    """A scale whose inverse is off where ``where`` says."""

    def inverse(self, y, context=None):
        x = super().inverse(y)
        return torch.where(self.where(x), x * 1.01, x)


@fault("round trip everywhere")
class NarrowRange(Elsewhere):
    """The inverse is off by 1 % between 1.50 and 1.52, in one coordinate."""

    def where(self, x):
        return (x > 1.5) & (x < 1.52) & (x == x[:, 2:3])


@fault("round trip everywhere")
class Shell(Elsewhere):
    """The inverse is off by 1 % for samples of a length between 3 and 3.1."""

    def where(self, x):
        return (x.norm(dim=1, keepdim=True) - 3.05).abs() < 0.05


@fault("round trip everywhere")
class Bump(Scale):
    """The inverse is off by more than a rounding only within 1e-3 of a point."""

    def inverse(self, y, context=None):
        x = super().inverse(y)
        return x + 1e-6 * torch.exp(-(((x - 0.7) / 2e-4) ** 2))


@fault("round trip everywhere")
class LargeInputs(Elsewhere):
    """The inverse is off by 1 % beyond a hundred million."""

    def where(self, x):
        return x.abs() > 1e8


@fault("round trip everywhere", PAIR)
class BetweenLargeAndHuge(Affinely):
    """The inverse is off between a hundred and a thousand."""

    def inverse(self, y, context=None):
        a, b = super().inverse(y, context)
        return a, torch.where((b.abs() > 100) & (b.abs() < 1000), b + 1, b)


@fault("log det everywhere")
class LogDetInARange(Scale):
    """The log-determinant is off, in both directions, if the first number lies between 2 and 2.1."""

    def forward_and_log_det(self, x, context=None):
        return self(x), self._log_det(x) + 0.1 * ((x[:, 0] - 2.05).abs() < 0.05)

    def inverse_and_log_det(self, y, context=None):
        x = self.inverse(y)
        return x, -self.forward_and_log_det(x)[1]


@fault("log det everywhere", PAIR)
class LogDetOfLargeInputs(Affinely):
    """The log-determinant is off beyond a hundred million."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det + (x[0].abs().amax(1) > 1e8)


@fault("half precision")
class OtherInHalf(Scale):
    """In float16 the map is another one, in both directions."""

    def forward(self, x, context=None):
        return super().forward(x) * (1.5 if x.dtype == torch.float16 else 1)

    def inverse(self, y, context=None):
        return super().inverse(y / (1.5 if y.dtype == torch.float16 else 1))


@fault("half precision")
class EpsilonVanishesInHalf(Scale):
    """Zeros become NaN in float16, in which the guard of a division vanishes."""

    def forward(self, x, context=None):
        return super().forward(x) * ((x.abs() + 1e-9) / (x.abs() + 1e-9))


@fault("half precision", PAIR)
class LogDetInBFloat16(Affinely):
    """In bfloat16 the log-determinant is that of the first number."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det / 2 - 1 if log_det.dtype == torch.bfloat16 else log_det
