"""How well the reversible policy would reconstruct a chain's states, layer by layer."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..reversible.chain import plan
from ..reversible.monitor import by_channel, error_of, tolerance
from ..reversible.surroundings import Surroundings, generators
from ..sequential import Sequential
from ..state import State, leaves, map_state, shape_of


@torch.no_grad()
def reconstruction_errors(chain: Sequential, x: State, context: Tensor | None = None) -> dict[str, float]:
    """The relative error of each layer's input as ``backprop="reversible"`` would reconstruct it in backward.

    All numbers of the states are compared, where the monitor compares a sample of them; errors add up from the end of
    the chain to its beginning, and start again from 0 where an input is kept.

    Args:
        chain: in the mode that counts: train mode, if it is to be trained. A copy of it runs.
        x: a batch of inputs in the chain's dtype.
        context: the context, where the chain wants one.

    Returns:
        By the layer's name in the chain, in data order; see `error_of` for the measure.
    """
    chain = copy.deepcopy(chain)
    chain.backprop = "reversible"
    device = next(leaves(x)).device
    with torch.enable_grad():
        trained = map_state(lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()), x)
    groups = plan(chain.steps(shape_of(x)), trained, context)
    states, surroundings = [x], []
    steps = [step for _, group in groups for step in group]
    for step in steps:
        around, drawn = Surroundings(step.layer, device), generators(device)
        around.begin()
        states.append(step.after(states[-1], context))
        around.drawn = drawn
        surroundings.append(around)
    kept = [keeps != "output" for keeps, group in groups for _ in group]
    errors, y = {}, states[-1]
    for position in reversed(range(len(steps))):
        before = states[position]
        if kept[position]:
            y = before
        else:
            with surroundings[position].replay():
                y = steps[position].before(y, context)
        pairs = [(a, b) for a, b in zip(leaves(before), leaves(y), strict=True) if a.is_floating_point() and a.numel()]
        found = [error_of(steps[position], by_channel(a), by_channel(b), tolerance(a.dtype)) for a, b in pairs]
        errors[steps[position].name] = max(found, default=0.0)
    return dict(reversed(errors.items()))
