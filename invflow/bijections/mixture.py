"""Couplings by mixtures of logistic distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from .._torch import transforms_active
from ..registry import register
from .coupling import Coupling

WIDEST = 7.0
"""The bound of the components' log-scales: slopes up to 1e3 leave float32 the digits that it needs."""

MOST_STEPS = 100
"""Evaluations for an inverse, usually below 10: of 10^6 random mixtures in float64 none took more than 65."""

FLATTEST = -60.0
"""The least log-slope by which a gradient of the inverse is divided: 1 over a smaller one is no number in float32."""


class Mixture(NamedTuple):
    """Mixtures of logistic distributions, each tensor ``(components, ...)``; the log-weights are normalised."""

    log_weights: Tensor
    means: Tensor
    log_scales: Tensor

    def logit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``L = log(F / (1 - F))`` for the cumulative distribution function F, and ``log(dL/dx)``.

        Both ends keep their digits, because log F and log(1 - F) are sums of positive terms each, and so is the slope:
        ``L' = sum_k (p_k (1 - F_k) + q_k F_k) / scale_k``, where p and q are the components' shares of F and 1 - F.
        """
        z = (x - self.means) * torch.exp(-self.log_scales)
        log_parts = functional.logsigmoid(torch.stack((z, -z)))
        weighted = self.log_weights + log_parts
        largest = weighted.detach().amax(1)
        smaller = weighted - largest[:, None]  # of large numbers, shares would be off by their rounding, and gradients
        log_below, log_above = (smaller.logsumexp(1) + largest).unbind(0)
        terms = smaller.log_softmax(1) + log_parts.flip(0) - self.log_scales
        return log_below - log_above, terms.flatten(0, 1).logsumexp(0)

    def quantile(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The x with ``L(x) = target``, and ``log(dL/dx)``, both differentiable, and their gradients too."""
        with torch.no_grad():
            x = self._solve(target)
        value, log_slope = self.logit(x)
        if torch.is_grad_enabled():
            # Newton steps of length 0 have the gradients of the implicit function; the second one, to second order.
            for _ in range(2):
                off = value - target
                x = x - (off - off.detach()) * torch.exp(-log_slope.clamp(min=FLATTEST))
                value, log_slope = self.logit(x)
        return x, log_slope

    def _solve(self, target: Tensor) -> Tensor:
        """Newton's method in a bracket, which is halved if a step leaves it or is not half as long as the last one.

        The bracket: at the least of the components' own quantiles no component is above its own target, so that F is
        not, and at the largest none is below.
        """
        ends = self.means + torch.exp(self.log_scales) * target
        low, high = ends.aminmax(dim=0)
        x, last = low + (high - low) / 2, high - low
        rounding = torch.finfo(target.dtype).eps * target.abs().clamp(min=1)
        watched = not (target.is_meta or transforms_active())  # its numbers can be looked at
        for _ in range(MOST_STEPS):
            value, log_slope = self.logit(x)
            off = value - target
            low, high = torch.where(off < 0, x, low), torch.where(off > 0, x, high)
            step = off * torch.exp(-log_slope)
            reached, length = x - step, step.abs()
            good = (reached >= low) & (reached <= high) & (length < last / 2)
            settled = ~(off.abs() > rounding) | (reached == x)  # or NaN
            if watched and bool(settled.all()):
                break
            last = torch.where(good, length, high - low)
            x = torch.where(settled, x, torch.where(good, reached, low + (high - low) / 2))
        return x


@register("mixture_coupling")
class MixtureCoupling(Coupling):
    """``(a, b) -> (exp(s) * L(b) + t, a)``, where L is the logit of the distribution function of a mixture.

    Use it for densities with several modes, as Flow++ does for images; its inverse takes an iteration.

    The mixture is one of logistic distributions for each number of b: ``L = log(F / (1 - F))`` with
    ``F(b) = sum_k weight_k sigmoid((b - mean_k) / scale_k)``. Weights, means, scales, s and t are computed from
    ``net(a)``, with ``s = clamp * tanh(r / clamp)`` and the components' log-scales likewise bounded by 7. If the net
    returns zeros, all components are equal and the coupling is the identity; training would keep them equal, so leave
    its ``zero_last`` off. The log-determinant is ``sum(s + log L')``.

    The inverse is found by an iteration, which ends when L is right to about eps ``max(1, |L|)``. Between components
    that are far apart L is flat, and there an inverse in floating point cannot return the last digits of b. It costs
    several evaluations of L, so that constant-memory training keeps the layer's input; their number depends on the
    numbers, so that `torch.compile` breaks the graph there.

    Reference: Ho, Chen, Srinivas, Duan, Abbeel: Flow++, 2019, https://arxiv.org/abs/1902.00275

    Args:
        net: the conditioner, any module: called with ``a``, or with ``a`` and the context if there is one; it returns
            b's shape with ``2 + 3 components`` times the channels: r, t, the logits of the weights, the means, and what
            the log-scales are before they are bounded, each for all channels.
        components: the number of distributions in a mixture.
        clamp: the bound of s.

    Examples:
        >>> coupling = MixtureCoupling(torch.nn.Linear(2, 3 * 26))
        >>> a, b = torch.ones(5, 2), torch.zeros(5, 3)
        >>> bool((coupling.inverse(coupling((a, b)))[1] - b).abs().max() < 1e-5)
        True
    """

    cheap_inverse = False
    may_be_flat = True
    traceable = False  # the steps of the inverse depend on the numbers
    examples = [
        ({"net": {"type": "conv", "hidden": [3]}, "components": 2}, ((2, 4, 4), (2, 4, 4))),
        ({"net": {"type": "mlp", "hidden": [4]}, "clamp": 0.5}, ((2, 3), (3, 3))),
        ({"net": {"type": "mlp", "hidden": [4], "activation": "tanh"}, "components": 3}, ((2,), (3,))),
    ]

    def __init__(self, net: nn.Module, components: PositiveInt = 8, clamp: PositiveFloat = 2.0) -> None:
        super().__init__(net, outputs=2 + 3 * components)
        self.components = components
        self.clamp = clamp

    @classmethod
    def outputs(cls, fields: Mapping[str, Any]) -> int:
        return 2 + 3 * int(fields["components"])

    def _transform(self, b: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, mixture = self._parts(b, made)
        value, log_slope = mixture.logit(b.to(shift.dtype))
        return torch.addcmul(shift, log_scale.exp(), value).to(b.dtype), (log_scale + log_slope).to(b.dtype)

    def _untransform(self, u: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift, mixture = self._parts(u, made)
        b, log_slope = mixture.quantile(torch.exp(-log_scale) * (u.to(shift.dtype) - shift))
        return b.to(u.dtype), (log_scale + log_slope).to(u.dtype)

    def _parts(self, b: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Mixture]:
        """The log-scale s, the shift t, and the mixtures."""
        # Several times as fast if each of the numbers lies in one piece; half precision has not the digits.
        numbers = torch.unflatten(made, 1, (2 + 3 * self.components, b.shape[1])).transpose(0, 1).contiguous()
        wide = numbers.to(torch.promote_types(b.dtype, torch.float32))
        raw, shift, weights, means, scales = torch.split(wide, [1, 1, *[self.components] * 3])
        log_scale = self.clamp * torch.tanh(raw[0] / self.clamp)
        return log_scale, shift[0], Mixture(weights.log_softmax(0), means, WIDEST * torch.tanh(scales / WIDEST))
