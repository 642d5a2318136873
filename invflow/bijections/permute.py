"""Fixed permutations of the channels."""

from __future__ import annotations

import random
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from ..bijection import Rearrangement
from ..errors import InvflowError
from ..registry import register
from ..state import Shape, TensorShape, require_channels, shape_of

_DRAW = 4_000  # the operations that one number of Python's generator takes


@register("permute")
class Permute(Rearrangement):
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
        if order is None:
            if shape is None:
                raise InvflowError(
                    "permute with a seed expects the incoming shape too: Permute(seed=0, shape=(8, 7, 7))"
                )
            channels = require_channels("permute", shape)[0]
            on_meta = torch.empty(0).is_meta  # where a size costs nothing
            # Python's own generator: its sequence is the same on every machine and in every version of torch.
            drawn = None if on_meta else random.Random(seed).sample(range(channels), channels)
            found = torch.arange(channels) if drawn is None else torch.tensor(drawn)
        elif sorted(order) != list(range(len(order))):
            raise InvflowError(f"permute expects an order that holds each of 0 .. {len(order) - 1} once, got {order}")
        else:
            found = torch.tensor(order)
        self._drawn = order is None
        self.register_buffer("order", found)

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
        return _DRAW * len(self.order) if self._drawn else 0

    def input_shape(self, shape: Shape) -> TensorShape:
        return self.output_shape(shape)
