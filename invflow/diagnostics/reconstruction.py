"""How accurately the reversible policy would reconstruct a chain's states, layer by layer."""

from __future__ import annotations

import copy

import torch

from ..context import Context
from ..reversible.chain import plan
from ..reversible.monitor import by_channel, relative_errors, set_back, tolerance
from ..reversible.surroundings import Surroundings, generators
from ..sequential import Sequential
from ..state import State, arranged, leaves, map_state, shape_of


@torch.no_grad()
def reconstruction_errors(chain: Sequential, x: State, context: Context = None) -> dict[str, float]:
    """The relative error of each layer's input, as ``backprop="reversible"`` would reconstruct it in backward.

    All numbers of the states are compared; the monitor compares a sample of them. Errors accumulate from the end of the
    chain to its beginning, and restart from 0 at each input that is kept.

    Args:
        chain: in the mode of interest: train mode, if it is to be trained. A copy of it runs.
        x: a batch of inputs in the chain's dtype.
        context: the context, if the chain has one.

    Returns:
        The errors by the layer's name in the chain, in data order; `relative_errors` defines them.
    """
    context = chain.admit(x, context)
    chain = copy.deepcopy(chain)
    chain.backprop = "reversible"
    device = next(leaves(x)).device
    trained = map_state(lambda leaf: leaf.detach().requires_grad_(leaf.is_floating_point()), x)
    taken, y = [], x
    for keeps, steps in plan(chain.steps(shape_of(x)), trained, context):
        for step in steps:
            around = Surroundings(step.layer, device)
            around.begin()
            around.drawn = generators(device)
            taken.append((step, keeps != "output", around, y))
            y = step.after(y, context)
    errors = {}
    for step, kept, around, before in reversed(taken):
        with around.replay():
            y = before if kept else step.before(y, context)
        found, tensors = [0.0], list(leaves(y))
        for which, leaf in enumerate(leaves(before)):
            if leaf.is_floating_point() and leaf.numel():
                numbers = by_channel(leaf)
                allowed = tolerance(leaf.dtype, device)
                tensors[which] = set_back(tensors[which], numbers, by_channel(tensors[which]), allowed)
                found.append(float(relative_errors(numbers, by_channel(tensors[which]))))
        y = arranged(y, tensors)
        errors[step.name] = max(found)
    return dict(reversed(errors.items()))
