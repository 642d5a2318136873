"""Couplings: one half is changed by a function of the other."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from ..bijection import Bijection
from ..errors import ShapeError
from ..registry import register
from ..state import Shape, require_pair, require_tensor

Pair: TypeAlias = tuple[Tensor, Tensor]


@register("additive_coupling")
class AdditiveCoupling(Bijection):
    """``(a, b) -> (net(a) + b, a)``; its inverse is ``(u, v) -> (v, u - net(v))``. Log-determinant 0.

    The halves change places, as in i-RevNet, so that a chain of couplings changes both; they may differ in size.

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

    cheap_inverse = True
    examples = [
        ({"net": {"type": "conv", "hidden": [3]}}, ((2, 4, 4), (2, 4, 4))),
        ({"net": {"type": "conv", "norm": "batch"}}, ((1, 3, 2), (3, 3, 2))),
        ({"net": {"type": "mlp"}}, ((2,), (3,))),
    ]

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @staticmethod
    def net_shapes(shape: Shape) -> dict[str, tuple[Shape, Shape]]:
        """What the conditioner maps, for an incoming pair of this shape."""
        first, second = require_pair("additive_coupling", shape)
        return {"net": (require_tensor("additive_coupling", first), require_tensor("additive_coupling", second))}

    def forward(self, x: Pair, context: Tensor | None = None) -> Pair:
        a, b = x if type(x) is tuple and len(x) == 2 else _pair(x)
        return self._shift(a, b, context) + b, a

    def inverse(self, y: Pair, context: Tensor | None = None) -> Pair:
        u, v = _pair(y)
        return v, u - self._shift(v, u, context)

    def output_shape(self, shape: Shape) -> Shape:
        first, second = require_pair("additive_coupling", shape)
        return second, first

    def input_shape(self, shape: Shape) -> Shape:
        return self.output_shape(shape)

    def _shift(self, a: Tensor, b: Tensor, context: Tensor | None) -> Tensor:
        shift: Tensor = self.net(a) if context is None else self.net(a, context)
        # Adding would broadcast what does not fit, and the map would still look like a bijection.
        if shift.shape != b.shape:
            raise ShapeError(
                f"additive_coupling expects its net to return the other half's shape {tuple(b.shape)}, "
                f"got {tuple(shift.shape)}"
            )
        return shift


def _pair(state: Pair) -> Pair:
    if not isinstance(state, tuple) or len(state) != 2:
        raise ShapeError(
            f"additive_coupling expects a pair of tensors, got {type(state).__name__}; put a Split before it"
        )
    return state
