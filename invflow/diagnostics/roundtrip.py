"""How exactly a chain runs backwards."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measures import difference, magnitude
from ..numerics import same_batch
from ..sequential import Sequential
from ..state import State, leaves, map_state, shape_of

MODES = ("eval", "train")


@dataclass(frozen=True)
class RoundTrip:
    """The result of x -> y -> x'.

    Attributes:
        absolute: max |x' - x|.
        relative: that divided by max(1, the largest magnitude met in any intermediate state).
        bit_equal: the part of all elements that came back without one wrong bit, 0 to 1.
        by_step: the relative error of each of the chain's `steps` alone, given the state that reaches it.
    """

    absolute: float
    relative: float
    bit_equal: float
    by_step: tuple[float, ...]


@torch.no_grad()
def round_trip(chain: Sequential, x: State, context: Tensor | None = None) -> RoundTrip:
    """Runs a chain there and back, in the mode that it is in; its batch-norm statistics stay as they are.

    Args:
        chain: the chain; a copy of it runs.
        x: a batch of inputs in the chain's dtype.
        context: the context, where the chain wants one.
    """
    chain = copy.deepcopy(chain)  # in train mode a forward moves running statistics
    with same_batch():
        states = chain.trace(x, context)
        back = chain.inverse(states[-1], context)
        by_step = [
            difference(before, step.before(after, context)) / magnitude(before, after)
            for step, before, after in zip(chain.steps(shape_of(x)), states, states[1:], strict=False)
        ]
    absolute = difference(x, back)
    equal = sum(int((a == b).sum()) for a, b in zip(leaves(x), leaves(back), strict=True))
    total = sum(leaf.numel() for leaf in leaves(x))
    return RoundTrip(absolute, absolute / magnitude(*states), equal / max(1, total), tuple(by_step))


@torch.no_grad()
def errors_on_the_way_back(chain: Sequential, x: State, context: Tensor | None = None) -> list[float]:
    """How far each state is off when the chain is run backwards from its end, relative as in `RoundTrip`.

    Entry i is the error of the state that step i was given; the last one, of the chain's output, is 0.
    """
    chain = copy.deepcopy(chain)
    states = chain.trace(x, context)
    scale, back, errors = magnitude(*states), states[-1], [0.0]
    for step, state in zip(reversed(chain.steps(shape_of(x))), reversed(states[:-1]), strict=True):
        back = step.before(back, context)
        errors.insert(0, difference(state, back) / scale)
    return errors


def round_trips(chain: Sequential, x: State, context: Tensor | None = None) -> dict[tuple[str, str], RoundTrip]:
    """`round_trip` in float32 and float64, in eval and train mode: keys such as ``("float32", "eval")``."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        converted = copy.deepcopy(chain).to(dtype)
        state = map_state(lambda leaf, dtype=dtype: leaf.to(dtype), x)  # type: ignore[misc]
        given = None if context is None else context.to(dtype)
        for mode in MODES:
            name = str(dtype).removeprefix("torch.")
            found[name, mode] = round_trip(converted.train(mode == "train"), state, given)
    return found
