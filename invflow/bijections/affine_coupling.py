"""Couplings that scale and shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from ..context import Context
from ..errors import InvflowError
from ..registry import register
from .coupling import Coupling
from .univariate import Univariate

Scale: TypeAlias = Literal["tanh", "atan", "soft_clip", "sigmoid", "twice_sigmoid", "exp"]

_BOUNDED: tuple[Scale, ...] = ("tanh", "atan", "soft_clip")
"""The scales with a clamp."""

CLAMP = 2.0
"""The default bound of log-scales, also if the scale has a bound of its own."""

_FARTHEST = 10.0
"""Where log-scales end if their function does not bound them. No dtype overflows at a scale of exp(10), 22,026, or its
inverse, and a number scaled by that keeps two decimal digits in float32 beside one that is not: enough to invert."""


# Each gives the log-scale, from r, the clamp and the floor.


def _tanh(raw: Tensor, clamp: float, floor: float) -> Tensor:
    # Of a view that is not contiguous, tanh takes several times as long.
    return torch.tanh(raw.contiguous()) if clamp == 1 else clamp * torch.tanh(raw / clamp)


def _soft_clip(raw: Tensor, clamp: float, floor: float) -> Tensor:
    return raw / (clamp + raw.abs()) * clamp  # in this form nothing overflows


def _atan(raw: Tensor, clamp: float, floor: float) -> Tensor:
    return 0.636 * clamp * torch.atan(raw / clamp)


def _sigmoid(raw: Tensor, clamp: float, floor: float) -> Tensor:
    scale = torch.sigmoid((raw + 2).clamp(min=-_FARTHEST))
    return torch.log(scale + floor if floor else scale)  # in less time than logsigmoid, and to eps as well


def _twice_sigmoid(raw: Tensor, clamp: float, floor: float) -> Tensor:
    return torch.log(2 * torch.sigmoid(raw.clamp(min=-_FARTHEST)))


def _exp(raw: Tensor, clamp: float, floor: float) -> Tensor:
    return raw.clamp(-_FARTHEST, _FARTHEST)


_LOG_SCALES: Mapping[Scale, Callable[[Tensor, float, float], Tensor]] = {
    "tanh": _tanh,
    "atan": _atan,
    "soft_clip": _soft_clip,
    "sigmoid": _sigmoid,
    "twice_sigmoid": _twice_sigmoid,
    "exp": _exp,
}


class Scaled(Univariate):
    """``u = scale * b + t``, with ``(r, t)`` from a net and the scale a bounded function of r: see `AffineCoupling`."""

    tag: ClassVar[str]

    @classmethod
    def outputs(cls, fields: Mapping[str, Any]) -> int:
        return 2

    def _set_scale(self, clamp: float, scale: Scale, floor: float, shift_first: bool) -> None:
        """Sets the function of r. Raises InvflowError: a clamp or a floor for a scale that has none."""
        if clamp != CLAMP and scale not in _BOUNDED:
            allowed = ", ".join(f'"{one}"' for one in _BOUNDED)
            raise InvflowError(f'{self.tag} has a clamp with {allowed} only, got {clamp} with "{scale}"')
        if floor and scale != "sigmoid":
            raise InvflowError(f'{self.tag} has a floor with the scale "sigmoid" only, got {floor} with "{scale}"')
        self.clamp = clamp
        self.scale = scale
        self.floor = floor
        self.shift_first = shift_first
        self._log_scale = _LOG_SCALES[scale]

    def _transform(self, b: Tensor, made: Tensor) -> tuple[Tensor, Tensor | None]:
        log_scale, shift = self._scale_and_shift(made)
        if self.shift_first:
            return (b + shift) * log_scale.exp(), log_scale
        return torch.addcmul(shift, log_scale.exp(), b), log_scale

    def _untransform(self, u: Tensor, made: Tensor) -> tuple[Tensor, Tensor | None]:
        log_scale, shift = self._scale_and_shift(made)
        if self.shift_first:
            return torch.exp(-log_scale) * u - shift, log_scale
        return torch.exp(-log_scale) * (u - shift), log_scale

    def _scale_and_shift(self, made: Tensor) -> tuple[Tensor, Tensor]:
        """The log-scale, and t."""
        half = made.shape[1] // 2
        raw, shift = torch.split_with_sizes(made, (half, half), 1)  # in half the time of chunk
        return self._log_scale(raw, self.clamp, self.floor), shift


@register("affine_coupling")
class AffineCoupling(Scaled, Coupling):
    """``(a, b) -> (scale * b + t, a)``, where the scale is computed from r, and ``(r, t) = net(a)``.

    Use it for densities: cheap both ways, and volumes change where the data need it.

    Its inverse is ``(u, v) -> (v, (u - t) / scale)``, its log-determinant ``sum(log(scale))``. The scale is positive
    and bounded:

    - "tanh": ``exp(clamp * tanh(r / clamp))``, as in RealNVP;
    - "atan": ``exp(0.636 clamp * atan(r / clamp))``, as in FrEIA, where 0.636 is just below 2 / pi;
    - "soft_clip": ``exp(r / (1 + |r / clamp|))``, as in zuko;
    - "sigmoid": ``sigmoid(r + 2) + floor``, as in Glow, and with a floor of 0.001 as in neural spline flows;
    - "twice_sigmoid": ``2 * sigmoid(r)``, as in Jet;
    - "exp": ``exp(r)``.

    A sigmoid's scale ends at ``exp(-10)``, before the floor is added, and "exp" ends at ``exp(-10)`` and ``exp(10)``,
    so that no weights make it overflow, or drop all digits of b. Of the others, a float32 ``exp(clamp)`` overflows with
    a clamp above 88.

    Reference: Dinh, Sohl-Dickstein, Bengio: Real NVP, 2016, https://arxiv.org/abs/1605.08803; Kingma, Dhariwal: Glow,
    2018, https://arxiv.org/abs/1807.03039; Kolesnikov, Pinto, Tschannen: Jet, 2024, https://arxiv.org/abs/2412.15129

    Args:
        net: the conditioner, any module: called with ``a``, or with ``a`` and the context if there is one; it returns
            b's shape with twice the channels, first r and then t.
        clamp: the bound of the log-scale, for "tanh", "atan" and "soft_clip".
        scale: the function of r.
        floor: what "sigmoid" adds to the scale.
        shift_first: whether the output is ``(b + t) * scale``, as in Glow and Jet, instead of ``scale * b + t``.

    Raises:
        InvflowError: a clamp or a floor for a scale that has none.

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
        ({"net": {"type": "mlp", "hidden": [4]}, "scale": "soft_clip", "shift_first": True}, ((3,), (2,))),
        ({"net": {"type": "mlp", "hidden": [4]}, "scale": "atan", "clamp": 1.0}, ((3,), (2,))),
        ({"net": {"type": "conv", "hidden": [3]}, "scale": "sigmoid", "floor": 0.001}, ((2, 3, 2), (2, 3, 2))),
        ({"net": {"type": "mlp"}, "scale": "twice_sigmoid", "shift_first": True}, ((2,), (2,))),
        ({"net": {"type": "mlp", "hidden": [4]}, "scale": "exp"}, ((2,), (3,))),
    ]

    def __init__(
        self,
        net: nn.Module,
        clamp: PositiveFloat = CLAMP,
        scale: Scale = "tanh",
        floor: NonNegativeFloat = 0.0,
        shift_first: bool = False,
    ) -> None:
        super().__init__(net, outputs=2)
        self._set_scale(clamp, scale, floor, shift_first)

    def _condition(self, a: Tensor, b: Tensor, context: Context) -> Tensor:
        # Under autocast the net may return bfloat16, in which exp and sums would lose digits.
        return super()._condition(a, b, context).to(b.dtype)


@register("gin_coupling")
class GinCoupling(AffineCoupling):
    """``(a, b) -> (exp(s) * b + t, a)`` with log-scales s that add up to 0: it changes shapes, and keeps volumes.

    Use it for densities whose volume must not change, so that latent dimensions can be ordered by their variance.

    ``s = z - mean(z)`` over the channels of b, at each position, with ``z = clamp * tanh(r / clamp)`` and
    ``(r, t) = net(a)``. Its inverse is ``(u, v) -> (v, exp(-s) * (u - t))``, its log-determinant exactly 0. If b has
    one channel, s is 0, and only t acts.

    Reference: Sorrenson, Rother, Koethe: Disentanglement by Nonlinear ICA with General Incompressible-flow Networks
    (GIN), 2020, https://arxiv.org/abs/2001.04872

    Args:
        net: the conditioner, any module: called with ``a``, or with ``a`` and the context if there is one; it returns
            b's shape with twice the channels, first r and then t.
        clamp: the bound of z, so that ``|s|`` is below twice the clamp.

    Examples:
        >>> import torch
        >>> coupling = GinCoupling(torch.nn.Linear(2, 6))
        >>> y, log_det = coupling.forward_and_log_det((torch.ones(1, 2), torch.zeros(1, 3)))
        >>> log_det
        tensor([0.])
    """

    volume_preserving = True
    examples = [
        ({"net": {"type": "conv", "hidden": [3]}}, ((2, 4, 4), (2, 4, 4))),
        ({"net": {"type": "conv", "hidden": [4], "norm": "batch"}, "clamp": 0.5}, ((1, 3, 2), (3, 3, 2))),
        ({"net": {"type": "mlp", "hidden": [4]}}, ((2,), (3,))),
    ]

    def __init__(self, net: nn.Module, clamp: PositiveFloat = CLAMP) -> None:
        super().__init__(net, clamp)

    def _transform(self, b: Tensor, made: Tensor) -> tuple[Tensor, None]:
        return super()._transform(b, made)[0], None

    def _untransform(self, u: Tensor, made: Tensor) -> tuple[Tensor, None]:
        return super()._untransform(u, made)[0], None

    def _scale_and_shift(self, made: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = super()._scale_and_shift(made)
        return log_scale - log_scale.mean(1, keepdim=True), shift
