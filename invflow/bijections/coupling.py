"""Couplings: one half is changed by a function of the other. The base of all, and the additive one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias, cast

from torch import Tensor, nn

from ..bijection import Bijection
from ..context import Context
from ..errors import ShapeError
from ..nets.contract import Conditioned, Lipschitz
from ..nets.orderfree import make_order_free, obstacle
from ..numerics import conditioners
from ..numerics.modes import NONE, Exact, Level, Limit, Mode
from ..registry import register
from ..reversible.retrace import Replay, Retraced, Retraces
from ..state import Shape, require_channels, require_pair
from .univariate import Univariate, summed

Pair: TypeAlias = tuple[Tensor, Tensor]


class Coupling(Conditioned, Bijection, Retraces, Univariate):
    """``(a, b) -> (g(b; net(a)), a)``: the base of couplings. The halves change places and may differ in size.

    A subclass defines g: see `Univariate`.

    Args:
        net: the conditioner, any module.
        outputs: the number of its outputs for each number of b.
    """

    cheap_inverse = True
    _is_stack = False
    shifts: ClassVar[bool] = False
    """Whether ``g(b; made)`` is ``b + made``, so that the gradient of b is that of u."""

    def __init__(self, net: nn.Module, outputs: int) -> None:
        super().__init__()
        self.net = net
        self._outputs = outputs

    def forward(self, x: Pair, context: Context = None) -> Pair:
        a, b = x if type(x) is tuple and len(x) == 2 else self._pair(x)
        return self._transform(b, self._condition(a, b, context))[0], a

    def inverse(self, y: Pair, context: Context = None) -> Pair:
        u, v = y if type(y) is tuple and len(y) == 2 else self._pair(y)
        if self.training:
            self.numerics.require_same_function(self.tag, self.net)
        return v, self._untransform(u, self._condition(v, u, context))[0]

    def forward_and_log_det(self, x: Pair, context: Context = None) -> tuple[Pair, Tensor]:
        a, b = x if type(x) is tuple and len(x) == 2 else self._pair(x)
        u, log_scale = self._transform(b, self._condition(a, b, context))
        return (u, a), summed(log_scale, b)

    def inverse_and_log_det(self, y: Pair, context: Context = None) -> tuple[Pair, Tensor]:
        u, v = y if type(y) is tuple and len(y) == 2 else self._pair(y)
        if self.training:
            self.numerics.require_same_function(self.tag, self.net)
        b, log_scale = self._untransform(u, self._condition(v, u, context))
        return (v, b), -summed(log_scale, u)

    def retrace(self, y: Pair, context: Context, replay: Replay, *, log_det: bool, backwards: bool) -> Retraced:
        first, second = self._pair(y)
        given, changed = (first, second) if backwards else (second, first)
        given = given.detach().requires_grad_()
        with replay():
            made = self._condition(given, changed, context)
        undo, again = (self._transform, self._untransform) if backwards else (self._untransform, self._transform)
        before, _ = undo(changed, made.detach())
        passed = (0, 1) if backwards else (1, 0)
        if self.shifts and not backwards and not self.numerics.integer_nets:  # integer nets return grid steps
            return Retraced((given, before), (made, None), summed(None, before) if log_det else None, ((0, 1), passed))
        before.requires_grad_()
        after, log_scale = again(before, made)
        total = summed(log_scale, before) if log_det else None
        if backwards:
            return Retraced((before, given), (None, after), None if total is None else -total, (passed,))
        return Retraced((given, before), (after, None), total, (passed,))

    @classmethod
    def net_shapes(cls, shape: Shape, fields: Mapping[str, Any]) -> Mapping[str, tuple[Shape, Shape]]:
        """The conditioner maps the first half to `outputs` numbers for each number of the second."""
        first, second = (require_channels(cls.tag, half) for half in require_pair(cls.tag, shape))
        return {"net": (first, (cls.outputs(fields) * second[0], *second[1:]))}

    def output_shape(self, shape: Shape) -> Shape:
        first, second = require_pair(self.tag, shape)
        return second, first

    def input_shape(self, shape: Shape) -> Shape:
        return self.output_shape(shape)

    def _pair(self, state: Any) -> Pair:
        if type(state) is not tuple or len(state) != 2:
            came = type(state).__name__
            raise ShapeError(f"{self.tag} expects a pair of tensors, got {came}; put a Split before it")
        return state

    def _condition(self, a: Tensor, b: Tensor, context: Context) -> Tensor:
        """The conditioner's output for a, checked to fit b."""
        made = self.numerics.condition(self.net, a, self.for_net(context), self._is_stack)
        # Arithmetic would broadcast a wrong shape, and the map would still look like a bijection.
        expected = b.shape if self._outputs == 1 else (b.shape[0], self._outputs * b.shape[1], *b.shape[2:])
        if made.shape != expected:
            raise ShapeError(
                f"{self.tag} expects its net to return the shape {tuple(expected)}, got {tuple(made.shape)}"
            )
        return made


@register("additive_coupling")
class AdditiveCoupling(Coupling):
    """``(a, b) -> (net(a) + b, a)``; its inverse is ``(u, v) -> (v, u - net(v))``. Log-determinant 0.

    Use it for classifiers, and wherever the inverse has to be exact: it is cheap both ways, and all numerics take
    it.

    The halves change places, as in i-RevNet, so that a chain of couplings changes both; they may differ in size.

    In `grid` numerics ``net(a)`` is rounded to the grid and the sum is exact or refused (proof in
    `invflow.numerics.grid`), so the inverse is bit-exact if the net returns the same bits. In `exact` numerics the net
    becomes an order-free one (`invflow.numerics.integer`), which always does.

    Reference: Dinh, Krueger, Bengio: NICE, 2014, https://arxiv.org/abs/1410.8516

    Args:
        net: the conditioner, any module: called with ``a``, or with ``a`` and the context if there is one; it returns
            a tensor of b's shape.

    Examples:
        >>> import torch
        >>> coupling = AdditiveCoupling(torch.nn.Linear(2, 3))
        >>> y = coupling((torch.ones(5, 2), torch.zeros(5, 3)))
        >>> [tuple(part.shape) for part in y], coupling.inverse(y)[0].tolist()[0]
        ([(5, 3), (5, 2)], [1.0, 1.0])
    """

    shifts = True
    volume_preserving = True
    examples = [
        ({"net": {"type": "conv", "hidden": [3]}}, ((2, 4, 4), (2, 4, 4))),
        ({"net": {"type": "conv", "hidden": [4], "norm": "batch"}}, ((1, 3, 2), (3, 3, 2))),
        ({"net": {"type": "mlp"}}, ((2,), (3,))),
    ]

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, outputs=1)

    @property
    def limit(self) -> Limit:
        if conditioners.batch_norm_without_statistics(self.net):
            return Limit("float", "its net's batch norm keeps no statistics, so that its output depends on the batch")
        reason = obstacle(self.net)
        return NONE if reason is None else Limit("grid", reason)

    @property
    def exactness(self) -> Level:
        return self.numerics.level

    @property
    def traceable(self) -> bool:
        return self.numerics.level != "grid"  # whose conditioners are left alone by compilers

    def set_numerics(self, numerics: Mode) -> None:
        super().set_numerics(numerics)
        self._is_stack = obstacle(self.net) is None
        if numerics.integer_nets:
            make_order_free(self.net, cast(Exact, numerics))

    def lipschitz_bounds(self) -> tuple[float, float]:
        """``(l + sqrt(l^2 + 4)) / 2`` both ways, the norm of ``[[N, 1], [1, 0]]``, if the net knows its bound l."""
        if not isinstance(self.net, Lipschitz):
            return math.inf, math.inf
        bound = float(self.net.lipschitz_bound())
        both = (bound + math.hypot(bound, 2)) / 2
        return both, both

    def _transform(self, b: Tensor, made: Tensor) -> tuple[Tensor, None]:
        return self.numerics.add("additive_coupling", b, made), None

    def _untransform(self, u: Tensor, made: Tensor) -> tuple[Tensor, None]:
        return self.numerics.subtract("additive_coupling", u, made), None
