"""Convolutional conditioners."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..registry import register_net
from ..state import Shape, TensorShape, require_tensor
from .contract import Stack
from .parts import Activation, Norm, OddInt, Widths, conv_stack, require_context, start_at_zero


@register_net("conv")
class Conv(Stack):
    """Convolutions from ``in_shape`` to ``out_shape``, which agree in height and width.

    Each convolution has zero padding that keeps the size; each but the last is followed by norm and activation. The
    context enters as further input channels, a vector spread over all positions.

    Args:
        in_shape: (channels, height, width) of the input, without the batch.
        out_shape: likewise of the output.
        context_shape: (features,), or (channels, height, width) with the input's height and width.
        hidden: the channels of the layers between; none makes one convolution.
        kernel_size: the side of every kernel, odd.
        activation: what follows each convolution but the last.
        norm: "batch" puts batch normalisation between convolution and activation.
        final_activation: whether the last convolution is followed by norm and activation too; couplings that need
            outputs of either sign, log-scales for example, leave it off.
        zero_last: whether the last convolution starts at zero, so that the net is 0 until it is trained.

    Examples:
        >>> Conv((2, 5, 5), (3, 5, 5), hidden=[8])(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 3, 5, 5])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        context_shape: TensorShape | None = None,
        hidden: Widths = [],  # noqa: B006 -- a JSON default, never changed
        kernel_size: OddInt = 3,
        activation: Activation = "relu",
        norm: Norm | None = None,
        final_activation: bool = False,
        zero_last: bool = False,
    ) -> None:
        channels, height, width = require_tensor("conv", in_shape, dims=3)
        out_channels, *out_size = require_tensor("conv", out_shape, dims=3)
        if out_size != [height, width]:
            raise ShapeError(f"conv expects to keep height and width, got {in_shape} in and {out_shape} out")
        more = context_channels("conv", context_shape, (height, width))
        layers = conv_stack([channels + more, *hidden, out_channels], kernel_size, activation, norm, final_activation)
        super().__init__(*layers, context_features=more)
        self.context_shape = context_shape
        if zero_last:
            start_at_zero("conv", self[-1], final_activation)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = with_context_channels("conv", x, context, self.context_shape)
        return super().forward(x)  # type: ignore[no-any-return, no-untyped-call]


def context_channels(who: str, shape: TensorShape | None, size: tuple[int, int]) -> int:
    """How many channels a context adds to images of this size."""
    if shape is None:
        return 0
    if len(shape) != 1 and shape[1:] != size:
        raise ShapeError(f"{who} expects a context (features,) or (channels, {size[0]}, {size[1]}), got {shape}")
    return shape[0]


def with_context_channels(who: str, x: Tensor, context: Tensor | None, shape: TensorShape | None) -> Tensor:
    """Images with their context as further channels, a vector spread over all positions."""
    if context is None and shape is None:
        return x
    given = require_context(who, context, shape)
    if given.dim() == 2:
        given = given[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x, given], dim=1)
