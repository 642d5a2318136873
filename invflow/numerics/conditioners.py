"""Conditioners whose result must be bit-equal in both directions."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import BatchNorm, Dropout, SpectralNorm, never_compiled
from ..context import Context, each_entry
from ..errors import NumericsError

_SAME_BATCH: ContextVar[bool] = ContextVar("same_batch", default=False)


@contextlib.contextmanager
def same_batch() -> Iterator[None]:
    """Inside, an inverse in train mode is trusted to get exactly the batch that the forward saw.

    Batch statistics are then the same in both directions. Outside, `grid` numerics refuse such an inverse.
    """
    token = _SAME_BATCH.set(True)
    try:
        yield
    finally:
        _SAME_BATCH.reset(token)


def evaluate(net: nn.Module, a: Tensor, context: Context, *, in_float64: bool, hide_sign: bool) -> Tensor:
    """``net(a)``, or ``net(a, context)``, without autocast, which in one direction alone would change the function.

    Args:
        net: the conditioner.
        a: its input.
        context: passed on if there is one.
        in_float64: whether weights and inputs are converted first.
        hide_sign: whether -0.0 is replaced by 0.0 first: convolutions and activations do not distinguish them, but
            another net may divide by a.
    """
    if not a.is_meta and torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return evaluate(net, a, context, in_float64=in_float64, hide_sign=hide_sign)
    if hide_sign:
        a = a + 0.0
    given: tuple[Any, ...] = (a,) if context is None else (a, context)
    if in_float64 and a.dtype != torch.float64:
        return _in_float64(net, given)
    made: Tensor = net(*given)
    return made


uncompiled = never_compiled(
    evaluate, "grid numerics need the same bits in both directions, and compiled nets round otherwise: omit fullgraph"
)
"""Returns `evaluate`, which no compiler changes."""


def _in_float64(net: nn.Module, given: tuple[Any, ...]) -> Tensor:
    named = itertools.chain(net.named_parameters(), net.named_buffers())
    state = {name: value.double() if value.is_floating_point() else value for name, value in named}
    made: Tensor = torch.func.functional_call(net, state, tuple(each_entry(torch.Tensor.double, one) for one in given))
    if net.training:  # running statistics were updated in the copies
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(state[name])
    return made


def require_same_function(who: str, net: nn.Module) -> None:
    """Refuses an inverse whose conditioner may compute another function than it did in the forward.

    Raises:
        NumericsError: the net uses batch statistics or random numbers, outside of `same_batch`.
    """
    reason = changing_part(net)
    if reason is not None and not _SAME_BATCH.get():
        raise NumericsError(
            f"{who}: {reason}, so that its inverse need not be exact; call eval() first, or, if the batch is exactly "
            "the one that went forward, invert inside invflow.numerics.same_batch()"
        )


def changing_part(net: nn.Module) -> str | None:
    """Which part of a module depends on the batch, on random numbers, or on earlier calls, in its current mode."""
    for part in net.modules():
        name = type(part).__name__
        if isinstance(part, BatchNorm) and (part.training or part.running_mean is None):
            return f"its {name} uses the statistics of the batch"
        if part.training and draws(part):
            return f"its {name} draws random numbers"
        if part.training and isinstance(part, SpectralNorm):
            return "its spectral norm moves with every call"
    return None


def draws(part: nn.Module) -> bool:
    """Whether a module draws random numbers in train mode."""
    return (isinstance(part, Dropout) and part.p > 0) or isinstance(part, nn.RReLU)


def batch_norm_without_statistics(net: nn.Module) -> bool:
    """Whether a module depends on the batch even in eval mode."""
    return any(isinstance(part, BatchNorm) and part.running_mean is None for part in net.modules())
