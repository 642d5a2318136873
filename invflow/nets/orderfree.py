"""Makes a float conditioner order-free: folds batch norm, converts weights and activations to fixed point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from .._torch import BatchNorm, Dropout
from ..errors import NumericsError
from ..numerics.integer import (
    CONVOLUTIONS,
    MOST_SHIFT,
    SUM_BITS,
    Convolution,
    FixedPoint,
    Quantize,
    Requantize,
    Table,
    powers_of_two,
)
from ..numerics.modes import Exact
from .stack import Stack

ASSUMED_RANGE = 8.0
"""The assumed magnitude of inputs and activations for which no data were seen."""

_TABULATED = (nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid)


Ranges: TypeAlias = dict[str, float]
"""The largest magnitudes that data reach in a net: "state" and "context" of its input, "before 0" and "after 0" its
first activation, and so on."""


@dataclass
class _Block:
    """A linear layer with the norm and the activation that follow it."""

    linear: Convolution | nn.Linear
    norm: BatchNorm | None = None
    activation: nn.Module | None = None


def is_order_free(net: nn.Module) -> bool:
    """Whether a net is order-free already."""
    return isinstance(net, nn.Sequential) and len(net) > 0 and isinstance(net[0], Quantize)


def obstacle(net: nn.Module) -> str | None:
    """Why a net cannot be made order-free; None if it can, or is already."""
    try:
        if not is_order_free(net):
            _blocks(net)
    except NumericsError as error:
        return str(error)
    return None


def make_order_free(net: nn.Module, numerics: Exact, ranges: Ranges | None = None) -> None:
    """Replaces the layers of a net, in place, by integer layers that compute the same function up to their resolution.

    The result of the net then counts steps of the grid: ``round(2^frac_bits t)``.

    Args:
        net: a `conv` or an `mlp`, or an `nn.Sequential` of such layers.
        numerics: the resolution of state and activations.
        ranges: the magnitudes that data reach in the net; `ASSUMED_RANGE` for any that is missing.

    Raises:
        NumericsError: the net holds a layer that is not order-free.
    """
    if is_order_free(net):
        return
    blocks = _blocks(net)
    reached = ranges or {}
    limit = 2**numerics.activation_bits - 1
    scale = _input_scale(blocks[0].linear, context_features(net), reached, limit)
    parts: list[nn.Module] = [Quantize(scale, limit)]
    unit = scale.double()  # integer steps per real unit of the input, for each input channel
    for position, block in enumerate(blocks):
        is_last = position == len(blocks) - 1
        out = 2.0**numerics.frac_bits if is_last else _scale(reached.get(f"after {position}"), limit)
        if isinstance(block.activation, _TABULATED):
            fine = _scale(reached.get(f"before {position}"), limit)
            largest = 2**SUM_BITS if is_last else limit
            table = _table(block.activation, fine, out, limit, largest, block.linear.weight)
            parts += [_fixed_point(block, unit, fine, limit), table]
        else:
            low = 0 if isinstance(block.activation, nn.ReLU) else None if is_last else -limit
            parts += [_fixed_point(block, unit, out, limit), Requantize(low, None if is_last else limit)]
        unit = torch.tensor(out, dtype=torch.float64)
    stack = cast(nn.Sequential, net)
    del stack[:]
    stack.extend(parts).train(net.training)


def activations(net: nn.Module) -> list[nn.Module | None]:
    """The activation of each block of a net, in order."""
    return [block.activation for block in _blocks(net)]


def context_features(net: nn.Module) -> int:
    """The number of channels at the end of the input that belong to the context."""
    return net.context_features if isinstance(net, Stack) else 0


def _blocks(net: nn.Module) -> list[_Block]:
    """The layers of a net, in blocks. Raises NumericsError if one of them is not order-free."""
    if not (type(net) is nn.Sequential or isinstance(net, Stack)):
        raise NumericsError(f"its net, a {type(net).__name__}, is not a plain stack of convolutions or linear layers")
    if isinstance(net, Stack) and net.obstacle is not None:
        raise NumericsError(net.obstacle)
    blocks: list[_Block] = []
    for part in net:
        name = type(part).__name__
        last = blocks[-1] if blocks else None
        if type(part) is nn.Linear or (type(part) in CONVOLUTIONS and part.padding_mode == "zeros"):
            blocks.append(_Block(cast(Convolution | nn.Linear, part)))
        elif isinstance(part, nn.Identity | Dropout):
            pass  # the identity in eval mode
        elif last is None or last.activation is not None:
            raise NumericsError(f"its net's {name} does not follow a convolution or a linear layer")
        elif isinstance(part, BatchNorm) and part.running_mean is not None and last.norm is None:
            last.norm = part
        elif isinstance(part, (nn.ReLU, *_TABULATED)):
            last.activation = part
        else:
            raise NumericsError(f"its net's {name} is not known to be order-free; use relu or another known activation")
    if not blocks:
        raise NumericsError("its net has no convolution or linear layer")
    if any(block.activation is None for block in blocks[:-1]):
        raise NumericsError("its net has two linear layers without an activation between")
    return blocks


def _scale(reached: float | None, limit: int) -> float:
    """The largest power of two that maps a range to integers within the limit."""
    if reached is None or not 0 < reached < math.inf:
        reached = ASSUMED_RANGE
    exponent = math.floor(math.log2(limit / reached))
    return 2.0 ** max(-MOST_SHIFT, min(MOST_SHIFT, exponent))


def _input_scale(linear: Convolution | nn.Linear, context: int, reached: Ranges, limit: int) -> Tensor:
    """The scale of the input, a power of two; one for each channel if a context comes with the state."""
    weight, state = linear.weight, _scale(reached.get("state"), limit)
    if not context:
        return weight.new_tensor(state)
    channels = weight.shape[1] * (linear.groups if isinstance(linear, CONVOLUTIONS) else 1)
    scales = weight.new_tensor([state] * (channels - context) + [_scale(reached.get("context"), limit)] * context)
    return scales.reshape(-1, *(1,) * (weight.dim() - 2))


def _fixed_point(block: _Block, unit: Tensor, out: float, limit: int) -> FixedPoint:
    """The block's linear map with batch norm folded in, from integers to multiples of powers of two.

    Args:
        block: the block in real numbers.
        unit: integer steps per real unit of the input, for each input channel or for all.
        out: likewise for the output.
        limit: the largest input.
    """
    linear = block.linear
    weight = linear.weight.detach().double()
    bias = weight.new_zeros(weight.shape[0]) if linear.bias is None else linear.bias.detach().double()
    if block.norm is not None:
        weight, bias = _folded(weight, bias, block.norm)
    per_channel = unit.flatten().to(weight.device)
    if per_channel.numel() > 1 and isinstance(linear, CONVOLUTIONS) and linear.groups > 1:
        raise NumericsError("its net's first convolution has groups, so a context cannot have a scale of its own")
    spread = per_channel.reshape(1, -1, *(1,) * (weight.dim() - 2))
    weight, bias = weight / spread * out, bias * out
    shift = _shifts(weight, bias, limit)
    power = torch.ones_like(bias) if shift.is_meta else powers_of_two(shift)
    column = power.reshape(-1, *(1,) * (weight.dim() - 1))
    weight, bias = (weight * column).round() / column, (bias * power).round() / power
    dtype = linear.weight.dtype
    return FixedPoint(weight.to(dtype), bias.to(dtype), shift, limit, linear)


def _folded(weight: Tensor, bias: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """The linear map followed by batch norm in eval mode, as one linear map."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    offset = bias.new_zeros(()) if norm.bias is None else norm.bias.detach().double()
    column = factor.reshape(-1, *(1,) * (weight.dim() - 1))
    return weight * column, (bias - norm.running_mean.double()) * factor + offset


def _shifts(weight: Tensor, bias: Tensor, limit: int) -> Tensor:
    """For each output channel, the largest e for which its weights times 2^e, rounded, satisfy the bound."""
    if weight.is_meta:
        return torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
    rows = weight.flatten(1)
    worst = limit * rows.abs().sum(1) + bias.abs()
    if not bool(worst.isfinite().all()):
        raise NumericsError("its net's weights are not finite")
    shift = (SUM_BITS - worst.clamp(min=2.0**-MOST_SHIFT).log2()).floor().clamp(-MOST_SHIFT, MOST_SHIFT).long()
    for _ in range(2 * MOST_SHIFT):  # rounding up may have exceeded the bound
        power = powers_of_two(shift)
        norm = (rows * power[:, None]).round().long().abs().sum(1)
        reached = limit * norm + (bias * power).round().long().abs()
        too_large = (reached > 2**SUM_BITS) & (shift > -MOST_SHIFT)
        if not bool(too_large.any()):
            break
        shift = shift - too_large.long()
    return shift


def _table(activation: nn.Module, fine: float, out: float, limit: int, largest: int, like: Tensor) -> Table:
    """The table of an activation, from integers to integers."""
    places = torch.arange(-limit, limit + 1, dtype=torch.float64, device=like.device)
    found = (activation(places / fine) * out).round().clamp(-largest, largest) + 0.0
    return Table(found.detach().to(like.dtype), largest)
