r"""Order-free conditioners: networks whose every sum is one of integers that a float32 holds.

**Theorem.** Let a layer's inputs be integers of magnitude at most L, its weights and its bias in channel c integers w
and b times 2^-e, and ``L * sum|w| + |b| <= 2^24``. Then whatever sums up the products, in whatever order, with fused
multiplications or without, in float32, in float64 or in integers, returns the same bits.
Proof. Each product, and each sum of some of the products and b, is an integer of magnitude at most
``L * sum|w| + |b| <= 2^24`` times 2^-e. float32 holds all of these, so no multiplication and no addition rounds, and
there is one exact result. (2^-e is far from under- and overflow.)

What happens between the sums happens to each number alone: rounding to integers, clamping, max with 0, multiplication
by a power of two, looking up in a table. All of these are exact in float32 and in float64. So the whole network is one
function of its input, whatever the batch, the layout, the threads or the library.

The theorem is about sums of products. Winograd's and FFT convolutions compute other sums, with fractions, and round;
TF32 and bfloat16 kernels round the factors. `exact_kernels` switches them off: NNPACK, which PyTorch uses on the CPU
for batches of 16 and more if oneDNN is off, multiplies by FFT and Winograd, cuDNN by Winograd. And before a kind of
device first computes, it is checked on sums that come out wrong in any of these ways (`backend.trust`).

L and the bound are checked in integers whenever weights are made, loaded or converted (`FixedPoint.prove`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._torch import Constants
from ..errors import NumericsError
from .backend import exact_kernels, trust
from .grid import round_through, traced

SUM_BITS = 24
"""Sums stay within 2^24, which float32 holds, so the network is the same function in float32 and float64."""

MOST_SHIFT = 64
"""Weights are integers times 2^-e with |e| up to this: products with 2^24 stay within float32's 2^-126 to 2^127."""

_SLOPE_OVER = 64
"""The slope of a table is taken over its range divided by this, to either side."""

DTYPES = (torch.float32, torch.float64)


class Quantize(Constants):
    """Real numbers to integers: ``clamp(round(scale * x), -limit, limit)``.

    Args:
        scale: powers of two, one number or one per channel.
        limit: the largest magnitude.
    """

    constants = ("scale",)
    scale: Tensor

    def __init__(self, scale: Tensor, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.scale = scale
        self.prove()

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in DTYPES:
            raise NumericsError(f"exact numerics expect float32 or float64, got {x.dtype}")
        return round_through(_clamp(x * self.scale, -self.limit, self.limit))  # in this order, because inf - inf is NaN

    def prove(self) -> None:
        """Raises NumericsError if a scale is not a power of two, because multiplying by it may round."""
        if not _computes(self.scale):
            return
        mantissa, exponent = torch.frexp(self.scale.double())
        if not bool(((mantissa == 0.5) & (exponent.abs() <= MOST_SHIFT)).all()):
            raise NumericsError(f"an order-free net expects scales that are powers of two, got {self.scale.flatten()}")


class Requantize(nn.Module):
    """Sums to the integers of the next layer: ``clamp(round(s), low, limit)``; ReLU if low is 0.

    Args:
        low: the smallest result.
        limit: the largest one; None for no upper bound, as at the end of a net.
    """

    def __init__(self, low: int | None, limit: int | None) -> None:
        super().__init__()
        self.low = low
        self.limit = limit

    def forward(self, s: Tensor) -> Tensor:
        return _clamp(round_through(s), self.low, self.limit)


class Table(Constants):
    """Any function of one number: ``values[clamp(round(s), -limit, limit) + limit]``.

    Args:
        values: ``2 * limit + 1`` integers.
        largest: the largest magnitude that a value may have.
    """

    constants = ("values",)
    values: Tensor

    def __init__(self, values: Tensor, largest: int) -> None:
        super().__init__()
        self.limit = len(values) // 2
        self.largest = largest
        self.values = values
        self.prove()

    def forward(self, s: Tensor) -> Tensor:
        place = _clamp(round_through(s), -self.limit, self.limit) + self.limit
        number = place.detach()
        index = number.nan_to_num(0.0).long()
        found = torch.where(number.isnan(), number, self.values[index])  # NaN stays NaN, as in all other layers
        if not torch.is_grad_enabled():
            return found
        # For gradients, the slope over a wider range: between neighbours it would be that of rounding.
        far = max(1, self.limit // _SLOPE_OVER)
        after, before = (index + far).clamp(max=2 * self.limit), (index - far).clamp(min=0)
        slope = (self.values[after] - self.values[before]) / (after - before)
        return found + slope * (place - place.detach())

    def prove(self) -> None:
        """Raises NumericsError if a value is not an integer, or is too large."""
        _require_integers("a table of an order-free net", self.values, self.largest)


Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: dict[int, Callable[..., Tensor]] = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}
"""By the number of dimensions of the weight."""


class FixedPoint(Constants):
    """A convolution or a linear map of integers: weights and bias are integers times a power of two per output channel.

    Attributes:
        weight: as the float layer's.
        bias: likewise, ``(outputs,)``.
        shift: e of each output channel: ``weight * 2^e`` and ``bias * 2^e`` are integers.

    Args:
        weight: see above.
        bias: see above.
        shift: see above.
        limit: the largest magnitude of an input.
        like: the layer whose stride, padding, dilation and groups are used.
    """

    constants = ("weight", "bias", "shift")
    weight: Tensor
    bias: Tensor
    shift: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, shift: Tensor, limit: int, like: Convolution | nn.Linear) -> None:
        super().__init__()
        self.limit = limit
        conv = like if isinstance(like, CONVOLUTIONS) else None
        self.geometry: Any = None if conv is None else (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.weight, self.bias, self.shift = weight, bias, shift
        self.prove()

    def forward(self, q: Tensor) -> Tensor:
        trust(q)
        with exact_kernels(q):
            if self.geometry is None:
                return functional.linear(q, self.weight, self.bias)
            return _CONVOLVE[self.weight.dim()](q, self.weight, self.bias, *self.geometry)

    def prove(self) -> None:
        """Proves the theorem's premise, in integers; raises NumericsError if it does not hold."""
        if not _computes(self.weight) or self.bias.is_meta or self.shift.is_meta:
            return
        who = "an order-free layer"
        if self.shift.is_floating_point() or bool(((self.shift < -MOST_SHIFT) | (self.shift > MOST_SHIFT)).any()):
            raise NumericsError(f"{who} expects whole shifts up to {MOST_SHIFT}, got {self.shift}")
        unit = powers_of_two(self.shift)
        weight = self.weight.double().flatten(1) * unit[:, None]
        bias = self.bias.double() * unit
        _require_integers(who, weight, 2**SUM_BITS)
        _require_integers(who, bias, 2**SUM_BITS)
        norm = weight.long().abs().sum(1)  # fan-in times 2^24: far from 2^63
        worst = int((self.limit * norm.double() + bias.abs()).max())  # whole numbers, exact up to 2^53
        if worst > 2**SUM_BITS:
            raise NumericsError(
                f"{who} expects sums of at most 2^{SUM_BITS}, which float32 holds; these weights with inputs up to "
                f"{self.limit} can reach {worst}"
            )


def powers_of_two(exponents: Tensor) -> Tensor:
    """``2^e`` of integers, exact in float64, which torch.exp2 and torch.ldexp do not promise."""
    return ((exponents.long() + 1023) << 52).view(torch.float64)  # the bits of 2^e


def _computes(tensor: Tensor) -> bool:
    """Whether a net with this tensor computes numbers: `Quantize` refuses all other dtypes."""
    return tensor.dtype in DTYPES and not tensor.is_meta


def _clamp(x: Tensor, low: int | None, high: int | None) -> Tensor:
    """Clamps, in place if no gradient is recorded: nobody but the caller may hold x."""
    if low is None and high is None:
        return x
    return x.clamp(low, high) if torch.is_grad_enabled() or traced() else x.clamp_(low, high)


def _require_integers(who: str, values: Tensor, largest: int) -> None:
    if not _computes(values):
        return
    fine = (values.frac() == 0) & (values.abs() <= largest)  # NaN and infinity are neither
    if not bool(fine.all()):
        raise NumericsError(f"{who} expects integers up to {largest}, got {values[~fine][0].item()}")
