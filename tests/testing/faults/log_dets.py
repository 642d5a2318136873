"""Wrong log-determinants."""

from __future__ import annotations

import math

import torch

from invflow import Bijection
from invflow.bijections import Logit

from .base import IMAGE, PAIR, Affinely, ImageScale, Scale, fault


@fault("inverse log det")
class SignFlippedBackwards(Scale):
    """The inverse's log-determinant has the forward's sign."""

    def inverse_and_log_det(self, y, context=None):
        return self.inverse(y), self._log_det(y)


@fault("log det")
class SignFlippedForwards(Scale):
    """The forward's log-determinant has the inverse's sign."""

    def forward_and_log_det(self, x, context=None):
        return self(x), -self._log_det(x)


@fault("log det")
class LogDetZero(Scale):
    """The log-determinant is zero although the volume changes."""

    volume_preserving = True
    forward_and_log_det = Bijection.forward_and_log_det
    inverse_and_log_det = Bijection.inverse_and_log_det


@fault("log det form")
class LogDetFloat32(Scale):
    """The log-determinant is in float32 for a float64 input."""

    def _log_det(self, x):
        return super()._log_det(x).float()


@fault("log det")
class LogDetThroughFloat32(Scale):
    """The log-determinant is computed in float32 and cast back."""

    def _log_det(self, x):
        return self.log_scale.float().sum().to(x.dtype).expand(x.shape[0])


@fault("log det", IMAGE)
class LogDetOncePerChannel(ImageScale):
    """The log-determinant of a channel is counted once instead of once per position."""

    def _log_det(self, x):
        return self.log_scale.sum().to(x.dtype).expand(x.shape[0])


@fault("log det", IMAGE)
class LogDetMean(ImageScale):
    """The log-determinant is a mean over the channels."""

    def _log_det(self, x):
        return super()._log_det(x) / self.channels


@fault("log det form")
class LogDetScalar(Scale):
    """The log-determinant is one number for the whole batch."""

    def _log_det(self, x):
        return self.log_scale.sum().to(x.dtype)


@fault("log det form")
class LogDetKeepsDim(Scale):
    """The log-determinant has the shape (batch, 1)."""

    def _log_det(self, x):
        return super()._log_det(x)[:, None]


@fault("log det", PAIR)
class LogDetSumsTheBatch(Affinely):
    """The log-determinant is summed over the batch."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det.sum().expand_as(log_det)


@fault("gradients", PAIR)
class LogDetDetached(Affinely):
    """The log-determinant carries no gradient."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        return y, log_det.detach()


@fault("log det", PAIR)
class LogDetBeforeClamp(Affinely):
    """The log-determinant sums the log-scale before it is clamped."""

    def __init__(self):
        super().__init__(clamp=0.3)

    def forward_and_log_det(self, x, context=None):
        raw, _ = self.net(x[0]).chunk(2, 1)
        return self(x), raw.sum(1)


@fault("whole domain")
class LogitNearOne(Logit):
    """A logit computes 1 - p from p, which has lost it in float32 next to 1."""

    def __init__(self):
        super().__init__(alpha=1e-6)

    def forward(self, x, context=None):
        return self.forward_and_log_det(x)[0]

    def forward_and_log_det(self, x, context=None):
        p = self.alpha + (1 - 2 * self.alpha) * x
        slope = math.log(1 - 2 * self.alpha) - torch.log(p) - torch.log1p(-p)
        return torch.logit(p), slope.flatten(1).sum(1)


@fault("whole domain")
class ClampedDensity(Logit):
    """What lies outside the domain has the density of its ends."""

    def forward(self, x, context=None):
        return super().forward(x.clamp(0, 1))

    def forward_and_log_det(self, x, context=None):
        return super().forward_and_log_det(x.clamp(0, 1))
