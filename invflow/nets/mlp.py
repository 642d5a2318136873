"""Fully connected conditioners."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register_net
from ..state import Shape, TensorShape, flat_size, require_tensor
from .contract import Stack
from .parts import Activation, Norm, Widths, linear_stack, require_context, start_at_zero


@register_net("mlp")
class MLP(Stack):
    """Linear layers on the flattened input; the output is reshaped to ``out_shape``.

    Each layer but the last is followed by norm and activation. The context is flattened and concatenated to the input.

    Args:
        in_shape: the shape of the input, without the batch.
        out_shape: likewise of the output.
        context_shape: likewise of the context.
        hidden: the features of the layers between; none makes one linear map.
        activation: what follows each layer but the last.
        norm: "batch" puts batch normalisation between layer and activation.
        final_activation: whether the last layer is followed by norm and activation too.
        zero_last: whether the last layer starts at zero, so that the net is 0 until it is trained.

    Examples:
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
        context_features = flat_size(context_shape) if context_shape else 0
        features = flat_size(require_tensor("mlp", in_shape)) + context_features
        widths = [features, *hidden, flat_size(require_tensor("mlp", out_shape))]
        super().__init__(*linear_stack(widths, activation, norm, final_activation), context_features=context_features)
        self.out_shape = out_shape
        self.context_shape = context_shape
        if zero_last:
            start_at_zero("mlp", self[-1], final_activation)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        flat = x.flatten(1)
        if context is not None or self.context_shape is not None:
            given = require_context("mlp", context, self.context_shape)
            flat = torch.cat([flat, given.flatten(1)], dim=1)
        return super().forward(flat).reshape(x.shape[0], *self.out_shape)  # type: ignore[no-any-return, no-untyped-call]
