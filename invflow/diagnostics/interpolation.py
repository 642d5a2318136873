"""Straight lines in feature space, run backwards."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..bijection import Bijection
from ..errors import InvflowError
from ..state import State


@torch.no_grad()
def interpolate(bijection: Bijection, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
    """``x_t = f^-1((1 - t) f(x0) + t f(x1))`` for ``steps`` values of t from 0 to 1, both included.

    Args:
        bijection: f, which runs in the mode that it is in and stays as it is; eval mode keeps the pairs independent.
        x0: where the walks begin, ``(pairs, ...)``.
        x1: where they end, of the same shape.
        steps: how many points of each walk, at least 2.

    Returns:
        ``(pairs, steps, ...)``.

    Raises:
        InvflowError: fewer than 2 steps, or ends of different shapes.

    Examples:
        >>> from invflow.bijections import Psi
        >>> interpolate(Psi(2), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), steps=5)[0, :, 0, 0, 0].tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if steps < 2:
        raise InvflowError(f"interpolate expects at least 2 steps, the ends of the walk, got {steps}")
    if x0.shape != x1.shape:
        raise InvflowError(f"interpolate expects ends of the same shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
    bijection = copy.deepcopy(bijection)  # in train mode, running the caller's would move its batch-norm statistics
    first, last = bijection(x0), bijection(x1)
    between = (_between(first, last, float(t)) for t in torch.linspace(0, 1, steps))
    walk = [bijection.inverse(bijection.numerics.nearest(state)) for state in between]
    return torch.stack(walk, dim=1)


def _between(a: State, b: State, t: float) -> State:
    if isinstance(a, tuple):
        return tuple(_between(p, q, t) for p, q in zip(a, b, strict=True))
    return torch.lerp(a, b, t)  # type: ignore[arg-type]
