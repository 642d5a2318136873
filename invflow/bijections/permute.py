"""Fixed permutations of the channels."""

from __future__ import annotations

import random
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Discriminator, Field, NonNegativeInt, Tag
from torch import Tensor

from .._torch import Constants
from ..bijection import Rearrangement
from ..context import Context
from ..errors import InvflowError
from ..registry import register
from ..state import Shape, TensorShape, require_channels, shape_of

_DRAW = 4_000  # the operations that one number of Python's generator takes
_MOST_SHOWN = 32


def _kind(order: Any) -> str:
    return "name" if isinstance(order, str) else "list"


Named: TypeAlias = Literal["reverse", "swap"]
# By discriminator, because a wrong list is no wrong name: one message for one mistake.
Order: TypeAlias = Annotated[
    Annotated[list[NonNegativeInt], Field(min_length=1), Tag("list")] | Annotated[Named, Tag("name")],
    Discriminator(_kind),
]


@register("permute")
class Permute(Constants, Rearrangement):
    """Permutes the channels: ``y[:, i] = x[:, order[i]]``. Exact for every dtype, log-determinant 0.

    Use it between couplings, so that other channels meet in each half.

    Args:
        order: the input channel of each output channel, a permutation of ``0 .. channels - 1``; or "reverse", the last
            channel first; or "swap", the second half first, which is the larger one of an odd count.
        seed: draws a random order, the same on every machine; given instead of ``order``.
        shape: the incoming shape, from which a seed or a named order takes the number of channels.

    Examples:
        >>> import torch
        >>> Permute(order=[2, 0, 1])(torch.tensor([[10, 11, 12]])).tolist()
        [[12, 10, 11]]
        >>> Permute(order="swap", shape=(5,))(torch.tensor([[0, 1, 2, 3, 4]])).tolist()
        [[2, 3, 4, 0, 1]]
    """

    examples = [
        ({"seed": 0}, (5,)),
        ({"seed": 1}, (4, 2, 3)),
        ({"order": [1, 2, 0]}, (3, 2)),
        ({"order": "reverse"}, (3, 2, 2)),
        ({"order": "swap"}, (5,)),
    ]

    constants = ("order",)
    order: Tensor

    def __init__(
        self, order: Order | None = None, seed: NonNegativeInt | None = None, shape: Shape | None = None
    ) -> None:
        super().__init__()
        if (order is None) == (seed is None):
            raise InvflowError("permute expects either an order or a seed, not both")
        self._given = seed if order is None else order
        if isinstance(order, list):
            self._channels = len(order)
            require_order("permute", torch.tensor(order, device="cpu"))
        elif shape is None:
            how = f"order={order!r}" if seed is None else f"seed={seed}"
            raise InvflowError(f"permute expects the incoming shape too: Permute({how}, shape=(8, 7, 7))")
        else:
            self._channels = require_channels("permute", shape)[0]
        self.order = self.made("order")

    def made(self, name: str) -> Tensor:
        if isinstance(self._given, list):
            return torch.tensor(self._given)
        order = torch.arange(self._channels)
        if isinstance(self._given, str):
            return order.flip(0) if self._given == "reverse" else order.roll(-(self._channels // 2))
        if order.is_meta:  # where a size costs nothing
            return order
        # Python's own generator: its sequence is the same on every machine and in every version of torch.
        return torch.tensor(random.Random(self._given).sample(range(self._channels), self._channels))

    def prove(self) -> None:
        """Raises InvflowError if the order is no permutation."""
        require_order(self.tag, self.order)

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        self.output_shape(shape_of(x))
        return x.index_select(1, self.order)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        self.output_shape(shape_of(y))
        return y.index_select(1, self.order.argsort())

    def output_shape(self, shape: Shape) -> TensorShape:
        return require_channels("permute", shape, self._channels)

    @property
    def building_cost(self) -> int:
        return _DRAW * len(self.order) if isinstance(self._given, int) else 0

    def input_shape(self, shape: Shape) -> TensorShape:
        return self.output_shape(shape)


def require_order(who: str, order: Tensor) -> None:
    """Raises InvflowError if a tensor is no permutation of ``0 .. len - 1``; on the meta device nobody knows."""
    if order.is_meta or torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        return
    shown = order.tolist() if len(order) <= _MOST_SHOWN else f"{order[:_MOST_SHOWN].tolist()} and more"
    raise InvflowError(f"{who} expects an order that holds each of 0 .. {len(order) - 1} once, got {shown}")
