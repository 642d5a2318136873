"""Conditioners whose Lipschitz constant is at most 1: the nets of `Residual`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from ..context import Context, ContextShape
from ..errors import InvflowError, ShapeError
from ..registry import register_net
from ..state import Shape, flat_size, require_positions, require_tensor, shape_of
from .activations import ACTIVATIONS
from .sizes import OddInt, Widths, set_to_zero, shape_with_context, with_context
from .spectral import SpectralConv, SpectralLinear

Contraction: TypeAlias = Literal[
    "relu", "leaky_relu", "elu", "gelu", "silu", "lipswish", "softplus", "tanh", "sigmoid", "maxmin"
]

MapBound: TypeAlias = Annotated[float, Field(gt=0, le=1)]

GELU_SLOPE = 1.129
"""The largest slope of GELU, at sqrt(2): Phi(sqrt 2) + sqrt 2 phi(sqrt 2) = 1.12890."""

SILU_SLOPE = 1.1
"""The largest slope of x sigmoid(x), at 2.3994: 1.09984."""


class Gelu(nn.Module):
    """GELU divided by its largest slope."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x) / GELU_SLOPE


class Silu(nn.Module):
    """``x sigmoid(x)`` divided by its largest slope."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x) / SILU_SLOPE


class LipSwish(nn.Module):
    """``x sigmoid(b x) / 1.1`` with a learned ``b > 0``; its slope is below 1 for every b, and smooth.

    Reference: Chen, Behrmann, Duvenaud, Jacobsen: Residual Flows for Invertible Generative Modeling, 2019,
    https://arxiv.org/abs/1906.02735
    """

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * functional.softplus(self.beta)) / SILU_SLOPE


class MaxMin(nn.Module):
    """Sorts pairs of channels into the larger and the smaller number: slope 1, and the gradient keeps its norm.

    If the number of channels is odd, the last one stays unchanged.

    Reference: Anil, Lucas, Grosse: Sorting out Lipschitz function approximation, 2018, https://arxiv.org/abs/1811.05381
    """

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        a, b, rest = torch.split_with_sizes(x, [half, half, x.shape[1] - 2 * half], dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b), rest], dim=1)


_CONTRACTIONS: dict[str, type[nn.Module]] = {
    **{str(name): part.module for name, part in ACTIVATIONS.items()},
    "gelu": Gelu,
    "silu": Silu,
    "lipswish": LipSwish,
    "maxmin": MaxMin,
}


class LipschitzNet(nn.Module):
    """Normalised maps with activations between them, and with one before the first if ``before``."""

    def __init__(self, maps: Sequence[SpectralLinear | SpectralConv], activation: Contraction, before: bool) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)
        self.activations = nn.ModuleList(
            _CONTRACTIONS[activation]() if before or position else nn.Identity() for position in range(len(maps))
        )

    def lipschitz_bound(self) -> float:
        """The product of the bounds of the maps' norms: no activation has a slope above 1."""
        return math.prod(one.bound for one in self.maps)  # type: ignore[misc]

    def prepared(self) -> Callable[..., Tensor]:
        """The net as a function of ``(x, context)``, with the normalised weights computed once."""
        return functools.partial(self._evaluate, [one.normalized_weight() for one in self.maps])  # type: ignore[operator]

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        return self.prepared()(x, context)

    def _evaluate(self, weights: list[Tensor], x: Tensor, context: Context = None) -> Tensor:
        """Applies the maps to x; subclasses concatenate the context first."""
        for one, activation, weight in zip(self.maps, self.activations, weights, strict=True):
            x = one.linear(activation(x), weight, one.bias)  # type: ignore[operator]
        return x


@register_net("lipschitz_conv")
class LipschitzConv(LipschitzNet):
    """Convolutions from ``in_shape`` to ``out_shape`` whose Lipschitz constant is at most 1.

    Use it in a `residual` layer on images.

    Each has zero padding that keeps the size, and is scaled down to the bound if its norm at this size and padding is
    above it.
    The default is i-ResNet's block: activation, 3x3, activation, 1x1, activation, 3x3. The context becomes further
    input channels; a vector is spread over all positions.

    Reference: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen: Invertible Residual Networks, 2018,
    https://arxiv.org/abs/1811.00995

    Args:
        in_shape: (channels, height, width) of the input, without the batch; or that of a sequence or a volume.
        out_shape: likewise for the output.
        context_shape: (features,), or (channels, ...) with the input's positions.
        hidden: the channels between the convolutions, in any number: only the net as a whole must contract.
        kernel_sizes: the side of each kernel, odd; by default 3 for the first and the last, 1 for the others.
        activation: the function before each convolution, with a slope of at most 1: gelu and silu are divided by their
            largest slope, lipswish is a silu with a learned steepness, maxmin sorts pairs of channels.
        input_activation: whether there is an activation before the first convolution.
        zero_last: whether the last convolution starts at zero, so that the net is 0 until it is trained.
        bound: the largest norm of each convolution. Below 1, the net's Lipschitz constant is at most its power.

    Examples:
        >>> LipschitzConv((2, 5, 5), (2, 5, 5))(torch.zeros(1, 2, 5, 5)).shape
        torch.Size([1, 2, 5, 5])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        context_shape: ContextShape = None,
        hidden: Widths = [32, 32],  # noqa: B006 -- a JSON default, never changed
        kernel_sizes: Annotated[list[OddInt], Field(min_length=1, max_length=101)] | None = None,
        activation: Contraction = "elu",
        input_activation: bool = True,
        zero_last: bool = False,
        bound: MapBound = 1.0,
    ) -> None:
        start, end = (require_positions("lipschitz_conv", shape) for shape in (in_shape, out_shape))
        if start[1:] != end[1:]:
            raise ShapeError(f"lipschitz_conv must map {in_shape} to {out_shape}, but keeps the positions")
        channels, *size = shape_with_context("lipschitz_conv", start, context_shape)
        pairs = [*itertools.pairwise([channels, *hidden, end[0]])]
        sides = kernel_sizes or [3, *[1] * (len(pairs) - 2), 3][: len(pairs)]
        if len(sides) != len(pairs):
            raise InvflowError(
                f"lipschitz_conv with {len(hidden)} hidden widths has {len(pairs)} convolutions; it expects as many "
                f"kernel_sizes, got {len(sides)}"
            )
        maps = [SpectralConv(*pair, side, tuple(size), bound=bound) for pair, side in zip(pairs, sides, strict=True)]
        super().__init__(maps, activation, input_activation)
        self.context_shape = context_shape
        if zero_last:
            set_to_zero(maps[-1])

    def _evaluate(self, weights: list[Tensor], x: Tensor, context: Context = None) -> Tensor:
        return super()._evaluate(weights, with_context("lipschitz_conv", x, context, self.context_shape))


@register_net("lipschitz_mlp")
class LipschitzMLP(LipschitzNet):
    """Linear layers on the flattened input, reshaped to ``out_shape``, whose Lipschitz constant is at most 1.

    Use it in a `residual` layer on vectors.

    Each is scaled down to the bound if its norm is above it. The context is flattened and concatenated to the input.

    Args:
        in_shape: the shape of the input, without the batch.
        out_shape: likewise for the output.
        context_shape: likewise for the context.
        hidden: the features between the layers.
        activation: the function between the layers, as in `LipschitzConv`.
        input_activation: whether there is an activation before the first layer.
        zero_last: whether the last layer starts at zero, so that the net is 0 until it is trained.
        bound: the largest norm of each layer. Below 1, the net's Lipschitz constant is at most its power.

    Examples:
        >>> LipschitzMLP((2, 3), (4,))(torch.zeros(5, 2, 3)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        context_shape: ContextShape = None,
        hidden: Widths = [64, 64],  # noqa: B006 -- a JSON default, never changed
        activation: Contraction = "lipswish",
        input_activation: bool = False,
        zero_last: bool = False,
        bound: MapBound = 1.0,
    ) -> None:
        start = (flat_size(require_tensor("lipschitz_mlp", in_shape)),)
        (features,) = shape_with_context("lipschitz_mlp", start, context_shape)
        widths = [features, *hidden, flat_size(require_tensor("lipschitz_mlp", out_shape))]
        maps = [SpectralLinear(*pair, bound) for pair in itertools.pairwise(widths)]
        super().__init__(maps, activation, input_activation)
        self.in_shape = in_shape
        self.out_shape = out_shape
        self.context_shape = context_shape
        if zero_last:
            set_to_zero(maps[-1])

    def _evaluate(self, weights: list[Tensor], x: Tensor, context: Context = None) -> Tensor:
        if shape_of(x) != self.in_shape:
            raise ShapeError(f"lipschitz_mlp expects the shape {self.in_shape}, got {shape_of(x)}")
        flat = with_context("lipschitz_mlp", x.flatten(1), context, self.context_shape)
        return super()._evaluate(weights, flat).reshape(x.shape[0], *self.out_shape)  # type: ignore[arg-type]
