"""Couplings: one half is changed by a function of the other."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, TypeAlias

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from ..bijection import Bijection, Replay, Retraced
from ..errors import ShapeError
from ..numerics import conditioners, grid
from ..numerics.options import Exact, Float, Grid, Snap, level_of
from ..numerics.orderfree import make_order_free, obstacle
from ..registry import bijections, register
from ..state import Shape, require_channels, require_pair, zero_log_det

Pair: TypeAlias = tuple[Tensor, Tensor]


class _Coupling(Bijection):
    """``(a, b) -> (g(b; net(a)), a)``: what couplings share. The halves change places, and may differ in size.

    A coupling says what g is: `_transform`, `_untransform`, and `_log_det` where g does not keep the volume.
    """

    cheap_inverse = True
    _is_stack = False
    outputs: ClassVar[int] = 1
    """How many numbers the conditioner gives for each one of b, stacked along the channels."""
    shifts: ClassVar[bool] = False
    """Whether g(b; made) is b + made, so that the gradient of b is the one that came in."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @abstractmethod
    def _transform(self, b: Tensor, made: Tensor) -> Tensor:
        """U = g(b; made)."""

    @abstractmethod
    def _untransform(self, u: Tensor, made: Tensor) -> Tensor:
        """B = g^-1(u; made)."""

    def _log_det(self, b: Tensor, made: Tensor) -> Tensor:
        """Log |det du/db|, ``(batch,)``."""
        return zero_log_det(b)

    def forward(self, x: Pair, context: Tensor | None = None) -> Pair:
        a, b = x if type(x) is tuple and len(x) == 2 else _pair(self, x)
        return self._transform(b, self._condition(a, b, context)), a

    def inverse(self, y: Pair, context: Tensor | None = None) -> Pair:
        u, v = y if type(y) is tuple and len(y) == 2 else _pair(self, y)
        self._require_same_function()
        return v, self._untransform(u, self._condition(v, u, context))

    def forward_and_log_det(self, x: Pair, context: Tensor | None = None) -> tuple[Pair, Tensor]:
        a, b = _pair(self, x)
        made = self._condition(a, b, context)
        return (self._transform(b, made), a), self._log_det(b, made)

    def inverse_and_log_det(self, y: Pair, context: Tensor | None = None) -> tuple[Pair, Tensor]:
        u, v = _pair(self, y)
        self._require_same_function()
        made = self._condition(v, u, context)
        return (v, self._untransform(u, made)), -self._log_det(u, made)

    def retrace(self, y: Pair, context: Tensor | None, replay: Replay, *, log_det: bool) -> Retraced:
        u, v = _pair(self, y)
        a = v.detach().requires_grad_()
        with replay():
            made = self._condition(a, u, context)
        b = self._untransform(u, made.detach())
        if self.shifts and self.numerics.mode != "exact":  # u = b + made; an order-free net counts steps
            return Retraced((a, b), (made, None), self._log_det(b, made) if log_det else None, ((0, 1), (1, 0)))
        b.requires_grad_()
        return Retraced(
            (a, b), (self._transform(b, made), None), self._log_det(b, made) if log_det else None, ((1, 0),)
        )

    def retrace_inverse(self, x: Pair, context: Tensor | None, replay: Replay, *, log_det: bool) -> Retraced:
        a, b = _pair(self, x)
        v = a.detach().requires_grad_()
        with replay():
            made = self._condition(v, b, context)
        u = self._transform(b, made.detach()).requires_grad_()
        return Retraced(
            (u, v), (None, self._untransform(u, made)), -self._log_det(u, made) if log_det else None, ((0, 1),)
        )

    @classmethod
    def net_shapes(cls, shape: Shape) -> dict[str, tuple[Shape, Shape]]:
        """What the conditioner maps, for an incoming pair of this shape."""
        who = bijections.name_of(cls)
        first, second = (require_channels(who, half) for half in require_pair(who, shape))
        return {"net": (first, (cls.outputs * second[0], *second[1:]))}

    def output_shape(self, shape: Shape) -> Shape:
        first, second = require_pair(bijections.name_of(type(self)), shape)
        return second, first

    def input_shape(self, shape: Shape) -> Shape:
        return self.output_shape(shape)

    def _condition(self, a: Tensor, b: Tensor, context: Tensor | None) -> Tensor:
        """What the conditioner makes of a, checked to fit b."""
        if self.numerics.mode == "float":
            made: Tensor = self.net(a) if context is None else self.net(a, context)
        else:
            wide = self.numerics.mode == "grid" and self.numerics.conditioner_dtype == "float64"
            made = conditioners.evaluate(self.net, a, context, in_float64=wide, hide_sign=not self._is_stack)
        # Arithmetic would broadcast what does not fit, and the map would still look like a bijection.
        expected = b.shape if self.outputs == 1 else (b.shape[0], self.outputs * b.shape[1], *b.shape[2:])
        if made.shape != expected:
            who = bijections.name_of(type(self))
            raise ShapeError(f"{who} expects its net to return the shape {tuple(expected)}, got {tuple(made.shape)}")
        return made

    def _require_same_function(self) -> None:
        """Refuses to invert by another function than the forward's, where that would break a promise."""
        if self.training and self.numerics.mode != "float":
            conditioners.require_same_function(self._tag(), self.net)


@register("additive_coupling")
class AdditiveCoupling(_Coupling):
    """``(a, b) -> (net(a) + b, a)``; its inverse is ``(u, v) -> (v, u - net(v))``. Log-determinant 0.

    The halves change places, as in i-RevNet, so that a chain of couplings changes both; they may differ in size.

    In `grid` numerics net(a) is rounded to the grid and the sum is exact or refused (`invflow.numerics.grid` has the
    proof), so the inverse is bit-exact where the net answers with the same bits. In `exact` numerics the net becomes an
    order-free one (`invflow.numerics.integer`), which always does.

    Reference: Dinh, Krueger, Bengio: NICE, 2014, https://arxiv.org/abs/1410.8516

    Args:
        net: the conditioner, any module: called with ``a``, or with ``a`` and the context where there is one; it
            returns a tensor of b's shape.

    >>> import torch
    >>> coupling = AdditiveCoupling(torch.nn.Linear(2, 3))
    >>> y = coupling((torch.ones(5, 2), torch.zeros(5, 3)))
    >>> [tuple(part.shape) for part in y], coupling.inverse(y)[0].tolist()[0]
    ([(5, 3), (5, 2)], [1.0, 1.0])
    """

    shifts = True
    examples = [
        ({"net": {"type": "conv", "hidden": [3]}}, ((2, 4, 4), (2, 4, 4))),
        ({"net": {"type": "conv", "hidden": [4], "norm": "batch"}}, ((1, 3, 2), (3, 3, 2))),
        ({"net": {"type": "mlp"}}, ((2,), (3,))),
    ]

    @property
    def level(self) -> str:  # type: ignore[override]
        if conditioners.batch_norm_without_statistics(self.net):
            return "float"
        return "exact" if obstacle(self.net) is None else "grid"

    @property
    def shortfall(self) -> str:  # type: ignore[override]
        if conditioners.batch_norm_without_statistics(self.net):
            return "its net's batch norm keeps no statistics, so that what it computes depends on the batch"
        return obstacle(self.net) or ""

    @property
    def exactness(self) -> str:
        return level_of(self.numerics)

    def set_numerics(self, numerics: Float | Snap | Grid | Exact) -> None:
        super().set_numerics(numerics)
        self._is_stack = obstacle(self.net) is None
        if isinstance(numerics, Exact):
            make_order_free(self.net, numerics)

    def lipschitz_bounds(self) -> tuple[float, float]:
        """``(l + sqrt(l^2 + 4)) / 2`` both ways, the norm of [[N, 1], [1, 0]] at most, where the net knows its l."""
        bound = getattr(self.net, "lipschitz_bound", None)
        if not callable(bound):
            return math.inf, math.inf
        both = (float(bound()) + math.hypot(float(bound()), 2)) / 2
        return both, both

    def _transform(self, b: Tensor, made: Tensor) -> Tensor:
        if self.numerics.mode == "float" or self.numerics.mode == "snap":  # noqa: PLR1714 -- narrows the type
            return made + b
        return grid.add("additive_coupling", b, self._steps(made, b), self.numerics.frac_bits)

    def _untransform(self, u: Tensor, made: Tensor) -> Tensor:
        if self.numerics.mode == "float" or self.numerics.mode == "snap":  # noqa: PLR1714 -- narrows the type
            return u - made
        return grid.add("the inverse of additive_coupling", u, self._steps(made, u), self.numerics.frac_bits, -1)

    def _steps(self, made: Tensor, like: Tensor) -> Tensor:
        """What the net made, in whole steps of the grid; an order-free net counts in them by itself."""
        return grid.steps(made, self.numerics.frac_bits, like.dtype) if self.numerics.mode == "grid" else made


@register("affine_coupling")
class AffineCoupling(_Coupling):
    """``(a, b) -> (exp(s) * b + t, a)`` with ``s = clamp * tanh(r / clamp)`` and ``(r, t) = net(a)``.

    Its inverse is ``(u, v) -> (v, exp(-s) * (u - t))``, its log-determinant ``sum(s)``. The log-scale is bounded, so
    that no coupling stretches or shrinks by more than ``exp(clamp)``.

    Reference: Dinh, Sohl-Dickstein, Bengio: Real NVP, 2016, https://arxiv.org/abs/1605.08803

    Args:
        net: the conditioner, any module: called with ``a``, or with ``a`` and the context where there is one; it
            returns b's shape with twice the channels, first r and then t.
        clamp: the bound of the log-scale.

    >>> import torch
    >>> coupling = AffineCoupling(torch.nn.Linear(2, 6))
    >>> y, log_det = coupling.forward_and_log_det((torch.ones(5, 2), torch.zeros(5, 3)))
    >>> log_det.shape
    torch.Size([5])
    """

    outputs = 2
    examples = [
        ({"net": {"type": "conv", "hidden": [3]}}, ((2, 4, 4), (2, 4, 4))),
        ({"net": {"type": "conv", "hidden": [4], "norm": "batch"}, "clamp": 0.5}, ((1, 3, 2), (3, 3, 2))),
        ({"net": {"type": "mlp", "hidden": [4], "activation": "tanh"}}, ((2,), (3,))),
    ]

    def __init__(self, net: nn.Module, clamp: PositiveFloat = 2.0) -> None:
        super().__init__(net)
        self.clamp = clamp

    def _transform(self, b: Tensor, made: Tensor) -> Tensor:
        log_scale, shift = self._scale_and_shift(made)
        return log_scale.exp() * b + shift

    def _untransform(self, u: Tensor, made: Tensor) -> Tensor:
        log_scale, shift = self._scale_and_shift(made)
        return torch.exp(-log_scale) * (u - shift)

    def _log_det(self, b: Tensor, made: Tensor) -> Tensor:
        return self._scale_and_shift(made)[0].flatten(1).sum(1)

    def _condition(self, a: Tensor, b: Tensor, context: Tensor | None) -> Tensor:
        # Under autocast the net may answer in bfloat16, in which exp and sums would lose digits.
        return super()._condition(a, b, context).to(b.dtype)

    def _scale_and_shift(self, made: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = made.chunk(2, dim=1)
        return self.clamp * torch.tanh(raw / self.clamp), shift


def _pair(coupling: _Coupling, state: Pair) -> Pair:
    if type(state) is not tuple or len(state) != 2:
        who = bijections.name_of(type(coupling))
        raise ShapeError(f"{who} expects a pair of tensors, got {type(state).__name__}; put a Split before it")
    return state
