"""Linear maps across the channels that keep lengths: reflections and rotations."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from .._torch import Constants
from ..context import Context
from ..errors import InvflowError
from ..numerics.backend import own_precision
from ..registry import register
from ..state import Shape
from .channels import OfChannels
from .linear import single, times

_DRAW = 10_000  # the operations that one normal number of Python's generator takes
_UNIT = 2.0**-52
_ORTHOGONAL = 1e-12
"""The largest error of an entry of Q Q': rounding to units, and the roundings of a factorisation of 1,000 channels."""
_SHORTEST = 1e-18
"""A vector all of whose numbers are smaller has no direction: float32 holds neither their squares nor 1 over those."""


class _Isometry(OfChannels):
    """A linear map of the channels that keeps lengths: ``|det| = 1``."""

    volume_preserving = True

    def lipschitz_bounds(self) -> tuple[float, float]:
        return 1.0, 1.0


@register("householder")
class Householder(_Isometry):
    """``y = H_1 H_2 ... H_k x`` across the channels at every position, with learned reflections ``H = I - 2 u u'``.

    Use it to turn the channels by a learned rotation or reflection, whose inverse costs no more and loses no
    digits.

    Each u is a learned vector v divided by its length; one shorter than 1e-18 reflects nothing, ``H = I``. It applies
    the product to vectors, in ``O(k * channels)``: ``y = x - U' S^-1 U x``, with the u as rows of U and
    ``S = I / 2 + `` the part of ``U U'`` above its diagonal. The inverse is the transpose, the reflections in reversed
    order. An isometry; the log-determinant is 0, and the determinant is -1 for each reflection. It starts at random.

    References: Tomczak, Welling: Householder flows, 2016, https://arxiv.org/abs/1611.09630; Joffrain et al.:
    Accumulating Householder transformations, revisited, 2006, https://doi.org/10.1145/1141885.1141886

    Args:
        shape: the incoming shape, channels first.
        reflections: k; as many as channels can make any rotation or reflection.

    Examples:
        >>> layer = Householder(shape=(3,), reflections=1)
        >>> _ = layer.vectors.data.copy_(torch.tensor([[1.0, 0.0, 0.0]]))
        >>> layer(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[-1.0, 2.0, 3.0]]
    """

    examples = [({}, (3,)), ({"reflections": 3}, (2, 3, 2)), ({"reflections": 1}, (4, 2)), ({}, (1,))]

    def __init__(self, shape: Shape, reflections: PositiveInt = 2) -> None:
        super().__init__(shape)
        self.vectors = nn.Parameter(torch.randn(reflections, self.channels))

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return self._reflected(x, backwards=False)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        return self._reflected(y, backwards=True)

    @property
    def rounding_growth(self) -> float:
        """The number of reflections, each of which rounds; those that are alike cancel, which S^-1 feels most."""
        return float(len(self.vectors))

    def _reflected(self, x: Tensor, *, backwards: bool) -> Tensor:
        self.require(x)
        with own_precision(x):
            units, weighted = self._factors()
            inner, outer = (units, weighted) if backwards else (weighted, units)
            wide = single(x)
            return (wide - times(outer.mT, times(inner, wide))).to(x.dtype)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """U, and ``S^-1 U``, whose rows are no longer than 2."""
        vectors = single(self.vectors)
        largest = vectors.detach().abs().amax(1, keepdim=True)  # what divides a vector does not turn it
        sound = largest > _SHORTEST
        scaled = torch.where(sound, vectors, 1.0) / torch.where(sound, largest, 1.0)  # its largest number is 1
        units = torch.where(sound, scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True), 0.0)
        halves = torch.full_like(units[:, 0], 0.5).diag()
        return units, torch.linalg.solve_triangular((units @ units.mT).triu(1) + halves, units, upper=True)


@register("rotation")
class Rotation(Constants, _Isometry):
    """``y = Q x`` across the channels at every position, with a random rotation Q that is never learned.

    Use it between couplings to mix all channels, where nothing has to be learned.

    Q is drawn evenly from all rotations by the seed, the same on every machine: ``Q' Q = I`` and ``det Q = 1``. The
    inverse is ``Q'``, the log-determinant 0. It mixes channels as a `permute` does, but all with all.

    Args:
        shape: the incoming shape, channels first.
        seed: draws Q.

    Raises:
        InvflowError: a matrix that was loaded is not orthogonal.

    Examples:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> Rotation(shape=(2,), seed=1)(x).norm().round(decimals=4).item()
        5.0
    """

    examples = [({}, (3,)), ({"seed": 1}, (2, 3, 2)), ({"seed": 2}, (4, 2)), ({}, (1,))]

    constants = ("entries",)

    def __init__(self, shape: Shape, seed: NonNegativeInt = 0) -> None:
        super().__init__(shape)
        self._seed = seed
        self._matrix = torch.empty(0)  # of the dtype that a model has at first
        self.entries = self.made("entries")

    @property
    def entries(self) -> Tensor:
        """Q in units of 2^-52: a cast to float32 and back would leave a matrix that is not orthogonal."""
        return self._entries

    @entries.setter
    def entries(self, entries: Tensor) -> None:
        self._entries = entries
        self._matrix = self._rounded(self._matrix.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._matrix = fn(self._matrix)  # tells the dtype: the entries, which are set next, are integers in any model
        return super()._apply(fn, recurse)

    def made(self, name: str) -> Tensor:
        size, here = self.channels, torch.empty(0).device
        if here.type == "meta":  # where a size costs nothing
            return torch.zeros(size, size, dtype=torch.int64)
        source = random.Random(self._seed)  # the same on every machine and in every version of torch
        drawn = [[source.gauss(0.0, 1.0) for _ in range(size)] for _ in range(size)]
        rotation, triangle = torch.linalg.qr(torch.tensor(drawn, dtype=torch.float64, device="cpu"))
        rotation = rotation * triangle.diagonal().sign()  # else not all rotations are equally likely
        if torch.linalg.det(rotation) < 0:
            rotation[0] *= -1
        units: Tensor = (rotation / _UNIT).round()
        return units.to(here, torch.int64)

    def prove(self) -> None:
        """Raises InvflowError if the matrix is not orthogonal."""
        if self.entries.is_meta:
            return
        rotation = self.entries.cpu().double() * _UNIT
        off = float((rotation @ rotation.mT - torch.eye(self.channels, dtype=torch.float64)).abs().max())
        if not off <= _ORTHOGONAL:
            raise InvflowError(f"{self.tag} expects an orthogonal matrix, got entries that miss it by {off:.3g}")

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        self.require(x)
        with own_precision(x):
            return times(self._of_dtype(x.dtype), x)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        self.require(y)
        with own_precision(y):
            return times(self._of_dtype(y.dtype).mT, y)

    @property
    def building_cost(self) -> int:
        """The random numbers, and two factorisations."""
        return _DRAW * self.channels**2 + 4 * self.channels**3

    def _of_dtype(self, dtype: torch.dtype) -> Tensor:
        return self._matrix if self._matrix.dtype == dtype else self._rounded(dtype)

    def _rounded(self, dtype: torch.dtype) -> Tensor:
        """Q, rounded once."""
        return (self.entries.to(torch.promote_types(dtype, torch.float32)) * _UNIT).to(dtype)
