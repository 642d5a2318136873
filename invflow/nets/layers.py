"""Parts with weights that choose their number of channels: convolutions and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ShapeError
from ..part import Made, Part
from ..registry import register_part
from ..state import TensorShape, flat_size, require_positions
from .sizes import OddInt, set_to_zero

Border: TypeAlias = Literal["zeros", "reflect", "replicate", "circular", "marked"]
Sides: TypeAlias = OddInt | Annotated[list[OddInt], Field(min_length=1, max_length=3)]

_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}


class WeightNormed(nn.Module):
    """A layer without a bias whose weights are normalised: ``gain * layer(x) / |w| + bias`` per output channel.

    Reference: Salimans, Kingma: Weight Normalization, 2016, https://arxiv.org/abs/1602.07868
    """

    def __init__(self, layer: nn.Module, dims: int, *, bias: bool) -> None:
        super().__init__()
        self.layer = layer
        self._spread = (-1, *(1,) * (dims - 1))
        self.gain = nn.Parameter(self._norm().detach().clone())
        self.bias = nn.Parameter(torch.zeros_like(self.gain)) if bias else None

    def _norm(self) -> Tensor:
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return torch.linalg.vector_norm(weight.flatten(1), dim=1)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        # The norms are positive: a weight of length 0 would have no direction.
        scale = self.gain / self._norm().clamp(min=torch.finfo(self.gain.dtype).tiny)
        made: Tensor = self.layer(x) * scale.reshape(self._spread)
        return made if self.bias is None else made + self.bias.reshape(self._spread)


class Marked(nn.Module):
    """A convolution that sees its border: a further input channel is 1 on the padding and 0 elsewhere."""

    def __init__(self, conv: nn.Module, padding: list[int]) -> None:
        super().__init__()
        self.conv = conv
        self._padding = [side for size in reversed(padding) for side in (size, size)]

    def forward(self, x: Tensor) -> Tensor:
        mark = functional.pad(x.new_zeros(1, 1, *x.shape[2:]), self._padding, value=1.0)
        padded = functional.pad(x, self._padding)
        return self.conv(torch.cat([padded, mark.expand(len(x), *mark.shape[1:])], dim=1))  # type: ignore[no-any-return]


@register_part("conv")
class Convolution(Part):
    """A convolution over 1, 2 or 3 dimensions of positions, padded so that stride 1 keeps them.

    Stride s turns n positions into ``ceil(n / s)``.

    Args:
        channels: the channels that it returns; by default those that the net must return if it is the last such part,
            else those of its input.
        kernel_size: the side of the kernel, odd, or one for each dimension.
        stride: the distance between the positions that it returns.
        bias: whether a number per channel is added.
        border: what lies around the input: zeros; its mirror image; its outermost values; its opposite side; or zeros
            and, in a further input channel, ones ("marked", as in Glow), which tell the border from the inside.
        weight_norm: whether the weights of each output channel have a learned norm and a direction of their own.
        groups: the groups of channels that do not mix.
    """

    chooses = True

    def __init__(
        self,
        channels: PositiveInt | None = None,
        kernel_size: Sides = 3,
        stride: PositiveInt = 1,
        bias: bool = True,
        border: Border = "zeros",
        weight_norm: bool = False,
        groups: PositiveInt = 1,
    ) -> None:
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.bias = bias
        self.border = border
        self.weight_norm = weight_norm
        self.groups = groups

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        channels, *positions = require_positions(self.tag, shape)
        made = self.channels or (wanted or shape)[0]
        sides = self.kernel_size if isinstance(self.kernel_size, list) else [self.kernel_size] * len(positions)
        if len(sides) != len(positions):
            raise ShapeError(f"{self.tag} expects one kernel_size, or {len(positions)} for {shape}, got {sides}")
        marked = self.border == "marked"
        if (channels + marked) % self.groups or made % self.groups:
            raise ShapeError(
                f"{self.tag} with groups {self.groups} expects channels that it divides, got {channels} in, {made} out"
            )
        padding = [side // 2 for side in sides]
        if self.border == "reflect" and any(size <= pad for size, pad in zip(positions, padding, strict=True)):
            raise ShapeError(
                f"{self.tag} with a mirrored border expects more than {max(padding)} positions, got {shape}"
            )
        options: dict[str, Any] = {} if marked else {"padding": tuple(padding), "padding_mode": self.border}
        conv = _CONVOLUTIONS[len(shape)](
            channels + marked,
            made,
            tuple(sides),
            self.stride,
            bias=self.bias and not self.weight_norm,
            groups=self.groups,
            **options,
        )
        conv = WeightNormed(conv, len(shape), bias=self.bias) if self.weight_norm else conv
        return Marked(conv, padding) if marked else conv, (made, *(-(-size // self.stride) for size in positions))

    @property
    def obstacle(self) -> str | None:
        if self.border == "zeros" and not self.weight_norm:
            return None
        return f"its net's {self.tag} has weight_norm or a border other than zeros, which have no integer form"

    def start_at_zero(self, module: nn.Module) -> None:
        _start_at_zero(module.conv if isinstance(module, Marked) else module)


@register_part("linear")
class Linear(Part):
    """A linear map of the channels: of a vector, or of the channels at every position alike.

    Args:
        channels: the channels that it returns; by default those that the net must return if it is the last such part
            (of a vector, as many numbers as the net returns), else those of its input.
        bias: whether a number per channel is added.
        weight_norm: whether the weights of each output channel have a learned norm and a direction of their own.
    """

    chooses = True

    def __init__(self, channels: PositiveInt | None = None, bias: bool = True, weight_norm: bool = False) -> None:
        self.channels = channels
        self.bias = bias
        self.weight_norm = weight_norm

    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        if len(shape) > 1:
            everywhere = Convolution(self.channels, 1, bias=self.bias, weight_norm=self.weight_norm)
            return everywhere.make(shape, wanted)
        made = self.channels or flat_size(wanted or shape)
        linear = nn.Linear(shape[0], made, bias=self.bias and not self.weight_norm)
        return WeightNormed(linear, 1, bias=self.bias) if self.weight_norm else linear, (made,)

    @property
    def obstacle(self) -> str | None:
        return f"its net's {self.tag} has weight_norm, which has no integer form" if self.weight_norm else None

    def start_at_zero(self, module: nn.Module) -> None:
        _start_at_zero(module)


def _start_at_zero(module: nn.Module) -> None:
    if not isinstance(module, WeightNormed):
        set_to_zero(module)
    else:  # its direction must not be zero
        nn.init.zeros_(module.gain)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
