"""Sizes of nets: fields for widths and kernels, positions, and inputs with a context."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import torch
from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor, nn

from ..context import Context, ContextShape, entries, entries_of_shape, shape_of_context
from ..errors import ShapeError
from ..state import TensorShape, flat_size

Widths: TypeAlias = Annotated[list[PositiveInt], Field(max_length=100)]
Probability: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


def _odd(size: int) -> int:
    if size % 2 == 0:
        raise ValueError("input should be odd, so that the padding keeps height and width")
    return size


OddInt: TypeAlias = Annotated[int, Field(gt=0, json_schema_extra={"not": {"multipleOf": 2}}), AfterValidator(_odd)]


def shape_with_context(who: str, shape: TensorShape, context_shape: ContextShape) -> TensorShape:
    """The shape of an input with its context as further channels: see `with_context`.

    Raises:
        ShapeError: an entry of the context is neither a vector nor of positions that fit the input's.
    """
    channels, *positions = shape
    for extents in entries_of_shape(context_shape):
        if not positions:
            channels += flat_size(extents)
            continue
        sizes = list(zip(extents[1:], positions, strict=False))
        if len(extents) > 1 and (len(extents) != len(shape) or any(a % b and b % a for a, b in sizes)):
            at = ", ".join(map(str, positions))
            raise ShapeError(
                f"{who} expects a context (features,) or (channels, {at}), or at positions of which each is a "
                f"multiple or a divisor of these, got {extents}"
            )
        channels += extents[0]
    return channels, *positions


def averages_context(shape: TensorShape, context_shape: ContextShape) -> bool:
    """Whether `with_context` has to average an entry of the context over positions."""
    several = entries_of_shape(context_shape)
    finer = (a > b for extents in several for a, b in zip(extents[1:], shape[1:], strict=False))
    return len(shape) > 1 and any(finer)


def with_context(who: str, x: Tensor, context: Context, shape: ContextShape) -> Tensor:
    """An input with its context, expected to have this shape, as further channels; several entries by their names.

    The context of vectors is flattened; a vector as the context of channels at positions is spread over all of them. A
    context at other positions is averaged over, or repeated at, those that lie at one of the input's.
    """
    require_built_for(who, context, shape)
    if context is None:
        return x
    return torch.cat([x, *(_as_channels(entry, x.shape) for entry in entries(context))], dim=1)


def _as_channels(entry: Tensor, size: torch.Size) -> Tensor:
    if len(size) == 2:
        return entry.flatten(1)
    if entry.dim() == 2:
        return entry.reshape(*entry.shape, *(1,) * (len(size) - 2)).expand(-1, -1, *size[2:])
    for dim in range(2, len(size)):
        finer, coarser = entry.shape[dim] // size[dim], size[dim] // entry.shape[dim]
        if finer > 1:
            entry = entry.unflatten(dim, (size[dim], finer)).mean(dim + 1)  # type: ignore[no-untyped-call]
        elif coarser > 1:
            entry = entry.repeat_interleave(coarser, dim)
    return entry


def require_built_for(who: str, context: Context, shape: ContextShape) -> None:
    """Raises ShapeError if a context has not the shape that a net was built for; None for none."""
    if context is None and shape is None:
        return
    if shape is None:
        raise ShapeError(f"{who} was built without a context but got one; give it its context_shape")
    came = shape_of_context(context)
    if came != (shape if isinstance(shape, dict) else tuple(shape)):
        raise ShapeError(f"{who} expects a context of shape {shape} besides the batch, got {came}")


def set_to_zero(module: nn.Module) -> None:
    """Sets all weights of a module to 0."""
    for weight in module.parameters():
        nn.init.zeros_(weight)
