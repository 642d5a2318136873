"""Couplings that scale and shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from ..registry import register
from .coupling import Coupling


@register("affine_coupling")
class AffineCoupling(Coupling):
    """``(a, b) -> (exp(s) * b + t, a)`` with ``s = clamp * tanh(r / clamp)`` and ``(r, t) = net(a)``.

    Its inverse is ``(u, v) -> (v, exp(-s) * (u - t))``, its log-determinant ``sum(s)``. The log-scale is bounded, so
    that no coupling stretches or shrinks by more than ``exp(clamp)``.

    Reference: Dinh, Sohl-Dickstein, Bengio: Real NVP, 2016, https://arxiv.org/abs/1605.08803

    Args:
        net: the conditioner, any module: called with ``a``, or with ``a`` and the context if there is one; it returns
            b's shape with twice the channels, first r and then t.
        clamp: the bound of the log-scale.

    Examples:
        >>> import torch
        >>> coupling = AffineCoupling(torch.nn.Linear(2, 6))
        >>> y, log_det = coupling.forward_and_log_det((torch.ones(5, 2), torch.zeros(5, 3)))
        >>> log_det.shape
        torch.Size([5])
    """

    examples = [
        ({"net": {"type": "conv", "hidden": [3]}}, ((2, 4, 4), (2, 4, 4))),
        ({"net": {"type": "conv", "hidden": [4], "norm": "batch"}, "clamp": 0.5}, ((1, 3, 2), (3, 3, 2))),
        ({"net": {"type": "mlp", "hidden": [4], "activation": "tanh"}}, ((2,), (3,))),
    ]

    def __init__(self, net: nn.Module, clamp: PositiveFloat = 2.0) -> None:
        super().__init__(net, outputs=2)
        self.clamp = clamp

    @classmethod
    def outputs(cls, fields: Mapping[str, Any]) -> int:
        return 2

    def _transform(self, b: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(made)
        return torch.addcmul(shift, log_scale.exp(), b), log_scale

    def _untransform(self, u: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(made)
        return torch.exp(-log_scale) * (u - shift), log_scale

    def _condition(self, a: Tensor, b: Tensor, context: Tensor | None) -> Tensor:
        # Under autocast the net may return bfloat16, in which exp and sums would lose digits.
        return super()._condition(a, b, context).to(b.dtype)

    def _scale_and_shift(self, made: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = made.chunk(2, dim=1)
        # Of a view that is not contiguous, tanh takes several times as long.
        if self.clamp == 1:
            return torch.tanh(raw.contiguous()), shift
        return self.clamp * torch.tanh(raw / self.clamp), shift
