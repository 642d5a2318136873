"""From one tensor to a pair and back."""

from __future__ import annotations

from typing import TypeAlias

import torch
from pydantic import PositiveInt
from torch import Tensor

from ..bijection import Rearrangement
from ..context import Context
from ..errors import ShapeError
from ..registry import register
from ..state import Shape, TensorShape, is_tensor_shape, require_pair, require_tensor, shape_of

Sizes: TypeAlias = tuple[PositiveInt, PositiveInt]
Pair: TypeAlias = tuple[Tensor, Tensor]


class _TwoParts(Rearrangement):
    """The base of `Split` and `Merge`: cuts a tensor in two along a dimension, and concatenates the two."""

    def __init__(self, sizes: Sizes | None = None, dim: PositiveInt = 1) -> None:
        super().__init__()
        self.sizes = sizes
        self.dim = dim

    def _parts(self, extent: int) -> tuple[int, int]:
        """The sizes as given, or halves, the smaller first."""
        return self.sizes or (extent // 2, extent - extent // 2)

    def cut(self, who: str, x: Tensor) -> Pair:
        # A quick test that the input fits, because this runs in every forward; if it fails, `part_shapes` says why.
        if isinstance(x, Tensor) and x.dim() > self.dim:
            extent = x.shape[self.dim]
            parts = self._parts(extent)
            if extent > 1 and parts[0] + parts[1] == extent:
                first, second = torch.split_with_sizes(x, parts, self.dim)
                return first, second
        self.part_shapes(who, shape_of(x))
        raise ShapeError(f"{who} expects one tensor, got {type(x).__name__}")

    def join(self, who: str, x: Pair) -> Tensor:
        """The pair as one tensor. Raises ShapeError for a pair that `cut` would not return."""
        # Concatenated first, then checked, because this runs in every forward; if it fails, `whole_shape` says why.
        if isinstance(x, tuple):
            try:
                whole = torch.cat(x, self.dim)
                if len(x) == 2 and x[0].shape[self.dim] == self._parts(whole.shape[self.dim])[0]:
                    return whole
            except (RuntimeError, TypeError, IndexError):
                pass
        self.whole_shape(who, shape_of(x))
        raise ShapeError(f"{who} expects two tensors of one batch and dtype, got {[tuple(part.shape) for part in x]}")

    def part_shapes(self, who: str, shape: Shape) -> tuple[TensorShape, TensorShape]:
        """The shapes of the two parts of a tensor of this shape."""
        whole, dim = require_tensor(who, shape), self.dim
        if len(whole) < dim:
            raise ShapeError(f"{who} along dim {dim} expects at least {dim} dimensions besides the batch, got {shape}")
        extent = whole[dim - 1]
        if extent < 2:
            raise ShapeError(
                f"{who} expects at least 2 channels along dim {dim} to make two parts of, got {extent} in {shape}; "
                "put a psi before it"
            )
        first, second = self._parts(extent)
        if first + second != extent:
            raise ShapeError(
                f"{who} with sizes {[first, second]} expects {first + second} along dim {dim}, got {extent} in {shape}"
            )
        before, after = whole[: dim - 1], whole[dim:]
        return (*before, first, *after), (*before, second, *after)

    def whole_shape(self, who: str, shape: Shape) -> TensorShape:
        """The shape of the tensor that a pair of this shape was cut from."""
        first, second = (require_tensor(who, part) for part in require_pair(who, shape))
        dim = self.dim
        others_agree = first[: dim - 1] + first[dim:] == second[: dim - 1] + second[dim:]
        if len(first) != len(second) or len(first) < dim or not others_agree:
            raise ShapeError(f"{who} expects two tensors that differ along dim {dim} only, got {shape}")
        parts = [first[dim - 1], second[dim - 1]]
        whole = (*first[: dim - 1], sum(parts), *first[dim:])
        if self.part_shapes(who, whole) != (first, second):
            expected = "halves, the smaller first" if self.sizes is None else f"sizes {list(self.sizes)}"
            raise ShapeError(f"{who} expects {expected} along dim {dim}, got {parts}; pass sizes={parts}")
        return whole


@register("split")
class Split(_TwoParts):
    """Cuts a tensor in two: ``x -> (x[:, :n], x[:, n:])``. Log-determinant 0.

    Use it before couplings, which change one half of the channels by the other.

    Args:
        sizes: the sizes of the two parts; halves by default, the first being the smaller one of an odd count.
        dim: the dimension to cut along; 1 is the channel.

    Examples:
        >>> import torch
        >>> [part.tolist() for part in Split()(torch.tensor([[1, 2, 3]]))]
        [[[1]], [[2, 3]]]
    """

    examples = [({}, (2,)), ({}, (5, 2, 2)), ({"sizes": [1, 3]}, (4, 3)), ({"dim": 2}, (1, 3, 2))]

    def forward(self, x: Tensor, context: Context = None) -> Pair:
        return self.cut("split", x)

    def inverse(self, y: Pair, context: Context = None) -> Tensor:
        return self.join("the inverse of split", y)

    def output_shape(self, shape: Shape) -> Shape:
        return self.part_shapes("split", shape)

    def input_shape(self, shape: Shape) -> Shape:
        return self.whole_shape("the inverse of split", shape)


@register("merge")
class Merge(_TwoParts):
    """Concatenates a pair, the inverse of `Split`: ``(a, b) -> cat(a, b)``. Log-determinant 0.

    Use it after couplings, to make one tensor of the halves again.

    Args:
        sizes: the sizes of the two parts. In a spec they come from the incoming pair; in Python the default is halves,
            the first being the smaller one of an odd count, and any other pair is a ShapeError.
        dim: the dimension to concatenate along; 1 is the channel.
        shape: the shape of the incoming pair, to take ``sizes`` from.

    Examples:
        >>> import torch
        >>> Merge()((torch.tensor([[1]]), torch.tensor([[2, 3]]))).tolist()
        [[1, 2, 3]]
    """

    examples = [({}, ((2,), (3,))), ({}, ((4, 2, 2), (1, 2, 2))), ({"dim": 2, "sizes": [2, 1]}, ((3, 2), (3, 1)))]

    def __init__(self, sizes: Sizes | None = None, dim: PositiveInt = 1, shape: Shape | None = None) -> None:
        if sizes is None and shape is not None and not is_tensor_shape(shape):
            first, second = (require_tensor("merge", part) for part in require_pair("merge", shape))
            if min(len(first), len(second)) >= dim:
                sizes = (first[dim - 1], second[dim - 1])
        super().__init__(sizes, dim)

    def forward(self, x: Pair, context: Context = None) -> Tensor:
        return self.join("merge", x)

    def inverse(self, y: Tensor, context: Context = None) -> Pair:
        return self.cut("the inverse of merge", y)

    def output_shape(self, shape: Shape) -> Shape:
        return self.whole_shape("merge", shape)

    def input_shape(self, shape: Shape) -> Shape:
        return self.part_shapes("the inverse of merge", shape)
