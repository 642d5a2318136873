"""Straight lines in feature space, run backwards."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..bijection import Bijection
from ..errors import InvflowError
from ..state import flatten, shape_of, unflatten


@torch.no_grad()
def interpolate(bijection: Bijection, x0: Tensor, x1: Tensor, steps: int) -> Tensor:
    """``x_t = f^-1((1 - t) f(x0) + t f(x1))`` for ``steps`` values of t from 0 to 1, both included.

    Args:
        bijection: f, in its current mode; a copy of it runs. In eval mode the pairs are independent.
        x0: the first points of the walks, ``(pairs, ...)``.
        x1: the last points, of the same shape.
        steps: the number of points of each walk, at least 2.

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
    for end in (x0, x1):
        if not isinstance(end, Tensor):
            raise InvflowError(f"interpolate expects a tensor at each end, got {type(end).__name__}")
    if x0.shape != x1.shape:
        raise InvflowError(f"interpolate expects ends of the same shape, got {tuple(x0.shape)} and {tuple(x1.shape)}")
    bijection = copy.deepcopy(bijection)  # in train mode the forward changes the batch-norm statistics
    first, last = bijection(x0), bijection(x1)
    line = (torch.lerp(flatten(first), flatten(last), float(t)) for t in torch.linspace(0, 1, steps))
    states = (bijection.numerics.nearest(unflatten(point, shape_of(first))) for point in line)
    return torch.stack([bijection.inverse(state) for state in states], dim=1)
