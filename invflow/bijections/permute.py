"""Fixed permutations of the channels."""

from __future__ import annotations

import random
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from .._torch import Constants
from ..bijection import Rearrangement
from ..errors import InvflowError
from ..registry import register
from ..state import Shape, TensorShape, require_channels, shape_of

_DRAW = 4_000  # the operations that one number of Python's generator takes
_MOST_SHOWN = 32


@register("permute")
class Permute(Constants, Rearrangement):
    """Permutes the channels: ``y[:, i] = x[:, order[i]]``. Exact for every dtype, log-determinant 0.

    Args:
        order: the input channel of each output channel, a permutation of ``0 .. channels - 1``.
        seed: draws a random order, the same on every machine; given instead of ``order``.
        shape: the incoming shape, from which a seed takes the number of channels.

    Examples:
        >>> import torch
        >>> Permute(order=[2, 0, 1])(torch.tensor([[10, 11, 12]])).tolist()
        [[12, 10, 11]]
    """

    examples = [({"seed": 0}, (5,)), ({"seed": 1}, (4, 2, 3)), ({"order": [1, 2, 0]}, (3, 2))]

    constants = ("order",)
    order: Tensor

    def __init__(
        self,
        order: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None,
        seed: NonNegativeInt | None = None,
        shape: Shape | None = None,
    ) -> None:
        super().__init__()
        if (order is None) == (seed is None):
            raise InvflowError("permute expects either an order or a seed, not both")
        self._given = seed if order is None else list(order)
        if order is not None:
            self._channels = len(order)
            require_order("permute", torch.tensor(order, device="cpu"))
        elif shape is None:
            raise InvflowError("permute with a seed expects the incoming shape too: Permute(seed=0, shape=(8, 7, 7))")
        else:
            self._channels = require_channels("permute", shape)[0]
        self.order = self.made("order")

    def made(self, name: str) -> Tensor:
        if isinstance(self._given, list):
            return torch.tensor(self._given)
        if torch.empty(0).is_meta:  # where a size costs nothing
            return torch.arange(self._channels)
        # Python's own generator: its sequence is the same on every machine and in every version of torch.
        return torch.tensor(random.Random(self._given).sample(range(self._channels), self._channels))

    def prove(self) -> None:
        """Raises InvflowError if the order is no permutation."""
        require_order(self.tag, self.order)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.output_shape(shape_of(x))
        return x.index_select(1, self.order)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        self.output_shape(shape_of(y))
        return y.index_select(1, self.order.argsort())

    def output_shape(self, shape: Shape) -> TensorShape:
        return require_channels("permute", shape, len(self.order))

    @property
    def building_cost(self) -> int:
        return 0 if isinstance(self._given, list) else _DRAW * len(self.order)

    def input_shape(self, shape: Shape) -> TensorShape:
        return self.output_shape(shape)


def require_order(who: str, order: Tensor) -> None:
    """Raises InvflowError if a tensor is no permutation of ``0 .. len - 1``; on the meta device nobody knows."""
    if order.is_meta or torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        return
    shown = order.tolist() if len(order) <= _MOST_SHOWN else f"{order[:_MOST_SHOWN].tolist()} and more"
    raise InvflowError(f"{who} expects an order that holds each of 0 .. {len(order) - 1} once, got {shown}")
