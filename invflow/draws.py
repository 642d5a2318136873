"""Random numbers of a part of a batch: those that a process which has the whole batch draws for these rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Rows:
    start: int
    of: int
    seed: int
    generators: dict[torch.device, torch.Generator] = field(default_factory=dict)

    def generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


_ROWS: ContextVar[_Rows | None] = ContextVar("rows", default=None)


@contextlib.contextmanager
def rows_of(start: int, of: int, seed: int) -> Iterator[None]:
    """Inside, `drawn` returns what it returns for a batch of ``of`` samples after ``manual_seed(seed)``, from a row on.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> whole = drawn(torch.rand, (5, 2))
        >>> with rows_of(3, 5, seed=0):
        ...     part = drawn(torch.rand, (2, 2))
        >>> torch.equal(part, whole[3:])
        True
    """
    token = _ROWS.set(_Rows(start, of, seed))
    try:
        yield
    finally:
        _ROWS.reset(token)


def drawn(
    draw: Callable[..., Tensor],
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random numbers for each sample of a batch, of torch's global generator unless another is given.

    Args:
        draw: `torch.rand` or `torch.randn`.
        shape: ``(batch, ...)``.
        dtype: of the numbers.
        device: likewise.
        generator: of the numbers.
    """
    given = {"dtype": dtype, "device": device, "generator": generator}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    rows = _ROWS.get()
    if rows is None or generator is not None:
        return draw(shape, **options)
    whole = draw((rows.of, *shape[1:]), generator=rows.generator(device or torch.device("cpu")), **options)
    return whole[rows.start : rows.start + shape[0]]
