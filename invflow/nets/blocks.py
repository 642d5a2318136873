"""Parts made of parts: residual and dense blocks, skip connections, and channels that are carried past a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from ..errors import ShapeError
from ..part import Made, Part
from ..registry import register_part
from ..state import TensorShape
from .layers import Linear
from .stack import make_all, make_each


class Skip(nn.Sequential):
    """``x + f(x)``, with f the modules inside."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)  # type: ignore[no-any-return, no-untyped-call]


class Append(nn.Sequential):
    """``x`` with ``f(x)`` as further channels, f being the modules inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], dim=1)  # type: ignore[no-untyped-call]


class Carried(nn.Sequential):
    """``f(x)`` with the last channels of x behind it, f being the modules inside."""

    def __init__(self, *modules: nn.Module, channels: int) -> None:
        super().__init__(*modules)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x), x[:, -self.channels :]], dim=1)  # type: ignore[no-untyped-call]


@register_part("residual")
class ResidualBlock(Part):
    """``x + f(x)``, with f some parts one after another; the last that chooses its channels returns those of x.

    Args:
        *parts: the parts of f.

    Raises:
        ShapeError: f does not return the shape of x.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        modules, made = make_all(self.parts, shape, shape)
        if made != shape:
            raise ShapeError(f"{self.tag} expects parts that keep the shape {shape}, got {made}")
        return Skip(*modules), shape


@register_part("dense")
class DenseBlock(Part):
    """``(x, f(x))``: the channels of f, some parts one after another, behind those of x.

    Reference: Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks, 2016,
    https://arxiv.org/abs/1608.06993

    Args:
        *parts: the parts of f.

    Raises:
        ShapeError: f does not keep the positions of x.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts = parts

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        modules, made = make_all(self.parts, shape, None)
        if made[1:] != shape[1:]:
            raise ShapeError(f"{self.tag} expects parts that keep the positions of {shape}, got {made}")
        return Append(*modules), (shape[0] + made[0], *shape[1:])


class Summed(nn.Module):
    """``map_1(x_1) + ... + map_n(x_n)``, where each stage makes ``x_k`` of the one before, the first of x."""

    def __init__(self, stages: Sequence[nn.Module], maps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.maps = nn.ModuleList(maps)

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for stage, to_sum in zip(self.stages, self.maps, strict=True):
            x = stage(x)
            made.append(to_sum(x))
        return torch.stack(made).sum(0)


class OnFirst(nn.Sequential):
    """``f(first channels)`` with the other channels behind it, f being the modules inside."""

    def __init__(self, *modules: nn.Module, channels: int) -> None:
        super().__init__(*modules)
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        first = super().forward(x[:, : self.channels])  # type: ignore[no-untyped-call]
        return torch.cat([first, x[:, self.channels :]], dim=1)


@register_part("first")
class First(Part):
    """``(f(first channels), other channels)``: of the net of an affine coupling, f changes what makes its scales.

    Args:
        *parts: the parts of f, one after another.
        channels: the number of channels that f sees; by default half of them.

    Raises:
        ShapeError: x has fewer channels, or f does not keep their shape.
    """

    def __init__(self, *parts: Part, channels: PositiveInt | None = None) -> None:
        self.parts = parts
        self.channels = channels

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        channels = self.channels or shape[0] // 2
        if not 0 < channels < shape[0]:
            raise ShapeError(f"{self.tag} expects more than {max(channels, 1)} channels, got {shape}")
        first = (channels, *shape[1:])
        modules, made = make_all(self.parts, first, first)
        if made != first:
            raise ShapeError(f"{self.tag} expects parts that keep the shape {first}, got {made}")
        return OnFirst(*modules, channels=channels), shape


@register_part("skips")
class Skips(Part):
    """``C_1 x_1 + ... + C_n x_n``, where ``x_k = f_k(x_(k - 1))`` with parts f_k, and C_k is a linear map with a bias.

    The output of every part skips those after it, as in the nets of RealNVP and of WaveNet. The maps are those of
    `linear`: of the channels, at every position alike.

    Reference: Dinh, Sohl-Dickstein, Bengio: Density estimation using Real NVP, 2016, https://arxiv.org/abs/1605.08803

    Args:
        *parts: the parts f_1, f_2, ....
        channels: the channels of the sum; by default those of x_1.
        weight_norm: whether the weights of each output channel of the maps have a learned norm and a direction.

    Raises:
        ShapeError: there are no parts, or they do not return the same positions.
    """

    def __init__(self, *parts: Part, channels: PositiveInt | None = None, weight_norm: bool = False) -> None:
        self.parts = parts
        self.channels = channels
        self.weight_norm = weight_norm

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        if not self.parts:
            raise ShapeError(f"{self.tag} expects parts, got none")
        stages, shapes = zip(*make_each(self.parts, shape, None), strict=True)
        (channels, *positions), linear = shapes[0], Linear(self.channels or shapes[0][0], weight_norm=self.weight_norm)
        if any(list(one[1:]) != positions for one in shapes):
            raise ShapeError(f"{self.tag} expects parts that return the same positions, got the shapes {shapes}")
        maps = [linear.make(one, None)[0] for one in shapes]
        return Summed(stages, maps), (self.channels or channels, *positions)


@register_part("carry")
class Carry(Part):
    """``(f(x), last channels of x)``: what the last channels say reaches the next part too.

    A net of `continuous` has the time as the last channel of its input, and behind it the context if there is one. Each
    convolution or linear layer in a `carry` sees the time, and so does the one after the last `carry`: these are the
    "concat" layers of FFJORD.

    Reference: Grathwohl et al.: FFJORD, 2018, https://arxiv.org/abs/1810.01367

    Args:
        *parts: the parts of f.
        channels: the number of channels that are carried.

    Raises:
        ShapeError: x has fewer channels, or f does not keep its positions.
    """

    def __init__(self, *parts: Part, channels: PositiveInt = 1) -> None:
        self.parts = parts
        self.channels = channels

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        if shape[0] < self.channels:
            raise ShapeError(f"{self.tag} expects at least {self.channels} channels to carry, got {shape}")
        modules, made = make_all(self.parts, shape, None)
        if made[1:] != shape[1:]:
            raise ShapeError(f"{self.tag} expects parts that keep the positions of {shape}, got {made}")
        return Carried(*modules, channels=self.channels), (made[0] + self.channels, *shape[1:])
