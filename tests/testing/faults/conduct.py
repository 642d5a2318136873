"""Side effects on the caller's tensors, on the module and on other samples."""

from __future__ import annotations

import torch
from torch import nn

from invflow import Bijection
from invflow.bijections import ActNorm

from .base import IMAGE, PAIR, VECTOR, Additively, Scale, fault


@fault("input untouched")
class InPlace(Scale):
    """The forward changes its input in place."""

    def forward(self, x, context=None):
        return x.mul_(self.log_scale.exp()).add_(self.shift)


@fault("input untouched", PAIR)
class InPlaceInverse(Additively):
    """The inverse subtracts in place."""

    def inverse(self, y, context=None):
        u, v = y
        return v, u.sub_(self.net(v))


@fault("module untouched")
class CountsCalls(Scale):
    """A buffer counts the calls, in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x, context=None):
        self.calls += 1
        return super().forward(x)


@fault("module untouched")
class DrawsRandomNumbers(Scale):
    """A call in eval mode draws random numbers that it does not use."""

    def forward(self, x, context=None):
        torch.rand(1)
        return super().forward(x)


@fault("module untouched")
class InitializesItself(ActNorm):
    """ActNorm initializes itself in the first call, in eval mode too."""

    def __init__(self):
        super().__init__(VECTOR)

    def forward(self, x, context=None):
        if len(x):
            self.initialize(x)
        return super().forward(x)


@fault("no memory")
class KeepsState(Bijection):
    """The inverse uses what the last forward call stored."""

    volume_preserving = True

    def forward(self, x, context=None):
        object.__setattr__(self, "_mean", x.detach().mean())
        return x - self._mean

    def inverse(self, y, context=None):
        return y + getattr(self, "_mean", 0.0)


@fault("batch independence")
class MixesTheBatch(Bijection):
    """The batch's mean is added to every sample."""

    volume_preserving = True

    def forward(self, x, context=None):
        return x + x.mean(0) if len(x) else x

    def inverse(self, y, context=None):
        return y - y.mean(0) / 2 if len(y) else y


@fault("nan contained")
class NaNSpreads(Bijection):
    """A NaN in one sample reaches the others through a product with zero."""

    volume_preserving = True

    def forward(self, x, context=None):
        return x + 0 * x.sum()

    def inverse(self, y, context=None):
        return y + 0 * y.sum()


@fault("memory layout", IMAGE)
class ReadsStrides(Bijection):
    """The memory is read as if it were contiguous."""

    volume_preserving = True

    def forward(self, x, context=None):
        return torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride()).flip(1)

    def inverse(self, y, context=None):
        return self(y)


@fault("plain call")
class PlainDiffers(Scale):
    """The call with the log-determinant forgets the shift."""

    def __init__(self):
        super().__init__()
        nn.init.ones_(self.shift)

    def forward_and_log_det(self, x, context=None):
        return x * self.log_scale.exp(), self._log_det(x)


@fault("gradients")
class NoGradient(Scale):
    """The forward is cut off from its weights."""

    def forward(self, x, context=None):
        return x * self.log_scale.detach().exp() + self.shift


@fault("determinism")
class Jitters(Bijection):
    """Noise below every tolerance makes two calls differ."""

    volume_preserving = True

    def forward(self, x, context=None):
        return x * (1 + 1e-15 * torch.rand(1, dtype=x.dtype))

    def inverse(self, y, context=None):
        return y
