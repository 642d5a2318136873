"""Modules that PyTorch features do not work with, and chains that are wired wrongly."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import nn

from invflow import Bijection, Inverse, Sequential
from invflow.bijections import Affine, Each, Linear1x1, Permute

from .base import IMAGE, VECTOR, Scale, fault


@fault("pickles")
class Unpicklable(Scale):
    """A lambda among the attributes does not pickle."""

    def __init__(self):
        super().__init__()
        self.function = lambda x: x


@fault("deepcopies")
class Uncopyable(Scale):
    """The module cannot be copied."""

    def __init__(self):
        super().__init__()
        self.view = MappingProxyType({})


@fault("state dict")
class NotInTheStateDict(Bijection):
    """A weight is missing from the state_dict."""

    volume_preserving = True

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(4))

    def forward(self, x, context=None):
        return x + self.shift

    def inverse(self, y, context=None):
        return y - self.shift

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, *arguments):
        pass


@fault("handling", (12,))
class AverageLosesAChannel(Bijection):
    """An order is a buffer of integers, which averages truncate."""

    volume_preserving = True

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.arange(12).flip(0))

    def forward(self, x, context=None):
        return x.index_select(1, self.order)

    def inverse(self, y, context=None):
        return y.index_select(1, self.order.argsort())


@fault("handling")
class LostOnMeta(Scale):
    """A buffer that is not in the state_dict has no values after loading on the meta device."""

    def __init__(self):
        super().__init__()
        self.register_buffer("unit", torch.full((4,), 2.0), persistent=False)

    def forward(self, x, context=None):
        return super().forward(x / self.unit)

    def inverse(self, y, context=None):
        return super().inverse(y) * self.unit

    def forward_and_log_det(self, x, context=None):
        return self(x), super().forward_and_log_det(x / self.unit)[1] - self.unit.log().sum()

    def inverse_and_log_det(self, y, context=None):
        return self.inverse(y), super().inverse_and_log_det(y)[1] + self.unit.log().sum()


@fault("handling")
class AveragedBeforeItWasSet(Scale):
    """A scale from data, and a flag that hides that an average began before it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))

    @property
    def awaits_data(self):
        return not self.ready

    @torch.no_grad()
    def initialize(self, x, context=None):
        self.log_scale.copy_(-x.std(0).log())
        self.ready.fill_(True)


@fault("meta device")
class ReadsValues(Scale):
    """A branch reads the values of the weights, which the meta device does not have."""

    def forward(self, x, context=None):
        if self.log_scale.abs().max() > 100:
            raise ValueError("scale too large")
        return super().forward(x)


@fault("autocast", IMAGE)
class LosesDigitsUnderAutocast(Linear1x1):
    """Under autocast the output is in bfloat16."""

    def __init__(self):
        super().__init__(IMAGE)

    def forward(self, x, context=None):
        lower, upper = self._factors()
        return self._shaped((lower @ (upper @ self._columns(x))).index_select(0, self.order), x)


@fault("vmap")
class BreaksVmap(Scale):
    """The forward reads a Python number from the input."""

    def forward(self, x, context=None):
        return (
            super().forward(x) + 0 * float(x.detach().flatten()[0].nan_to_num(0)) if x.numel() else super().forward(x)
        )


@fault("round trip")
class Raises(Scale):
    """The inverse raises."""

    def inverse(self, y, context=None):
        raise RuntimeError("singular matrix")


@fault("compiles")
class BreaksTheGraph(Scale):
    """The forward breaks the compiler's graph."""

    def forward(self, x, context=None):
        torch._dynamo.graph_break()
        return super().forward(x)


@fault("log det")
class ChainForgetsALogDet(Sequential):
    """A chain forgets the first layer's log-determinant."""

    def __init__(self):
        super().__init__(Scale(), Affine(VECTOR))

    def forward_and_log_det(self, x, context=None):
        return self[1].forward_and_log_det(self[0](x))


@fault("round trip")
class ChainInTheSameOrder(Sequential):
    """A chain inverts its layers in the order of the forward."""

    def __init__(self):
        super().__init__(Scale(), Permute(order=[1, 2, 3, 0]))

    def inverse(self, y, context=None):
        for layer in self:
            y = layer.inverse(y)
        return y


@fault("log det", ((4,), (4,)))
class EachCountsOnce(Each):
    """A layer applied to two tensors counts its log-determinant once."""

    def __init__(self):
        super().__init__(Scale())

    def forward_and_log_det(self, x, context=None):
        return self(x), self.layer.forward_and_log_det(x[0])[1]


@fault("inverse log det")
class InverseKeepsTheSign(Inverse):
    """An inverse keeps the layer's log-determinant for both directions."""

    def __new__(cls):
        return nn.Module.__new__(cls)

    def __init__(self):
        super().__init__(Scale())

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y)
        return x, -log_det


@fault("gradients", IMAGE)
class CutOff(Permute):
    """A permutation detaches the gradient."""

    def __init__(self):
        super().__init__(seed=0, shape=IMAGE)

    def forward(self, x, context=None):
        return super().forward(x.detach())


@fault("nan contained", IMAGE)
class Mixing(Permute):
    """A permutation spreads a NaN of one sample to the others."""

    def __init__(self):
        super().__init__(seed=0, shape=IMAGE)

    def forward(self, x, context=None):
        return super().forward(x) + 0 * x.sum()
