"""From one tensor to a pair and back."""

from __future__ import annotations

from typing import TypeAlias

import torch
from pydantic import PositiveInt
from torch import Tensor

from ..bijection import Bijection
from ..errors import ShapeError
from ..numerics.modes import NONE
from ..registry import register
from ..state import Shape, TensorShape, is_tensor_shape, require_pair, require_tensor, shape_of

Sizes: TypeAlias = tuple[PositiveInt, PositiveInt]


def _sizes(who: str, sizes: Sizes | None, dim: int, shape: Shape) -> tuple[int, int]:
    """The sizes of the two parts of a tensor of this shape."""
    whole = require_tensor(who, shape)
    if len(whole) < dim:
        raise ShapeError(f"{who} along dim {dim} expects at least {dim} dimensions besides the batch, got {shape}")
    extent = whole[dim - 1]
    if extent < 2:
        raise ShapeError(
            f"{who} expects at least 2 channels along dim {dim} to make two parts of, got {extent} in {shape}; "
            "put a psi before"
        )
    parts = _parts(sizes, extent)
    if sum(parts) != extent:
        raise ShapeError(
            f"{who} with sizes {list(parts)} expects {sum(parts)} along dim {dim}, got {extent} in {shape}"
        )
    return parts


def _parts(sizes: Sizes | None, extent: int) -> tuple[int, int]:
    """The sizes as given, or halves, the first the smaller."""
    return sizes or (extent // 2, extent - extent // 2)


def _cut(who: str, x: Tensor, sizes: Sizes | None, dim: int) -> tuple[Tensor, Tensor]:
    # What fits is seen at a glance: this runs in every forward. What does not is explained by _sizes.
    if isinstance(x, Tensor) and x.dim() > dim:
        extent = x.shape[dim]
        parts = _parts(sizes, extent)
        if extent > 1 and parts[0] + parts[1] == extent:
            first, second = torch.split_with_sizes(x, parts, dim)
            return first, second
    _sizes(who, sizes, dim, shape_of(x))
    raise ShapeError(f"{who} expects one tensor, got {type(x).__name__}")


def _join(who: str, x: tuple[Tensor, Tensor], sizes: Sizes | None, dim: int) -> Tensor:
    """The pair as one tensor; a pair that cutting would not return is a ShapeError."""
    # First done, then looked at: this runs in every forward, and what does not fit has time to be explained.
    if isinstance(x, tuple):
        try:
            whole = torch.cat(x, dim)
            if len(x) == 2 and x[0].shape[dim] == _parts(sizes, whole.shape[dim])[0]:
                return whole
        except (RuntimeError, TypeError, IndexError):
            pass  # explained below
    _whole_shape(who, sizes, dim, shape_of(x))
    raise ShapeError(f"{who} expects two tensors of one batch and dtype, got {[tuple(part.shape) for part in x]}")


def _part_shapes(shape: TensorShape, sizes: tuple[int, int], dim: int) -> tuple[TensorShape, TensorShape]:
    first, second = (shape[: dim - 1] + (size,) + shape[dim:] for size in sizes)
    return first, second


def _whole_shape(who: str, sizes: Sizes | None, dim: int, shape: Shape) -> TensorShape:
    """The shape of the tensor that a pair of this shape was cut from."""
    first, second = (require_tensor(who, part) for part in require_pair(who, shape))
    others_agree = first[: dim - 1] + first[dim:] == second[: dim - 1] + second[dim:]
    if len(first) != len(second) or len(first) < dim or not others_agree:
        raise ShapeError(f"{who} expects two tensors that differ along dim {dim} only, got {shape}")
    parts = (first[dim - 1], second[dim - 1])
    whole = first[: dim - 1] + (sum(parts),) + first[dim:]
    if parts != _sizes(who, sizes, dim, whole):
        expected = "halves, the first the smaller" if sizes is None else f"sizes {list(sizes)}"
        raise ShapeError(f"{who} expects {expected} along dim {dim}, got {list(parts)}; name sizes={list(parts)}")
    return whole


@register("split")
class Split(Bijection):
    """Cuts a tensor in two: ``x -> (x[:, :n], x[:, n:])``. Log-determinant 0.

    Args:
        sizes: the sizes of the two parts; halves by default, the first being the smaller one of an odd count.
        dim: the dimension to cut along; 1 is the channel.

    Examples:
        >>> import torch
        >>> [part.tolist() for part in Split()(torch.tensor([[1, 2, 3]]))]
        [[[1]], [[2, 3]]]
    """

    volume_preserving = True
    limit = NONE
    cheap_inverse = True
    examples = [({}, (2,)), ({}, (5, 2, 2)), ({"sizes": [1, 3]}, (4, 3)), ({"dim": 2}, (1, 3, 2))]

    def __init__(self, sizes: Sizes | None = None, dim: PositiveInt = 1) -> None:
        super().__init__()
        self.sizes = sizes
        self.dim = dim

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _cut("split", x, self.sizes, self.dim)

    def inverse(self, y: tuple[Tensor, Tensor], context: Tensor | None = None) -> Tensor:
        return _join("the inverse of split", y, self.sizes, self.dim)

    def output_shape(self, shape: Shape) -> Shape:
        sizes = _sizes("split", self.sizes, self.dim, shape)
        return _part_shapes(require_tensor("split", shape), sizes, self.dim)

    def input_shape(self, shape: Shape) -> Shape:
        return _whole_shape("the inverse of split", self.sizes, self.dim, shape)


@register("merge")
class Merge(Bijection):
    """Concatenates a pair, the inverse of `Split`: ``(a, b) -> cat(a, b)``. Log-determinant 0.

    Args:
        sizes: the sizes of the two parts. From a spec they come from the incoming pair; in Python the default is
            halves, the first being the smaller one of an odd count, and any other pair is a ShapeError.
        dim: the dimension to concatenate along; 1 is the channel.
        shape: the shape of the incoming pair, to take ``sizes`` from.

    Examples:
        >>> import torch
        >>> Merge()((torch.tensor([[1]]), torch.tensor([[2, 3]]))).tolist()
        [[1, 2, 3]]
    """

    volume_preserving = True
    limit = NONE
    cheap_inverse = True
    examples = [({}, ((2,), (3,))), ({}, ((4, 2, 2), (1, 2, 2))), ({"dim": 2, "sizes": [2, 1]}, ((3, 2), (3, 1)))]

    def __init__(self, sizes: Sizes | None = None, dim: PositiveInt = 1, shape: Shape | None = None) -> None:
        super().__init__()
        if sizes is None and shape is not None and not is_tensor_shape(shape):
            parts = [require_tensor("merge", part) for part in require_pair("merge", shape)]
            if all(len(part) >= dim for part in parts):
                sizes = (parts[0][dim - 1], parts[1][dim - 1])
        self.sizes = sizes
        self.dim = dim

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0

    def forward(self, x: tuple[Tensor, Tensor], context: Tensor | None = None) -> Tensor:
        return _join("merge", x, self.sizes, self.dim)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _cut("the inverse of merge", y, self.sizes, self.dim)

    def output_shape(self, shape: Shape) -> Shape:
        return _whole_shape("merge", self.sizes, self.dim, shape)

    def input_shape(self, shape: Shape) -> Shape:
        sizes = _sizes("the inverse of merge", self.sizes, self.dim, shape)
        return _part_shapes(require_tensor("the inverse of merge", shape), sizes, self.dim)
