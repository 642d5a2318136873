"""Kernels that compute plain sums of products, and a check that a device has them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._torch import float32_precisions, transforms_active
from ..errors import NumericsError

_CASES = ((3, 1, 1), (3, 8, 20), (5, 3, 16), (7, 8, 17), (1, 16, 33))
"""Kernel size, channels, batch: small kernels invite Winograd, large ones FFT, batches of 16 and more NNPACK."""
_SIDE = 12
_LARGEST_INPUT = 2**10 - 1


def exact_kernels(x: Tensor) -> contextlib.AbstractContextManager[object] | _WithoutNNPACK:
    """Inside, kernels that do not sum the products of what they are given are switched off."""
    if torch.compiler.is_compiling() or x.dtype != torch.float32:
        return contextlib.nullcontext()  # a graph's compiler chooses the kernels; float64 has none of these
    if x.device.type == "cpu":
        return _WithoutNNPACK()
    if x.device.type == "cuda":
        return _without_cudnn()
    return contextlib.nullcontext()


class _WithoutNNPACK:
    """``torch.backends.nnpack.flags(enabled=False)`` at a tenth of its time: this runs in every layer."""

    def __enter__(self) -> None:
        (self._before,) = torch.backends.nnpack.set_flags(False)  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        torch.backends.nnpack.set_flags(self._before)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _without_cudnn() -> Iterator[None]:
    """``torch.backends.cudnn.flags(enabled=False)``, which raises if older and newer settings of precision differ."""
    flags: Any = torch.backends.cudnn
    before, flags.enabled = flags.enabled, False
    try:
        yield
    finally:
        flags.enabled = before


def own_precision(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast: a norm or a state in bfloat16 has lost what the inverse needs. The meta device knows no autocast."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # to switch it off takes as long as a small layer
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def trust(x: Tensor) -> None:
    """Checks the device of x on sums whose results are known, once for each setting of precision.

    Raises:
        NumericsError: its sums are not exact.
    """
    if x.is_meta or torch.compiler.is_compiling() or transforms_active():
        return
    backend = "cuda" if x.device.type == "cuda" else "mkldnn"
    precisions = float32_precisions(backend)
    reason = _what_is_wrong(x.device.type, x.dtype, precisions, torch.backends.mkldnn.enabled)
    if reason is not None:
        convolution = "cudnn" if backend == "cuda" else backend
        raise NumericsError(
            f"exact numerics expect sums of integers below 2^24 to be exact on {x.device.type}, but {reason}, with "
            f"matmul.fp32_precision {precisions[0]!r} and conv.fp32_precision {precisions[1]!r}; switch off TF32 and "
            f'bfloat16 products: torch.backends.{backend}.matmul.fp32_precision = "ieee" and '
            f'torch.backends.{convolution}.conv.fp32_precision = "ieee"'
        )


@functools.cache
def _what_is_wrong(device: str, dtype: torch.dtype, precisions: tuple[str, str], onednn: bool) -> str | None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for side, channels, batch in _CASES:
            x = torch.randint(-_LARGEST_INPUT, _LARGEST_INPUT + 1, (batch, channels, _SIDE, _SIDE), generator=generator)
            largest = 2**24 // (_LARGEST_INPUT * channels * side**2)
            weight = torch.randint(-largest, largest + 1, (channels, channels, side, side), generator=generator)
            given, padding = x.to(device, dtype), side // 2
            with exact_kernels(given):
                found = functional.conv2d(given, weight.to(device, dtype), padding=padding)
            windows = functional.pad(x, (padding,) * 4).unfold(2, side, 1).unfold(3, side, 1)
            expected = torch.einsum("bcyxij,ocij->boyx", windows, weight)  # in integers
            if not torch.equal(found.cpu().double(), expected.double()):
                return f"a convolution with a kernel of {side} is not"
            width = min(x[0].numel(), weight[0].numel(), 1000)
            flat, matrix = x.flatten(1)[:, :width], weight.flatten(1)[:, :width]
            product = functional.linear(flat.to(device, dtype), matrix.to(device, dtype))
            if not torch.equal(product.cpu().double(), (flat @ matrix.T).double()):
                return "a matrix product is not"
    return None
