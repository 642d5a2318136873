"""How exactly a chain runs backwards."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import same_batch
from ..sequential import Sequential
from ..state import State, leaves, map_state

MODES = ("eval", "train")


@dataclass(frozen=True)
class RoundTrip:
    """The result of x -> y -> x'.

    Attributes:
        absolute: max |x' - x|.
        relative: that divided by max(1, the largest magnitude met in any intermediate state).
        bit_equal: the part of all elements that came back without one wrong bit, 0 to 1.
        by_layer: the relative error of each layer alone, given the state that reaches it.
    """

    absolute: float
    relative: float
    bit_equal: float
    by_layer: tuple[float, ...]


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
        by_layer = [
            _largest_difference(before, layer.inverse(after, context)) / _scale([before, after])
            for layer, before, after in zip(chain, states, states[1:], strict=False)
        ]
    absolute = _largest_difference(x, back)
    equal = sum(int((a == b).sum()) for a, b in zip(leaves(x), leaves(back), strict=True))
    total = sum(leaf.numel() for leaf in leaves(x))
    return RoundTrip(absolute, absolute / _scale(states), equal / max(1, total), tuple(by_layer))


@torch.no_grad()
def errors_on_the_way_back(chain: Sequential, x: State, context: Tensor | None = None) -> list[float]:
    """How far each state is off when the chain is run backwards from its end, relative as in `RoundTrip`.

    Entry i is the error of the state that layer i was given; the last one, of the chain's output, is 0.
    """
    chain = copy.deepcopy(chain)
    states = chain.trace(x, context)
    scale, back, errors = _scale(states), states[-1], [0.0]
    for layer, state in zip(reversed(list(chain)), reversed(states[:-1]), strict=True):
        back = layer.inverse(back, context)
        errors.insert(0, _largest_difference(state, back) / scale)
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


def _largest_difference(a: State, b: State) -> float:
    pairs = zip(leaves(a), leaves(b), strict=True)
    return _largest(0.0, [(p - q).abs().max() for p, q in pairs if p.numel()])


def _scale(states: list[State]) -> float:
    """max(1, the largest magnitude in any of the states)."""
    return _largest(1.0, [leaf.abs().max() for state in states for leaf in leaves(state) if leaf.numel()])


def _largest(least: float, values: list[Tensor]) -> float:
    """The largest number, and NaN where any of them is: Python's max would lose it."""
    return float(torch.tensor([least, *map(float, values)], dtype=torch.float64).max())
