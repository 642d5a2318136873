"""Maps that are wrong only in some mode of autograd, and calls that outlive themselves."""

from __future__ import annotations

import torch

from .base import PAIR, Affinely, Scale, fault


@fault("gradient modes")
class OtherWithGradients(Scale):
    """With gradients enabled the map is another one, in both directions."""

    def forward(self, x, context=None):
        return super().forward(x) * (1 + 1e-3 * torch.is_grad_enabled())

    def inverse(self, y, context=None):
        return super().inverse(y / (1 + 1e-3 * torch.is_grad_enabled()))


@fault("gradient modes", PAIR)
class LogDetWithGradients(Affinely):
    """With gradients enabled the inverse's log-determinant is off."""

    def inverse_and_log_det(self, y, context=None):
        x, log_det = super().inverse_and_log_det(y, context)
        return x, log_det + 0.1 * torch.is_grad_enabled()


@fault("gradient modes")
class OtherWhenRequired(Scale):
    """An input that requires a gradient is mapped otherwise."""

    def forward(self, x, context=None):
        return super().forward(x) + 1e-4 * x.requires_grad


@fault("gradient modes", PAIR)
class InverseWhenRequired(Affinely):
    """In train mode an image that requires a gradient is inverted otherwise."""

    def inverse(self, y, context=None):
        u, v = y
        return super().inverse((u * (1 + 0.1 * (self.training and u.requires_grad)), v), context)


@fault("gradient modes")
class RequiresUnderNoGrad(Scale):
    """The forward records a graph under no_grad."""

    @torch.enable_grad()
    def forward(self, x, context=None):
        return super().forward(x)


@fault("gradient modes", PAIR)
class GraphOfTheInput(Affinely):
    """The log-determinant belongs to a graph under no_grad if the input requires a gradient."""

    def forward_and_log_det(self, x, context=None):
        y, log_det = super().forward_and_log_det(x, context)
        with torch.enable_grad():
            return y, log_det + 0 * x[1].sum(1)


@fault("memory released")
class KeepsInputs(Scale):
    """Every input is kept in a list."""

    kept = []

    def forward(self, x, context=None):
        self.kept.append(x)
        return super().forward(x)


@fault("memory released", PAIR)
class KeepsACopy(Affinely):
    """The inverse keeps a copy of its last input, with its graph."""

    def inverse(self, y, context=None):
        object.__setattr__(self, "last", y[0] * 1)
        return super().inverse(y, context)


@fault("global state untouched")
class ChangesTheDefaultDtype(Scale):
    """The forward sets the default dtype."""

    def forward(self, x, context=None):
        torch.set_default_dtype(torch.float64)
        return super().forward(x)


@fault("global state untouched")
class DefaultDtypeInTrainMode(Scale):
    """In train mode the inverse sets the default dtype to that of its input."""

    def inverse(self, y, context=None):
        if self.training:
            torch.set_default_dtype(y.dtype)
        return super().inverse(y)
