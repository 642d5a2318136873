"""Straight lines in feature space, run backwards."""

from __future__ import annotations

import torch
from torch import Tensor

from ..bijection import Bijection
from ..state import State


@torch.no_grad()
def interpolate(bijection: Bijection, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
    """``x_t = f^-1((1 - t) f(x0) + t f(x1))`` for ``steps`` values of t from 0 to 1, both included.

    Args:
        bijection: f, which runs in the mode that it is in; eval mode keeps the pairs independent.
        x0: where the walks begin, ``(pairs, ...)``.
        x1: where they end, of the same shape.
        steps: how many points of each walk, at least 2.

    Returns:
        ``(pairs, steps, ...)``.
    """
    first, last = bijection(x0), bijection(x1)
    walk = [bijection.inverse(_between(first, last, float(t))) for t in torch.linspace(0, 1, steps)]
    return torch.stack(walk, dim=1)


def _between(a: State, b: State, t: float) -> State:
    if isinstance(a, tuple):
        return tuple(_between(p, q, t) for p, q in zip(a, b, strict=True))
    return torch.lerp(a, b, t)  # type: ignore[arg-type]
