"""Plain conditioners, short forms of `stack`: convolutions or linear layers with activations between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from ..context import Context, ContextShape
from ..part import Part
from ..registry import register_net
from ..state import Shape, flat_size, require_tensor
from .activations import ACTIVATIONS, Activation
from .layers import Convolution, Linear
from .norms import BatchNorm
from .sizes import OddInt, Widths
from .stack import Stack


def plain_parts(
    hidden: Sequence[int],
    layer: Callable[[int | None], Part],
    activation: Activation,
    norm: Literal["batch"] | None = None,
    *,
    final: bool = True,
    final_activation: bool = False,
) -> list[Part]:
    """The parts of layers to ``hidden`` channels and, if ``final``, to those that a net must return.

    Each is followed by norm and activation, the last one of all only with ``final_activation``.
    """
    widths = [*hidden, *([None] if final else [])]
    parts: list[Part] = []
    for position, width in enumerate(widths, start=1):
        parts.append(layer(width))
        if position < len(widths) or final_activation:
            parts += [*([BatchNorm()] if norm == "batch" else []), ACTIVATIONS[activation]()]
    return parts


@register_net("conv")
class Conv(Stack):
    """Convolutions from ``in_shape`` to ``out_shape``, which agree in their positions.

    Use it in couplings of images, sequences and volumes: the first net to try.

    Each convolution has zero padding that keeps the size; each but the last is followed by norm and activation. The
    context becomes further input channels; a vector is spread over all positions.

    Args:
        in_shape: (channels, height, width) of the input, without the batch; or that of a sequence or a volume.
        out_shape: likewise for the output.
        context_shape: (features,), or (channels, ...) with the input's positions.
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
        context_shape: ContextShape = None,
        hidden: Widths = [],  # noqa: B006 -- a JSON default, never changed
        kernel_size: OddInt = 3,
        activation: Activation = "relu",
        norm: Literal["batch"] | None = None,
        final_activation: bool = False,
        zero_last: bool = False,
    ) -> None:
        def layer(width: int | None) -> Part:
            return Convolution(width, kernel_size)

        super().__init__(
            *plain_parts(hidden, layer, activation, norm, final_activation=final_activation),
            in_shape=in_shape,
            out_shape=out_shape,
            context_shape=context_shape,
            zero_last=zero_last,
        )


@register_net("mlp")
class MLP(Stack):
    """Linear layers on the flattened input; the output is reshaped to ``out_shape``.

    Use it in couplings of vectors: the first net to try.

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
        context_shape: ContextShape = None,
        hidden: Widths = [],  # noqa: B006 -- a JSON default, never changed
        activation: Activation = "relu",
        norm: Literal["batch"] | None = None,
        final_activation: bool = False,
        zero_last: bool = False,
    ) -> None:
        super().__init__(
            *plain_parts(hidden, Linear, activation, norm, final_activation=final_activation),
            in_shape=(flat_size(require_tensor("mlp", in_shape)),),
            out_shape=out_shape,
            context_shape=context_shape,
            zero_last=zero_last,
        )

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return super().forward(x.flatten(1), context)
