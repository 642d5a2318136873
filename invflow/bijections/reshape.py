"""The same numbers in another shape."""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

from pydantic import Field, PositiveInt
from torch import Tensor

from ..bijection import Rearrangement
from ..context import Context
from ..errors import InvflowError, ShapeError
from ..fields import shortened
from ..registry import register
from ..state import Shape, TensorShape, require_tensor, shape_of

Extent: TypeAlias = Annotated[int, Field(ge=-1, json_schema_extra={"not": {"const": 0}})]


class _Reshaped(Rearrangement):
    """The base of layers that keep the row-major order of the numbers."""

    def __init__(self, before: TensorShape, after: TensorShape) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        self.output_shape(shape_of(x))
        return x.reshape(x.shape[0], *self.after)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        self.input_shape(shape_of(y))
        return y.reshape(y.shape[0], *self.before)

    def output_shape(self, shape: Shape) -> TensorShape:
        if shape != self.before:
            raise ShapeError(f"{self.tag} expects the shape {self.before} that it was built for, got {shape}")
        return self.after

    def input_shape(self, shape: Shape) -> TensorShape:
        if shape != self.after:
            raise ShapeError(f"the inverse of {self.tag} expects the shape {self.after}, got {shape}")
        return self.before


@register("flatten")
class Flatten(_Reshaped):
    """Flattens a tensor into a vector: ``(c, h, w)`` becomes ``(c * h * w,)``, in row-major order.

    Use it before layers that take vectors.

    Exact for every dtype, log-determinant 0. It keeps the shape that it was built for, so that its inverse can return
    to it.

    Args:
        shape: the incoming shape.

    Examples:
        >>> Flatten(shape=(3, 4, 4)).output_shape((3, 4, 4))
        (48,)
    """

    examples = [({}, (2, 3, 2)), ({}, (4,)), ({}, (2, 3))]

    def __init__(self, shape: Shape) -> None:
        before = require_tensor("flatten", shape)
        super().__init__(before, (math.prod(before),))


@register("reshape")
class Reshape(_Reshaped):
    """Gives a tensor another shape, its numbers in the same row-major order. Exact for every dtype, log-determinant 0.

    Use it to meet the shape that a layer takes.

    Args:
        to: the shape to give it, without the batch; one extent may be -1, which is inferred from the others.
        shape: the incoming shape.

    Raises:
        ShapeError: the shapes differ in how many numbers they hold.

    Examples:
        >>> Reshape(to=[3, -1], shape=(3, 4, 4)).output_shape((3, 4, 4))
        (3, 16)
    """

    examples = [
        ({"to": [2, 6]}, (3, 4)),
        ({"to": [2, -1, 2]}, (4, 2, 2)),
        ({"to": [2, 2]}, (4,)),
        ({"to": [-1]}, (3, 2)),
    ]

    def __init__(self, to: Annotated[list[Extent], Field(min_length=1)], shape: Shape) -> None:
        before = require_tensor("reshape", shape)
        if to.count(-1) > 1 or 0 in to:
            raise InvflowError(f"reshape expects positive extents, at most one of them -1, got {shortened(to)}")
        numbers, known = math.prod(before), math.prod(extent for extent in to if extent > 0)
        after = tuple(numbers // known if extent < 0 else extent for extent in to)
        if math.prod(after) != numbers or 0 in after:
            raise ShapeError(f"reshape to {shortened(to)} expects as many numbers in the state, got {before}")
        super().__init__(before, after)


@register("transpose")
class Transpose(Rearrangement):
    """Reorders the dimensions: with ``order`` [2, 3, 1], ``(c, h, w)`` becomes ``(h, w, c)``.

    Use it where another dimension has to play the part of the channels.

    ``y = x.permute(0, *order)``: dimension ``i`` of y is dimension ``order[i - 1]`` of x, and 0, the batch, stays
    first. Exact for every dtype, log-determinant 0.

    Args:
        order: the dimensions besides the batch, each of 1 .. n once.

    Raises:
        InvflowError: the order omits a dimension, or names one twice.

    Examples:
        >>> Transpose(order=[2, 3, 1]).output_shape((3, 4, 5))
        (4, 5, 3)
    """

    examples = [({"order": [2, 1]}, (2, 3)), ({"order": [2, 3, 1]}, (3, 2, 4)), ({"order": [1, 2, 4, 3]}, (2, 1, 2, 3))]

    def __init__(self, order: Annotated[list[PositiveInt], Field(min_length=1)]) -> None:
        super().__init__()
        if sorted(order) != list(range(1, len(order) + 1)):
            raise InvflowError(
                f"transpose expects an order that holds each of 1 .. {len(order)} once, got {shortened(order)}"
            )
        self._order = (0, *order)
        self._back = tuple(self._order.index(dim) for dim in range(len(self._order)))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        self.output_shape(shape_of(x))
        return x.permute(self._order)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        self.input_shape(shape_of(y))
        return y.permute(self._back)

    def output_shape(self, shape: Shape) -> TensorShape:
        extents = require_tensor("transpose", shape, dims=len(self._order) - 1)
        return tuple(extents[dim - 1] for dim in self._order[1:])

    def input_shape(self, shape: Shape) -> TensorShape:
        extents = require_tensor("the inverse of transpose", shape, dims=len(self._order) - 1)
        return tuple(extents[dim - 1] for dim in self._back[1:])
