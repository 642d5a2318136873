"""How much a rounding on the way through a bijection may grow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..bijection import Bijection
from ..measures import LARGEST_JACOBIAN, jacobian, joint_jacobian, with_context
from ..state import State, batch_size, flat_size, map_state, sample, shape_of
from ..wires import steps_of


def condition_number(
    bijection: Bijection, x: State, context: Tensor | None = None, *, backwards: bool = False
) -> float:
    """How much a rounding on the way may grow until it is back at x, the largest over the batch; at least 1.

    The condition number of the Jacobian with a 1 beside it: errors are measured against max(1, magnitude), so 1 is a
    unit of the state, and a plain scaling counts as well. Of a chain, the largest over its beginnings, for a rounding
    arises after each layer; ``backwards`` over its ends, for a round trip that starts from y. Infinite where a Jacobian
    is singular; 1 where it is too large to be made.
    """
    if flat_size(shape_of(x)) > LARGEST_JACOBIAN or not batch_size(x):
        return 1.0
    if bijection.training:
        return _condition(_jacobians(bijection, x, context, joint_jacobian), backwards)
    samples = range(batch_size(x))
    return max(
        _condition(_jacobians(bijection, sample(x, i), sample(context, i), jacobian), backwards) for i in samples
    )


def trace(bijection: Bijection, x: State, context: Tensor | None = None) -> list[State]:
    """The input and every state that a step makes of it."""
    states = [x]
    with torch.no_grad():
        for step in steps_of(bijection, shape_of(x)):
            states.append(step.after(states[-1], context))
    return states


def _jacobians(
    bijection: Bijection,
    x: State,
    context: Tensor | None,
    derivative: Callable[[Callable[[State], State], State], Tensor],
) -> list[Tensor]:
    """The Jacobian of each step at the state that reaches it."""
    found = []
    for step in steps_of(bijection, shape_of(x)):
        found.append(derivative(with_context(step.after, context), x))
        with torch.no_grad():
            x = step.after(x, context)
    return found


def _condition(steps: list[Tensor], backwards: bool) -> float:
    worst = 1.0
    product: Tensor | None = None
    for step in reversed(steps) if backwards else steps:
        product = step if product is None else product @ step if backwards else step @ product
        if not product.isfinite().all():
            return math.inf
        values = torch.linalg.svdvals(product)
        smallest, largest = float(values.min()), float(values.max())
        worst = max(worst, max(1.0, largest) / min(1.0, smallest) if smallest else math.inf)
    return worst


def in_double(bijection: Bijection, x: State, context: Tensor | None) -> tuple[Bijection, State, Tensor | None]:
    """A copy and its inputs in float64, in which derivatives are worth something."""
    given = None if context is None else context.double()
    return copy.deepcopy(bijection).double(), map_state(torch.Tensor.double, x), given
