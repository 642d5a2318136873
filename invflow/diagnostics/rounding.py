"""How much rounding errors inside a bijection can be amplified."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from ..bijection import Bijection
from ..context import Context
from ..measures import LARGEST_JACOBIAN, jacobian, joint_jacobian, with_context
from ..sequential import Sequential
from ..state import State, batch_size, flat_size, sample, shape_of
from ..steps import steps_of
from .roundtrip import B, in_dtype


def condition_number(bijection: Bijection, x: State, context: Context = None, *, backwards: bool = False) -> float:
    """The largest factor by which a rounding error on the way grows until it is back at x, over the batch; at least 1.

    The condition number of the Jacobian with an additional singular value of 1: errors are relative to
    ``max(1, magnitude)``, so 1 is a unit of the state, and a mere scaling counts as well. A rounding arises after each
    layer, so that a chain has the largest one of all its beginnings; with ``backwards`` of all its ends, for a round
    trip that starts from y. Infinite if a Jacobian is singular; 1 if it is too large to compute.
    """
    if isinstance(bijection, Sequential):
        context = bijection.admit(x, context)
    if flat_size(shape_of(x)) > LARGEST_JACOBIAN or not batch_size(x):
        return 1.0
    samples = [(sample(x, i), sample(context, i)) for i in range(batch_size(x))]
    batches = [(x, context)] if bijection.training else samples  # in train mode samples may mix
    return max(_condition_number(bijection, state, given, backwards) for state, given in batches)


def trace(bijection: Bijection, x: State, context: Context = None) -> list[State]:
    """The input, and the state after each step."""
    states = [x]
    with torch.no_grad():
        for step in steps_of(bijection, shape_of(x)):
            states.append(step.after(states[-1], context))
    return states


def in_double(bijection: B, x: State, context: Context) -> tuple[B, State, Any]:
    """A copy and its inputs in float64, in which derivatives are accurate."""
    return in_dtype(bijection, x, context, torch.float64)


def _condition_number(bijection: Bijection, x: State, context: Context, backwards: bool) -> float:
    derivative = joint_jacobian if bijection.training else jacobian
    pairs = zip(steps_of(bijection, shape_of(x)), trace(bijection, x, context), strict=False)
    found = [derivative(with_context(step.after, context), state) for step, state in pairs]
    worst = 1.0
    order = found[::-1] if backwards else found
    for product in itertools.accumulate(order, lambda made, step: made @ step if backwards else step @ made):
        if not product.isfinite().all():
            return math.inf
        values = torch.linalg.svdvals(product)
        smallest, largest = float(values.min()), float(values.max())
        worst = max(worst, max(1.0, largest) / min(1.0, smallest) if smallest else math.inf)
    return worst
