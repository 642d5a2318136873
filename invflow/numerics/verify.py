"""The same call computed in other ways: what is exact gives the same bits in all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..state import State, leaves, map_state

ODD_BATCH = 7
"""No multiple of 8, the width of a vector of float32, so that some samples are computed by another loop."""


def computed_otherwise(call: Callable[..., Any], state: State, context: Tensor | None) -> Iterator[tuple[str, Any]]:
    """What a call returns for a batch, computed in other ways: each is named.

    Args:
        call: of a state and a context; samples do not mix in it. It returns a state, or a tuple of states and numbers
            by sample.
        state: a batch.
        context: its context, or None.
    """
    size = next(leaves(state)).shape[0]
    yield "one sample at a time", _in_parts(call, state, context, 1)
    if size > ODD_BATCH:
        yield f"{ODD_BATCH} samples at a time", _in_parts(call, state, context, ODD_BATCH)
    order = torch.arange(size - 1, -1, -1, device=next(leaves(state)).device)
    backwards = call(*(_map(lambda leaf: leaf.index_select(0, order), one) for one in (state, context)))
    yield "the batch in reverse", _map(lambda leaf: leaf.index_select(0, order), backwards)
    several = call(*(_map(lambda leaf: torch.cat([leaf] * 3), one) for one in (state, context)))
    yield "the batch three times over", _map(lambda leaf: leaf[:size], several)
    yield "channels last", call(_map(_channels_last, state), context)
    yield "from a larger tensor", call(_map(_strided, state), context)
    if next(leaves(state)).device.type == "cpu":
        for number in (1, 2):
            with threads(number):
                yield f"{number} thread{'s' * (number > 1)}", call(state, context)
        with without_onednn():
            yield "without oneDNN", call(state, context)
            # From batches of 16 on, other kernels compute.
            many = call(*(_map(lambda leaf: torch.cat([leaf] * 16), one) for one in (state, context)))
            yield "without oneDNN, the batch 16 times over", _map(lambda leaf: leaf[:size], many)


def _map(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    return None if state is None else map_state(function, state)


def _in_parts(call: Callable[..., Any], state: State, context: Tensor | None, size: int) -> Any:
    total = next(leaves(state)).shape[0]
    parts = []
    for start in range(0, total, size):
        cut = slice(start, start + size)
        parts.append(call(*(_map(lambda leaf, cut=cut: leaf[cut], one) for one in (state, context))))  # type: ignore[misc]
    columns = zip(*(leaves(part) for part in parts), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    return map_state(lambda _: next(joined), parts[0])


def _channels_last(leaf: Tensor) -> Tensor:
    return leaf.contiguous(memory_format=torch.channels_last) if leaf.dim() == 4 else leaf


def _strided(leaf: Tensor) -> Tensor:
    return torch.stack([leaf, leaf], dim=-1)[..., 0]


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """So many of torch's threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """PyTorch's own kernels, and NNPACK's, inside."""
    flags: Any = torch.backends.mkldnn  # its context manager sets TF32 too, and warns
    before = flags.enabled
    flags.enabled = False
    try:
        yield
    finally:
        flags.enabled = before
