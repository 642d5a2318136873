"""Splits by parity: stripes and checkerboards."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ..bijection import Rearrangement
from ..context import Context
from ..errors import ShapeError
from ..nets.stack import make_all, start_at_zero
from ..part import Made, Part
from ..registry import register, register_part
from ..state import Shape, TensorShape, require_pair, require_positions, require_tensor, shape_of
from .split import Pair

Parity: TypeAlias = Literal["even", "odd"]


def evens_and_odds(x: Tensor, dim: int) -> Pair:
    """The numbers at even and at odd indices along a dimension, as views."""
    before = (slice(None),) * dim
    return x[(*before, slice(0, None, 2))], x[(*before, slice(1, None, 2))]


def interleaved(evens: Tensor, odds: Tensor, dim: int) -> Tensor:
    """The inverse of `evens_and_odds`."""
    count = odds.shape[dim]
    if evens.shape[dim] == count:
        return torch.stack((evens, odds), dim + 1).flatten(dim, dim + 1)
    last = evens.narrow(dim, count, 1)
    return torch.cat((interleaved(evens.narrow(dim, 0, count), odds, dim), last), dim)


class _ByParity(Rearrangement):
    """The base of `Stripes` and `Checkerboard`: a tensor becomes a pair, or a pair a tensor.

    Args:
        first: the half that comes first.
    """

    def __init__(self, first: Parity = "even") -> None:
        super().__init__()
        self.first = first

    def _ordered(self, evens: Tensor, odds: Tensor) -> Pair:
        """The pair of evens and odds as the layer returns it, and such a pair as evens and odds."""
        return (evens, odds) if self.first == "even" else (odds, evens)

    def _halves(self, shape: Shape) -> tuple[TensorShape, TensorShape]:
        """The shapes of two tensors, else a ShapeError."""
        who = f"the inverse of {self.tag}"
        first, second = require_pair(who, shape)
        return require_tensor(who, first), require_tensor(who, second)

    def _mismatch(self, shape: Shape) -> ShapeError:
        who = f"the inverse of {self.tag}"
        return ShapeError(f"{who} expects the halves of one tensor, that of {self.first} indices first, got {shape}")


@register("stripes")
class Stripes(_ByParity):
    """Splits a tensor into every second stripe: with ``dim`` 2, ``x -> (x[:, :, 0::2], x[:, :, 1::2])``.

    Use it to split neighbours from each other before couplings, as NICE does.

    The stripes of an image are its rows, ``dim`` 2, or columns, ``dim`` 3; ``dim`` 1 splits the channels of a tensor
    or the features of a vector, as NICE does. Log-determinant 0. The inverse interleaves the two; as a layer it is
    ``{"type": "inverse", "layer": {"type": "stripes"}}``.

    References: Dinh, Krueger, Bengio: NICE, 2014, https://arxiv.org/abs/1410.8516; Kolesnikov, Pinto, Tschannen: Jet,
    2024, https://arxiv.org/abs/2412.15129

    Args:
        first: the half that comes first: that of "even" or of "odd" indices. The one of even indices is larger by one
            if their number is odd.
        dim: the dimension that is split, 1 being the channels.

    Examples:
        >>> [part.tolist() for part in Stripes(dim=1)(torch.arange(5)[None])]
        [[[0, 2, 4]], [[1, 3]]]
    """

    examples = [({}, (2, 4, 3)), ({"dim": 1, "first": "odd"}, (5,)), ({"dim": 3}, (1, 2, 4)), ({"dim": 2}, (3, 3))]

    def __init__(self, first: Parity = "even", dim: PositiveInt = 2) -> None:
        super().__init__(first)
        self.dim = dim

    def forward(self, x: Tensor, context: Context = None) -> Pair:
        self.output_shape(shape_of(x))
        return self._ordered(*evens_and_odds(x, self.dim))

    def inverse(self, y: Pair, context: Context = None) -> Tensor:
        self.input_shape(shape_of(y))
        return interleaved(*self._ordered(*y), self.dim)

    def output_shape(self, shape: Shape) -> tuple[TensorShape, TensorShape]:
        whole, dim = require_tensor("stripes", shape), self.dim
        if len(whole) < dim or whole[dim - 1] < 2:
            raise ShapeError(f"stripes along dim {dim} expects at least 2 indices there, got {shape}")
        evens, odds = (
            (*whole[: dim - 1], size, *whole[dim:]) for size in ((whole[dim - 1] + 1) // 2, whole[dim - 1] // 2)
        )
        return (evens, odds) if self.first == "even" else (odds, evens)

    def input_shape(self, shape: Shape) -> TensorShape:
        first, second = self._halves(shape)
        if len(first) == len(second) >= self.dim:
            at = self.dim - 1
            whole = (*first[:at], first[at] + second[at], *first[at + 1 :])
            if self.output_shape(whole) == (first, second):
                return whole
        raise self._mismatch(shape)


@register("checkerboard")
class Checkerboard(_ByParity):
    """Splits the positions of a sequence, an image or a volume into two halves as the colours of a checkerboard.

    Use it to split neighbours from each other before couplings of images, as Real NVP does.

    The even half of an image ``(c, h, w)`` holds the pixels with an even ``row + column``, the odd half the others,
    both of shape ``(c, h, w / 2)``: ``evens[:, r, s] = x[:, r, 2 * s + r % 2]``. On a volume, the parity is that of
    ``depth + row + column``; a sequence is split into every second position. Log-determinant 0. As a layer the inverse
    is ``{"type": "inverse", "layer": {"type": "checkerboard"}}``.

    Reference: Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2016, https://arxiv.org/abs/1605.08803

    Args:
        first: the half that comes first, "even" or "odd".

    Examples:
        >>> [part[0, 0].tolist() for part in Checkerboard()(torch.arange(8).reshape(1, 1, 2, 4))]
        [[[0, 2], [5, 7]], [[1, 3], [4, 6]]]
    """

    examples = [({}, (2, 3, 4)), ({"first": "odd"}, (1, 4, 2)), ({}, (3, 4)), ({"first": "odd"}, (1, 2, 3, 4))]

    def forward(self, x: Tensor, context: Context = None) -> Pair:
        self.output_shape(shape_of(x))
        return self._ordered(*_recoloured(*evens_and_odds(x, x.dim() - 1)))

    def inverse(self, y: Pair, context: Context = None) -> Tensor:
        self.input_shape(shape_of(y))
        return interleaved(*_recoloured(*self._ordered(*y)), y[0].dim() - 1)

    def output_shape(self, shape: Shape) -> tuple[TensorShape, TensorShape]:
        *others, width = require_positions("checkerboard", shape)
        if width % 2:
            raise ShapeError(f"checkerboard expects an even number of positions along the last dim, got {shape}")
        half = (*others, width // 2)
        return half, half

    def input_shape(self, shape: Shape) -> TensorShape:
        first, second = self._halves(shape)
        *others, width = require_positions("the inverse of checkerboard", first)
        if first != second:
            raise self._mismatch(shape)
        return *others, 2 * width


class _OnBoard(nn.Sequential):
    """The modules on a whole board, of which one colour is given and the other returned."""

    def __init__(self, *modules: nn.Module, colour: Parity) -> None:
        super().__init__(*modules)
        self.colour = colour

    def forward(self, x: Tensor) -> Tensor:
        board = Checkerboard(self.colour)
        made: Pair = board(super().forward(board.inverse((x, torch.zeros_like(x)))))  # type: ignore[no-untyped-call]
        return made[1]


@register_part("checkerboard")
class OnCheckerboard(Part):
    """Parts that see one colour of a checkerboard at its places on the whole board, with zeros at the others.

    x is one half of what the layer `checkerboard` splits; of the parts' output, the values at the places of the other
    half are returned. So convolutions see neighbours as neighbours, and the conditioner of a coupling between the two
    halves is that of a masked convolution, as in RealNVP.

    Reference: Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2016, https://arxiv.org/abs/1605.08803

    Args:
        *parts: the parts, one after another, which keep the positions.
        colour: the half that is given: that of "even" or of "odd" sums of indices.

    Raises:
        ShapeError: x has no positions, or the parts do not keep them.
    """

    chooses = True

    def __init__(self, *parts: Part, colour: Parity = "even") -> None:
        self.parts = parts
        self.colour = colour

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        *others, width = require_positions(self.tag, shape)
        whole = (*others, 2 * width)
        on_whole = None if wanted is None else (*wanted[:-1], 2 * wanted[-1])
        modules, made = make_all(self.parts, whole, on_whole)
        if made[1:] != whole[1:]:
            raise ShapeError(f"{self.tag} expects parts that keep the positions of {whole}, got {made}")
        return _OnBoard(*modules, colour=self.colour), (made[0], *shape[1:])

    def start_at_zero(self, module: nn.Module) -> None:
        start_at_zero(self.parts, list(module.children()))


def _recoloured(evens: Tensor, odds: Tensor) -> Pair:
    """Exchanges the halves wherever the sum of all indices but the last is odd: its own inverse."""
    for dim in range(2, evens.dim() - 1):
        (a, b), (c, d) = evens_and_odds(evens, dim), evens_and_odds(odds, dim)
        evens, odds = interleaved(a, d, dim), interleaved(c, b, dim)
    return evens, odds
