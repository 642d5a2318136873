"""Plain conditioners: convolutions or linear layers with activations between them."""

from __future__ import annotations

from torch import Tensor

from ..registry import register_net
from ..state import Shape, TensorShape, flat_size, require_tensor
from .contract import Stack
from .parts import Activation, Norm, OddInt, Widths, image_sizes, make_layers, start_at_zero, with_context


@register_net("conv")
class Conv(Stack):
    """Convolutions from ``in_shape`` to ``out_shape``, which agree in height and width.

    Each convolution has zero padding that keeps the size; each but the last is followed by norm and activation. The
    context becomes further input channels; a vector is spread over all positions.

    Args:
        in_shape: (channels, height, width) of the input, without the batch.
        out_shape: likewise for the output.
        context_shape: (features,), or (channels, height, width) with the input's height and width.
        hidden: the channels between the convolutions; an empty list makes one convolution.
        kernel_size: the side of every kernel, odd.
        activation: the function after each convolution but the last.
        norm: "batch" puts batch normalisation between convolution and activation.
        final_activation: whether norm and activation follow the last convolution too; leave it off for outputs of
            either sign, such as log-scales.
        zero_last: whether the last convolution starts at zero, so that the net is 0 until it is trained.

    Examples:
        >>> import torch
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
        _, channels, more, out_channels = image_sizes("conv", in_shape, out_shape, context_shape)
        layers = make_layers([channels + more, *hidden, out_channels], kernel_size, activation, norm, final_activation)
        super().__init__(*layers, context_features=more)
        self.context_shape = context_shape
        if zero_last:
            start_at_zero("conv", self[-1], final_activation)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(with_context("conv", x, context, self.context_shape))  # type: ignore[no-any-return, no-untyped-call]


@register_net("mlp")
class MLP(Stack):
    """Linear layers on the flattened input; the output is reshaped to ``out_shape``.

    Each layer but the last is followed by norm and activation. The context is flattened and concatenated to the input.

    Args:
        in_shape: the shape of the input, without the batch.
        out_shape: likewise for the output.
        context_shape: likewise for the context.
        hidden: the features between the layers; an empty list makes one linear map.
        activation: the function after each layer but the last.
        norm: "batch" puts batch normalisation between layer and activation.
        final_activation: whether norm and activation follow the last layer too.
        zero_last: whether the last layer starts at zero, so that the net is 0 until it is trained.

    Examples:
        >>> import torch
        >>> MLP((2, 3), (4,), hidden=[8])(torch.zeros(5, 2, 3)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        context_shape: TensorShape | None = None,
        hidden: Widths = [],  # noqa: B006 -- a JSON default, never changed
        activation: Activation = "relu",
        norm: Norm | None = None,
        final_activation: bool = False,
        zero_last: bool = False,
    ) -> None:
        more = flat_size(context_shape) if context_shape else 0
        features = flat_size(require_tensor("mlp", in_shape)) + more
        widths = [features, *hidden, flat_size(require_tensor("mlp", out_shape))]
        super().__init__(*make_layers(widths, None, activation, norm, final_activation), context_features=more)
        self.out_shape = out_shape
        self.context_shape = context_shape
        if zero_last:
            start_at_zero("mlp", self[-1], final_activation)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        flat = with_context("mlp", x.flatten(1), context, self.context_shape)
        return super().forward(flat).reshape(x.shape[0], *self.out_shape)  # type: ignore[no-any-return, no-untyped-call]
