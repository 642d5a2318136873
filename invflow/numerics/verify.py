"""The same call computed in other ways: exact numerics return the same bits in all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..context import Context
from ..state import State, batch_size, leaves, map_state

Call: TypeAlias = Callable[[Any, Context], Any]
"""A function of a state and a context that does not mix samples; returns a state, or a tuple of states and numbers a
sample."""

Way: TypeAlias = Callable[[Call], Call]
"""Turns a call into one that computes the same in another way."""

ODD_BATCH = 7
"""Not a multiple of 8, the width of a vector of float32, so that some samples are computed by another loop."""


def computed_otherwise(call: Call, state: State, context: Context) -> Iterator[tuple[str, Any]]:
    """What a call returns for a batch if computed in other ways, with the name of each way."""
    ways: dict[str, Way] = {"one sample at a time": in_parts(1)}
    if batch_size(state) > ODD_BATCH:
        ways[f"{ODD_BATCH} samples at a time"] = in_parts(ODD_BATCH)
    ways |= {"the batch in reverse": reverse, "the batch three times over": repeated(3)}
    ways |= {"channels last": channels_last, "from a larger tensor": strided}
    if next(leaves(state)).device.type == "cpu":
        ways |= {"1 thread": on_threads(1), "2 threads": on_threads(2), "without oneDNN": onednn_off()}
        # From batches of 16 on, other kernels compute.
        ways["without oneDNN, the batch 16 times over"] = lambda call: onednn_off()(repeated(16)(call))
    for name, way in ways.items():
        yield name, way(call)(state, context)


def in_parts(size: int) -> Way:
    """This number of samples at a time."""

    def apart(call: Call, state: Any, context: Context) -> Any:
        cuts = [slice(start, start + size) for start in range(0, batch_size(state), size)]
        parts = [call(*_each(lambda leaf, cut=cut: leaf[cut], state, context)) for cut in cuts]  # type: ignore[misc]
        columns = zip(*(leaves(part) for part in parts), strict=True)
        joined = iter([torch.cat(column) for column in columns])
        return map_state(lambda _: next(joined), parts[0])

    return lambda call: lambda state, context: apart(call, state, context)


def repeated(times: int) -> Way:
    """The batch several times over."""

    def over(call: Call, state: Any, context: Context) -> Any:
        several = call(*_each(lambda leaf: torch.cat([leaf] * times), state, context))
        return map_state(lambda leaf: leaf[: batch_size(state)], several)

    return lambda call: lambda state, context: over(call, state, context)


def reverse(call: Call) -> Call:
    """The batch in the opposite order."""
    return lambda state, context: map_state(_flipped, call(*_each(_flipped, state, context)))


def channels_last(call: Call) -> Call:
    """Images laid out channels last."""
    return lambda state, context: call(map_state(_channels_last, state), context)


def strided(call: Call) -> Call:
    """Every other number of a larger tensor."""
    return lambda state, context: call(map_state(_every_other, state), context)


@contextlib.contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Inside, or in a function that it decorates: this number of PyTorch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def onednn_off() -> Iterator[None]:
    """Inside, or in a function that it decorates: PyTorch's own kernels, and NNPACK's."""
    flags: Any = torch.backends.mkldnn  # its context manager sets TF32 too, and warns
    before = flags.enabled
    flags.enabled = False
    try:
        yield
    finally:
        flags.enabled = before


def _each(function: Callable[[Tensor], Tensor], *states: Any) -> list[Any]:
    return [None if state is None else map_state(function, state) for state in states]


def _flipped(leaf: Tensor) -> Tensor:
    return leaf.flip(0)


def _channels_last(leaf: Tensor) -> Tensor:
    return leaf.contiguous(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf


def _every_other(leaf: Tensor) -> Tensor:
    return torch.stack([leaf, leaf], dim=-1)[..., 0]
