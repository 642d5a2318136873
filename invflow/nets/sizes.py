"""Sizes of nets: fields for widths and kernels, positions, and inputs with a context."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import torch
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor, nn

from ..errors import ShapeError
from ..state import TensorShape, flat_size

Widths: TypeAlias = Annotated[list[PositiveInt], Field(max_length=100)]
Probability: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise ValueError("input should be odd, so that the padding keeps height and width")
    return size


OddInt: TypeAlias = Annotated[int, Field(gt=0, json_schema_extra={"not": {"multipleOf": 2}}), AfterValidator(_odd)]


def shape_with_context(who: str, shape: TensorShape, context_shape: TensorShape | None) -> TensorShape:
    """The shape of an input with its context as further channels: see `with_context`.

    Raises:
        ShapeError: the context is neither a vector nor of the input's positions.
    """
    if context_shape is None:
        return shape
    channels, *positions = shape
    if not positions:
        return (channels + flat_size(context_shape),)
    if len(context_shape) != 1 and list(context_shape[1:]) != positions:
        at = ", ".join(map(str, positions))
        raise ShapeError(f"{who} expects a context (features,) or (channels, {at}), got {context_shape}")
    return channels + context_shape[0], *positions


def with_context(who: str, x: Tensor, context: Tensor | None, shape: TensorShape | None) -> Tensor:
    """An input with its context, expected to have this shape, as further channels.

    The context of vectors is flattened; a vector as the context of channels at positions is spread over all of them.
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
        context = context.reshape(*context.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return torch.cat([x, context], dim=1)


def set_to_zero(module: nn.Module) -> None:
    """Sets all weights of a module to 0."""
    for weight in module.parameters():
        nn.init.zeros_(weight)
