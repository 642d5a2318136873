"""Straight lines in feature space, run backwards."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..bijection import Bijection
from ..context import Context, entries, with_entries
from ..errors import InvflowError
from ..state import flatten, shape_of, unflatten


@torch.no_grad()
def interpolate(
    bijection: Bijection,
    x0: Tensor,
    x1: Tensor,
    steps: int,
    context0: Context = None,
    context1: Context = None,
) -> Tensor:
    """``x_t = f^-1((1 - t) f(x0) + t f(x1))`` for ``steps`` values of t from 0 to 1, both included.

    Args:
        bijection: f, in its current mode; a copy of it runs. In eval mode the pairs are independent.
        x0: the first points of the walks, ``(pairs, ...)``.
        x1: the last points, of the same shape.
        steps: the number of points of each walk, at least 2.
        context0: of the first points, ``(pairs, ...)``.
        context1: of the last points; on the way, the context is on a straight line too.

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
    if (context0 is None) is not (context1 is None):
        raise InvflowError("interpolate expects a context at both ends, or at none")
    first, last = bijection(x0, context0), bijection(x1, context1)
    walk = []
    for t in torch.linspace(0, 1, steps).tolist():
        point = unflatten(torch.lerp(flatten(first), flatten(last), t), shape_of(first))
        ends = zip(entries(context0), entries(context1), strict=True)
        context = with_entries(context0, [torch.lerp(a, b, t) for a, b in ends])
        walk.append(bijection.inverse(bijection.numerics.nearest(point), context))
    return torch.stack(walk, dim=1)
