"""Building blocks of conditioners and heads."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor, nn

from ..errors import InvflowError, ShapeError
from ..state import Shape, TensorShape, require_tensor

Activation: TypeAlias = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid"]
Norm: TypeAlias = Literal["batch"]
Widths: TypeAlias = Annotated[list[PositiveInt], Field(max_length=100)]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise ValueError("input should be odd, so that the padding keeps height and width")
    return size


OddInt: TypeAlias = Annotated[int, Field(gt=0, json_schema_extra={"not": {"multipleOf": 2}}), AfterValidator(_odd)]


def make_layers(
    widths: list[int], kernel_size: int | None, activation: Activation, norm: Norm | None, final_activation: bool
) -> list[nn.Module]:
    """Layers from ``widths[0]`` to ``widths[-1]`` channels: linear ones, or convolutions that keep height and width.

    Each is followed by norm and activation, the last one only with ``final_activation``.

    Args:
        widths: the channels before the first layer and after each layer.
        kernel_size: the side of every kernel, odd; None for linear layers.
        activation: the name of the activation.
        norm: "batch" for batch normalisation before each activation.
        final_activation: whether norm and activation follow the last layer too.
    """
    layers: list[nn.Module] = []
    for position, (before, after) in enumerate(itertools.pairwise(widths), start=1):
        if kernel_size is None:
            layers.append(nn.Linear(before, after))
        else:
            layers.append(nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2))
        if position < len(widths) - 1 or final_activation:
            if norm == "batch":
                layers.append(nn.BatchNorm1d(after) if kernel_size is None else nn.BatchNorm2d(after))
            layers.append(ACTIVATIONS[activation]())
    return layers


def start_at_zero(who: str, last: nn.Module, final_activation: bool = False) -> None:
    """Sets the weights and the bias of a net's last layer to 0. Raises InvflowError if an activation follows it."""
    if final_activation:
        raise InvflowError(
            f"{who} with zero_last expects final_activation false: before an activation, zeros may get no gradient"
        )
    for weight in last.parameters():
        nn.init.zeros_(weight)


def image_sizes(
    who: str, in_shape: Shape, out_shape: Shape, context_shape: TensorShape | None
) -> tuple[tuple[int, int], int, int, int]:
    """``(height, width)`` of images, which a net keeps, and the channels of its input, its context and its output."""
    channels, height, width = require_tensor(who, in_shape, dims=3)
    out_channels, *out_size = require_tensor(who, out_shape, dims=3)
    if out_size != [height, width]:
        raise ShapeError(f"{who} expects to keep height and width, got {in_shape} in and {out_shape} out")
    if context_shape is None:
        return (height, width), channels, 0, out_channels
    if len(context_shape) != 1 and tuple(context_shape[1:]) != (height, width):
        raise ShapeError(f"{who} expects a context (features,) or (channels, {height}, {width}), got {context_shape}")
    return (height, width), channels, context_shape[0], out_channels


def with_context(who: str, x: Tensor, context: Tensor | None, shape: TensorShape | None) -> Tensor:
    """Vectors or images with their context, expected to have this shape, as further channels.

    The context of vectors is flattened; a vector as the context of images is spread over all positions.
    """
    if context is None and shape is None:
        return x
    if shape is None:
        raise ShapeError(f"{who} was built without a context but got one; give it its context_shape")
    came = None if context is None else tuple(context.shape[1:])
    if context is None or came != tuple(shape):
        raise ShapeError(f"{who} expects a context of shape {tuple(shape)} besides the batch, got {came}")
    if x.dim() == 2:
        context = context.flatten(1)
    elif context.dim() == 2:
        context = context[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x, context], dim=1)
