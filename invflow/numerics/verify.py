"""The same call computed in other ways: what is exact gives the same bits in all of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..state import State, batch_size, leaves, map_state

Call: TypeAlias = Callable[[Any, Tensor | None], Any]
"""Of a state and a context, in which samples do not mix; returns a state, or a tuple of states and numbers a sample."""

Way: TypeAlias = Callable[[Call], Call]
"""Makes of a call one that computes the same otherwise."""

ODD_BATCH = 7
"""No multiple of 8, the width of a vector of float32, so that some samples are computed by another loop."""


def computed_otherwise(call: Call, state: State, context: Tensor | None) -> Iterator[tuple[str, Any]]:
    """What a call returns for a batch, computed in other ways: each is named."""
    ways: dict[str, Way] = {"one sample at a time": in_parts(1)}
    if batch_size(state) > ODD_BATCH:
        ways[f"{ODD_BATCH} samples at a time"] = in_parts(ODD_BATCH)
    ways |= {"the batch in reverse": reverse, "the batch three times over": repeated(3)}
    ways |= {"channels last": channels_last, "from a larger tensor": strided}
    if next(leaves(state)).device.type == "cpu":
        ways |= {"1 thread": on_threads(1), "2 threads": on_threads(2), "without oneDNN": without_onednn}
        # From batches of 16 on, other kernels compute.
        ways["without oneDNN, the batch 16 times over"] = lambda call: without_onednn(repeated(16)(call))
    for name, way in ways.items():
        yield name, way(call)(state, context)


def in_parts(size: int) -> Way:
    """Some samples at a time."""

    def apart(call: Call, state: Any, context: Tensor | None) -> Any:
        total = batch_size(state)
        parts = [call(*_each(_cut(start, size), state, context)) for start in range(0, total, size)]
        columns = zip(*(leaves(part) for part in parts), strict=True)
        joined = iter([torch.cat(column) for column in columns])
        return map_state(lambda _: next(joined), parts[0])

    return _way(apart)


def repeated(times: int) -> Way:
    """The batch several times over."""

    def over(call: Call, state: Any, context: Tensor | None) -> Any:
        several = call(*_each(lambda leaf: torch.cat([leaf] * times), state, context))
        return map_state(lambda leaf: leaf[: batch_size(state)], several)

    return _way(over)


def on_threads(number: int) -> Way:
    """On this number of PyTorch's threads."""

    def threaded(call: Call, state: Any, context: Tensor | None) -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            return call(state, context)
        finally:
            torch.set_num_threads(before)

    return _way(threaded)


def _way(how: Callable[[Call, Any, Tensor | None], Any]) -> Way:
    return lambda call: functools.partial(how, call)


@_way
def reverse(call: Call, state: Any, context: Tensor | None) -> Any:
    """The batch in the opposite order."""
    made = call(*_each(lambda leaf: leaf.flip(0), state, context))
    return map_state(lambda leaf: leaf.flip(0), made)


@_way
def channels_last(call: Call, state: Any, context: Tensor | None) -> Any:
    """Images laid out channels last."""
    return call(map_state(_channels_last, state), context)


@_way
def strided(call: Call, state: Any, context: Tensor | None) -> Any:
    """Every other number of a larger tensor."""
    return call(map_state(lambda leaf: torch.stack([leaf, leaf], dim=-1)[..., 0], state), context)


@_way
def without_onednn(call: Call, state: Any, context: Tensor | None) -> Any:
    """PyTorch's own kernels, and NNPACK's."""
    with onednn_off():
        return call(state, context)


def _each(function: Callable[[Tensor], Tensor], *states: Any) -> list[Any]:
    return [None if state is None else map_state(function, state) for state in states]


def _cut(start: int, size: int) -> Callable[[Tensor], Tensor]:
    return lambda leaf: leaf[start : start + size]


def _channels_last(leaf: Tensor) -> Tensor:
    return leaf.contiguous(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf


@contextlib.contextmanager
def onednn_off() -> Iterator[None]:
    """PyTorch's own kernels, and NNPACK's, inside."""
    flags: Any = torch.backends.mkldnn  # its context manager sets TF32 too, and warns
    before = flags.enabled
    flags.enabled = False
    try:
        yield
    finally:
        flags.enabled = before
