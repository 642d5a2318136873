"""Conditioners whose answer has to be the same bits both ways."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .._torch import BatchNorm, Dropout, SpectralNorm
from ..errors import NumericsError

_SAME_BATCH: ContextVar[bool] = ContextVar("same_batch", default=False)


@contextlib.contextmanager
def same_batch() -> Iterator[None]:
    """Inside, an inverse in train mode is trusted to be given the whole batch that the forward saw, and no other.

    Batch statistics are then the same both ways. Without it such an inverse is refused in `grid` numerics.
    """
    token = _SAME_BATCH.set(True)
    try:
        yield
    finally:
        _SAME_BATCH.reset(token)


def evaluate(net: nn.Module, a: Tensor, context: Tensor | None, *, in_float64: bool, hide_sign: bool) -> Tensor:
    """``net(a)``, or ``net(a, context)``, without autocast: in bfloat16 on one way only, it would be another function.

    Args:
        net: the conditioner.
        a: its input.
        context: handed on where there is one.
        in_float64: whether weights and inputs are converted first.
        hide_sign: whether -0.0 is made 0.0 first: convolutions and activations do not tell them apart, but another net
            may divide by a.
    """
    if not a.is_meta and torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return evaluate(net, a, context, in_float64=in_float64, hide_sign=hide_sign)
    if hide_sign:
        a = a + 0.0
    given = (a,) if context is None else (a, context)
    if in_float64 and a.dtype != torch.float64:
        return _in_float64(net, given)
    made: Tensor = net(*given)
    return made


def _in_float64(net: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    named = itertools.chain(net.named_parameters(), net.named_buffers())
    state = {name: value.double() if value.is_floating_point() else value for name, value in named}
    made: Tensor = torch.func.functional_call(net, state, tuple(one.double() for one in given))
    if net.training:  # running statistics have moved in the copies
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(state[name])
    return made


def require_same_function(who: str, net: nn.Module) -> None:
    """Refuses an inverse whose conditioner computes something else than it did on the way there.

    Raises:
        NumericsError: batch statistics or random numbers are at work, and nobody vouches for the batch.
    """
    reason = changing_part(net)
    if reason is not None and not _SAME_BATCH.get():
        raise NumericsError(
            f"{who}: {reason}, so that its inverse need not be exact; call eval() first, or, where the whole batch is "
            "the one that went forward, invert inside invflow.numerics.same_batch()"
        )


def changing_part(net: nn.Module) -> str | None:
    """What in a module depends on the batch, on chance, or on the calls before, in the mode that it is in."""
    for part in net.modules():
        name = type(part).__name__
        if isinstance(part, BatchNorm) and (part.training or part.running_mean is None):
            return f"its {name} uses the statistics of the batch"
        if part.training and ((isinstance(part, Dropout) and part.p > 0) or isinstance(part, nn.RReLU)):
            return f"its {name} draws random numbers"
        if part.training and isinstance(part, SpectralNorm):
            return "its spectral norm moves with every call"
    return None


def batch_norm_without_statistics(net: nn.Module) -> bool:
    """Whether even in eval mode what a module computes depends on the batch."""
    return any(isinstance(part, BatchNorm) and part.running_mean is None for part in net.modules())
