"""A learned vector for each class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..registry import register_net
from ..state import Shape, TensorShape, flat_size, require_tensor


@register_net("embedding")
class Embedding(nn.Module):
    """A learned vector for each class: ``net(x) = x @ W``, which is row c of W if x is one-hot of the class c.

    Use it as `context_net`, for classes.

    The vector is reshaped to ``out_shape``. Any other x gets the combination of the rows with its numbers. W starts as
    standard normal numbers, as that of `torch.nn.Embedding` does.

    Args:
        in_shape: (classes,), that of the input.
        out_shape: that of the output, without the batch.

    Raises:
        ShapeError: the input is no vector.

    Examples:
        >>> net = Embedding((10,), (3,))
        >>> torch.equal(net(torch.eye(10))[7], net.weight[7])
        True
    """

    def __init__(self, in_shape: Shape, out_shape: Shape) -> None:
        super().__init__()
        (classes,) = require_tensor("embedding", in_shape, 1)
        self.out_shape: TensorShape = require_tensor("embedding", out_shape)
        self.weight = nn.Parameter(torch.randn(classes, flat_size(out_shape)))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).reshape(len(x), *self.out_shape)
