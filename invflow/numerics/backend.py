"""Which kernels compute: only such as sum products, and none that round the factors."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor
from torch.nn import functional

from .._torch import transforms_active
from ..errors import NumericsError

_CASES = ((3, 1, 1), (3, 8, 20), (5, 3, 16), (7, 8, 17), (1, 16, 33))
"""Kernel size, channels, batch: small kernels invite Winograd, large ones FFT, batches of 16 and more NNPACK."""
_SIDE = 12
_LARGEST_INPUT = 2**10 - 1


def exact_kernels(x: Tensor) -> contextlib.AbstractContextManager[object] | _WithoutNNPACK:
    """Keeps off, while it lasts, the kernels that do not sum products of what they are given."""
    if torch.compiler.is_compiling() or x.dtype != torch.float32:
        return contextlib.nullcontext()  # what a graph will call is up to its compiler; float64 has no such kernels
    if x.device.type == "cpu":
        return _WithoutNNPACK()
    if x.device.type == "cuda":
        return torch.backends.cudnn.flags(enabled=False, allow_tf32=False)
    return contextlib.nullcontext()


class _WithoutNNPACK:
    """``torch.backends.nnpack.flags(enabled=False)`` at a tenth of its time: this runs in every layer."""

    def __enter__(self) -> None:
        (self._before,) = torch.backends.nnpack.set_flags(False)  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        torch.backends.nnpack.set_flags(self._before)  # type: ignore[no-untyped-call]


def trust(x: Tensor) -> None:
    """Has the device of x solve sums whose result is known, once for each of the precisions that can be asked for.

    Raises:
        NumericsError: it does not solve them exactly.
    """
    if x.is_meta or torch.compiler.is_compiling() or transforms_active():
        return
    reason = _what_is_wrong(x.device.type, x.dtype, torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled)
    if reason is not None:
        raise NumericsError(
            f"exact numerics expect sums of integers below 2^24 to be exact on {x.device.type}, but {reason}; switch "
            'off TF32 and bfloat16 products: torch.set_float32_matmul_precision("highest")'
        )


@functools.cache
def _what_is_wrong(device: str, dtype: torch.dtype, precision: str, onednn: bool) -> str | None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for side, channels, batch in _CASES:
            x = torch.randint(-_LARGEST_INPUT, _LARGEST_INPUT + 1, (batch, channels, _SIDE, _SIDE), generator=generator)
            largest = 2**24 // (_LARGEST_INPUT * channels * side**2)
            weight = torch.randint(-largest, largest + 1, (channels, channels, side, side), generator=generator)
            found = _convolved(x.to(device, dtype), weight.to(device, dtype), side)
            if not torch.equal(found.cpu().double(), _summed(x, weight, side)):
                return f"a convolution with a kernel of {side} is not"
            flat, matrix = x.flatten(1)[:, :1000], weight.flatten(1)[:, :1000]
            width = min(flat.shape[1], matrix.shape[1])
            flat, matrix = flat[:, :width], matrix[:, :width]
            product = functional.linear(flat.to(device, dtype), matrix.to(device, dtype))
            if not torch.equal(product.cpu().double(), (flat[:, None] * matrix[None]).sum(2).double()):
                return "a matrix product is not"
    return None


def _convolved(x: Tensor, weight: Tensor, side: int) -> Tensor:
    with exact_kernels(x):
        return functional.conv2d(x, weight, padding=side // 2)


def _summed(x: Tensor, weight: Tensor, side: int) -> Tensor:
    """The convolution in integers, term by term."""
    padded = functional.pad(x, (side // 2,) * 4)
    total = torch.zeros((x.shape[0], weight.shape[0], _SIDE, _SIDE), dtype=torch.int64)
    for i in range(side):
        for j in range(side):
            window = padded[:, :, i : i + _SIDE, j : j + _SIDE]
            total += torch.einsum("bcij,oc->boij", window, weight[:, :, i, j])
    return total.double()
