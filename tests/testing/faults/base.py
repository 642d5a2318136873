"""The decorator that plants a fault, and the sound bijections that faults start from."""

from __future__ import annotations

import torch

import invflow
from invflow import Bijection, Sequential
from invflow.bijections import ActNorm, AdditiveCoupling, Affine, AffineCoupling, Linear1x1, Merge, Psi, Split
from invflow.bijections.channels import everywhere
from invflow.nets import MLP, Conv

FAULTS = {}
"""Description of the fault -> (class, input shape, context shape, the property that must find it)."""

VECTOR = (4,)
IMAGE = (2, 2, 3)
PAIR = ((2,), (3,))
CONTEXT = (2,)


def fault(found_by, shape=VECTOR, context_shape=None):
    """Plants a faulty class; its docstring describes the fault."""

    def decorate(cls):
        name = " ".join(cls.__doc__.split()).rstrip(".")
        assert name not in FAULTS
        FAULTS[name] = (cls, shape, context_shape, found_by)
        return cls

    return decorate


def net(outputs, context_shape=None):
    return MLP((2,), (outputs,), context_shape, hidden=[4], activation="tanh")


class Affinely(AffineCoupling):
    def __init__(self, context_shape=None, clamp=2.0):
        super().__init__(net(6, context_shape), clamp)


class Additively(AdditiveCoupling):
    def __init__(self):
        super().__init__(net(3))


class Scale(Affine):
    """Its calls are made of two, each of which a fault can override."""

    shape = VECTOR

    def __init__(self):
        super().__init__(self.shape)
        with torch.no_grad():
            self.log_scale.copy_(torch.linspace(-0.5, 0.7, self.channels))

    def forward_and_log_det(self, x, context=None):
        return self(x), self._log_det(x)

    def inverse_and_log_det(self, y, context=None):
        return self.inverse(y), -self._log_det(y)

    def _log_det(self, x):
        return everywhere(self.log_scales().sum(), x)


class ImageScale(Scale):
    shape = IMAGE


class Residual(Bijection):
    """``y = x + 0.7 tanh(x)``, inverted by fixed-point iteration."""

    steps = 200

    def forward(self, x, context=None):
        return x + 0.7 * torch.tanh(x)

    def inverse(self, y, context=None):
        x = y
        for _ in range(self.steps):
            x = y - 0.7 * torch.tanh(x)
        return x

    def forward_and_log_det(self, x, context=None):
        return self(x), torch.log1p(0.7 / torch.cosh(x.clamp(-50, 50)) ** 2).sum(1)

    def inverse_and_log_det(self, y, context=None):
        x = self.inverse(y)
        return x, -self.forward_and_log_det(x)[1]


def in_numerics(mode):
    coupling = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [3], "norm": "batch"}}
    layers = [{"type": "psi", "block_size": 2}, {"type": "split"}, coupling, coupling, {"type": "merge"}]
    declared = {"shape": (1, 4, 6), "context_shape": CONTEXT}
    return invflow.build({"input": declared, "layers": layers, "numerics": {"mode": mode}})


def healthy():
    """Sound bijections similar to the faulty ones, which must not be flagged."""
    return {
        "scale": (Scale(), VECTOR, None),
        "image scale": (ImageScale(), IMAGE, None),
        "coupling": (Affinely(), PAIR, None),
        "context": (Affinely(CONTEXT), PAIR, CONTEXT),
        "residual": (Residual(), VECTOR, None),
        **{f"{mode} chain": (in_numerics(mode), (1, 4, 6), CONTEXT) for mode in ("snap", "grid", "exact")},
        "chain": (
            Sequential(
                Psi(2),
                ActNorm((4, 2, 2)),
                Linear1x1((4, 2, 2)),
                Split(),
                AffineCoupling(Conv((2, 2, 2), (4, 2, 2), hidden=[4])),
                AdditiveCoupling(Conv((2, 2, 2), (2, 2, 2), norm="batch", final_activation=True)),
                Merge(),
            ),
            (1, 4, 4),
            None,
        ),
    }
