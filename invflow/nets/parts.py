"""What the conditioners and heads are made of."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, PositiveInt
from torch import Tensor, nn

from ..errors import InvflowError, ShapeError

Activation: TypeAlias = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid"]
Norm: TypeAlias = Literal["batch"]
Widths: TypeAlias = Annotated[list[PositiveInt], Field(max_length=100)]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
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


def make_activation(name: Activation) -> nn.Module:
    """The elementwise function of that name."""
    return _ACTIVATIONS[name]()


def conv_stack(
    widths: list[int], kernel_size: int, activation: Activation, norm: Norm | None, final_activation: bool
) -> list[nn.Module]:
    """Convolutions from ``widths[0]`` to ``widths[-1]`` channels that keep height and width.

    Each is followed by norm and activation, the last one only with ``final_activation``.
    """
    layer = functools.partial(nn.Conv2d, kernel_size=kernel_size, padding=kernel_size // 2)
    return _stack(widths, layer, nn.BatchNorm2d if norm == "batch" else None, activation, final_activation)


def linear_stack(
    widths: list[int], activation: Activation, norm: Norm | None, final_activation: bool
) -> list[nn.Module]:
    """Linear maps from ``widths[0]`` to ``widths[-1]`` features, otherwise like `conv_stack`."""
    return _stack(widths, nn.Linear, nn.BatchNorm1d if norm == "batch" else None, activation, final_activation)


def _stack(
    widths: list[int],
    make_layer: Callable[[int, int], nn.Module],
    make_norm: Callable[[int], nn.Module] | None,
    activation: Activation,
    final_activation: bool,
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for position, (narrow, wide) in enumerate(itertools.pairwise(widths), start=1):
        layers.append(make_layer(narrow, wide))
        if position < len(widths) - 1 or final_activation:
            layers += [] if make_norm is None else [make_norm(wide)]
            layers.append(make_activation(activation))
    return layers


def start_at_zero(who: str, last: nn.Module, final_activation: bool) -> None:
    """Sets weights and bias of a net's last layer to zero. Raises InvflowError if an activation follows it."""
    if final_activation:
        raise InvflowError(
            f"{who} with zero_last expects final_activation false: before an activation, zeros may never learn"
        )
    for weight in last.parameters():
        nn.init.zeros_(weight)


def require_context(who: str, context: Tensor | None, shape: Any) -> Tensor:
    """The context, checked against the shape that the net was built for."""
    if shape is None:
        raise ShapeError(f"{who} was built without a context but got one; give it its context_shape")
    if context is None or tuple(context.shape[1:]) != tuple(shape):
        came = None if context is None else tuple(context.shape[1:])
        raise ShapeError(f"{who} expects a context of shape {tuple(shape)} besides the batch, got {came}")
    return context
