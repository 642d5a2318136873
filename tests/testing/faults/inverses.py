"""Wrong inverses, and wrong shapes."""

from __future__ import annotations

import torch
from torch import nn

from invflow import Bijection
from invflow.bijections import AdditiveCoupling, Permute, Psi
from invflow.nets import MLP

from .base import CONTEXT, PAIR, Additively, Affinely, Residual, Scale, fault


@fault("round trip")
class OtherPermutation(Permute):
    """The inverse is off by one permutation."""

    def __init__(self):
        super().__init__(order=[1, 2, 3, 0])

    def inverse(self, y, context=None):
        return y.index_select(1, self.order)


@fault("round trip", PAIR, CONTEXT)
class InverseIgnoresContext(Affinely):
    """The inverse ignores the context."""

    def __init__(self):
        super().__init__(CONTEXT)

    def inverse(self, y, context=None):
        return super().inverse(y, None if context is None else torch.zeros_like(context))


@fault("context", PAIR, CONTEXT)
class ContextCached(Affinely):
    """The inverse uses the context of the last forward call."""

    def __init__(self):
        super().__init__(CONTEXT)

    def forward(self, x, context=None):
        object.__setattr__(self, "_last", context)
        return super().forward(x, context)

    def inverse(self, y, context=None):
        last = getattr(self, "_last", None)
        return super().inverse(y, context if last is None or len(last) != len(y[0]) else last)


@fault("round trip", PAIR)
class ClampDiffers(Affinely):
    """The scale's clamp differs between the directions."""

    def __init__(self):
        super().__init__(clamp=0.5)

    def inverse(self, y, context=None):
        u, v = y
        raw, shift = self.net(v).chunk(2, 1)
        return v, torch.exp(-torch.tanh(raw)) * (u - shift)


@fault("round trip", PAIR)
class TrainEvalMismatch(Additively):
    """In train mode the inverse uses running statistics, and the forward those of the batch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x, context=None):
        a, b = x
        return self.net(self.norm(a)) + b, a

    def inverse(self, y, context=None):
        u, v = y
        self.norm.eval()
        normed = self.norm(v)
        self.norm.train(self.training)
        return v, u - self.net(normed)


@fault("round trip", PAIR)
class MovesWhenCalled(Additively):
    """A buffer of the weights moves with every call in train mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("norm", torch.ones(()))

    def _condition(self, a, b, context):
        if self.training:
            self.norm.mul_(0.9)
        return super()._condition(a, b, context) * self.norm


@fault("round trip")
class ThroughFloat32(Scale):
    """Precision is lost through a float32 buffer."""

    def forward(self, x, context=None):
        return super().forward(x.float().to(x.dtype) if x.dtype == torch.float64 else x)


@fault("round trip")
class InverseInFloat32(Scale):
    """The inverse computes in float32."""

    def inverse(self, y, context=None):
        return super().inverse(y.float()).to(y.dtype)


@fault("round trip")
class DropsHalf(Bijection):
    """Half of the dimensions are dropped and redrawn."""

    volume_preserving = True

    def forward(self, x, context=None):
        return torch.cat([x[:, :2], torch.randn_like(x[:, 2:])], 1)

    def inverse(self, y, context=None):
        return torch.cat([y[:, :2], torch.randn_like(y[:, 2:])], 1)


@fault("inverse round trip")
class FactorOut(Bijection):
    """Factored-out dimensions are resampled by the inverse."""

    volume_preserving = True

    def forward(self, x, context=None):
        return x

    def inverse(self, y, context=None):
        return torch.cat([y[:, :2], torch.zeros_like(y[:, 2:])], 1)


@fault("round trip")
class StoppedEarly(Residual):
    """An iterative inverse is stopped early."""

    steps = 12


@fault("inverse gradients")
class InverseDetached(Residual):
    """An iterative inverse carries no gradient."""

    def inverse(self, y, context=None):
        with torch.no_grad():
            return super().inverse(y)


@fault("inverse round trip")
class NotOnto(Bijection):
    """The map is not surjective: both directions take absolute values."""

    volume_preserving = True

    def forward(self, x, context=None):
        return x.abs()

    def inverse(self, y, context=None):
        return y.abs()


@fault("round trip", ((2,), (2,)))
class HalvesSwapped(AdditiveCoupling):
    """The inverse returns the halves in the wrong order."""

    def __init__(self):
        super().__init__(MLP((2,), (2,)))

    def inverse(self, y, context=None):
        return super().inverse(y)[::-1]


@fault("round trip", (1, 4, 4))
class OtherLayout(Psi):
    """The inverse swaps rows and columns."""

    def __init__(self):
        super().__init__(2)

    def inverse(self, y, context=None):
        return super().inverse(y).transpose(2, 3)


@fault("round trip")
class EpsilonInTheScale(Scale):
    """The forward divides by the scale plus 1e-8, the inverse multiplies by the scale alone."""

    def forward(self, x, context=None):
        return x / (torch.exp(-self.log_scale) + 1e-8) + self.shift


@fault("round trip")
class FailsOnHuge(Scale):
    """The forward clamps values to a million."""

    def forward(self, x, context=None):
        return super().forward(x.clamp(-1e6, 1e6))


@fault("shapes", (1, 4, 4))
class WrongOutputShape(Psi):
    """output_shape forgets the block."""

    def __init__(self):
        super().__init__(2)

    def output_shape(self, shape):
        return shape


@fault("shapes", (1, 4, 4))
class WrongInputShape(Psi):
    """input_shape is that of the output."""

    def __init__(self):
        super().__init__(2)

    def input_shape(self, shape):
        return shape


@fault("empty batch")
class EmptyBatch(Scale):
    """An empty batch raises."""

    def forward(self, x, context=None):
        assert x.abs().max() >= 0
        return super().forward(x)


@fault("dtype kept")
class Upcasts(Scale):
    """The output comes in float64 for float32."""

    def forward(self, x, context=None):
        return super().forward(x).double()


@fault("dtype kept")
class PlainTensor(Bijection):
    """A weight is a plain attribute, which no .to() moves."""

    volume_preserving = True

    def __init__(self):
        super().__init__()
        self.scale = torch.full((4,), 1.1, dtype=torch.float64)

    def forward(self, x, context=None):
        return x * self.scale

    def inverse(self, y, context=None):
        return y / self.scale

    def forward_and_log_det(self, x, context=None):
        return self(x), self.scale.log().sum().expand(len(x)).to(x.dtype)

    def inverse_and_log_det(self, y, context=None):
        return self.inverse(y), -self.scale.log().sum().expand(len(y)).to(y.dtype)
