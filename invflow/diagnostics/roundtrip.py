"""How accurately a chain runs backwards."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..bijection import Bijection
from ..context import Context, each_entry, entries
from ..measures import difference, magnitude
from ..numerics import draws, same_batch
from ..sequential import Sequential
from ..state import State, leaves, map_state, require_state, shape_of
from ..steps import Step

B = TypeVar("B", bound=Bijection)
T = TypeVar("T")


@dataclass(frozen=True)
class RoundTrip:
    """The result of x -> y -> x'.

    A chain with joints consists of several trunks: each runs forward and back on the state that reaches it, and these
    are the figures of all of them together.

    Attributes:
        absolute: ``max |x' - x|``.
        relative: ``absolute`` divided by max(1, the largest magnitude in any intermediate state).
        bit_equal: the fraction of elements that came back bit-equal, 0 to 1.
        by_step: the relative error of each of the chain's `steps` alone, on the state that reaches it; None for a
            joint, which has no inverse.
    """

    absolute: float
    relative: float
    bit_equal: float
    by_step: tuple[float | None, ...]


@torch.no_grad()
def round_trip(chain: Sequential, x: State, context: Context = None) -> RoundTrip:
    """Runs a chain forward and back, in its current mode; dropout drops the same numbers both ways.

    Args:
        chain: the chain; a copy of it runs, so that its batch-norm statistics do not change.
        x: a batch of inputs in the chain's dtype.
        context: the context, if the chain has one.
    """
    context = chain.admit(x, context)
    chain = copy.deepcopy(chain)  # in train mode a forward changes running statistics
    with same_batch(), _same_draws(chain, x):
        states = chain.trace(x, context)
        steps = chain.steps(shape_of(x))
        if chain.invertible:
            trunks = [(x, chain.inverse(states[-1], context))]
        else:
            trunks = [(states[i], _back(steps[i:j], states[j], context)) for i, j in _trunks(steps)]
        by_step = [
            difference(a, step.before(b, context)) / magnitude(a, b) if step.layer.invertible else None
            for step, a, b in zip(steps, states[:-1], states[1:], strict=True)
        ]
    pairs = [pair for ends in trunks for pair in zip(*map(leaves, ends), strict=True)]
    absolute = float(torch.tensor([0.0, *(difference(a, b) for a, b in trunks)], dtype=torch.float64).max())  # or NaN
    equal = sum(int((a == b).sum()) for a, b in pairs)
    total = sum(a.numel() for a, _ in pairs)
    return RoundTrip(absolute, absolute / magnitude(*states), equal / max(1, total), tuple(by_step))


def _trunks(steps: Sequence[Step]) -> list[tuple[int, int]]:
    """The first of each row of steps that have an inverse, and the one behind its last."""
    rows = itertools.groupby(range(len(steps)), lambda i: steps[i].layer.invertible)
    found = [[*row] for invertible, row in rows if invertible]
    return [(row[0], row[-1] + 1) for row in found]


def _back(steps: Sequence[Step], state: State, context: Context) -> State:
    """The state before some steps, recovered from that after them."""
    for step in reversed(steps):
        state = step.before(state, context)
    return state


@torch.no_grad()
def errors_on_the_way_back(chain: Sequential, x: State, context: Context = None) -> list[float]:
    """The error of each state when the chain runs backwards from its output, relative as in `RoundTrip`.

    Entry i is the error of the input of step i; the last entry, the error of the chain's output, is 0, and so are those
    of the inputs of joints, below which the next trunk begins.
    """
    context = chain.admit(x, context)
    chain = copy.deepcopy(chain)
    with same_batch(), _same_draws(chain, x):
        states = chain.trace(x, context)
        scale, back, errors = magnitude(*states), states[-1], [0.0]
        for step, state in zip(reversed(chain.steps(shape_of(x))), reversed(states[:-1]), strict=True):
            back = step.before(back, context) if step.layer.invertible else state
            errors.insert(0, difference(state, back) / scale)
    return errors


@contextlib.contextmanager
def _same_draws(chain: Sequential, x: State) -> Iterator[None]:
    """Inside, each module that draws random numbers draws the same ones at every call: the map then has an inverse."""
    devices = range(torch.cuda.device_count())  # a seed is given to all of them
    hooks = [
        part.register_forward_pre_hook(functools.partial(_seed, number))
        for number, part in enumerate(chain.modules())
        if draws(part)
    ]
    with torch.random.fork_rng(devices):
        yield
    for hook in hooks:
        hook.remove()


def _seed(number: int, _: nn.Module, __: object) -> None:
    torch.manual_seed(number)


def round_trips(chain: Sequential, x: State, context: Context = None) -> dict[tuple[str, str], RoundTrip]:
    """`round_trip` in float32 and float64, in eval and train mode: keys such as ``("float32", "eval")``."""
    return in_each_mode(round_trip, chain, x, context)


def in_each_mode(
    measure: Callable[[Sequential, State, Tensor | None], T], chain: Sequential, x: State, context: Context
) -> dict[tuple[str, str], T]:
    """A measurement in float32 and float64, in eval and train mode, on copies: keys such as ``("float32", "eval")``."""
    found = {}
    for name in ("float32", "float64"):
        converted, state, given = in_dtype(chain, x, context, getattr(torch, name))
        for mode in ("eval", "train"):
            found[name, mode] = measure(converted.train(mode == "train"), state, given)
    return found


def in_dtype(bijection: B, x: State, context: Context, dtype: torch.dtype) -> tuple[B, State, Any]:
    """A copy and its inputs in a dtype."""
    for one in (x, *entries(context)):
        require_state("a measurement", None, None, one)
    given = each_entry(lambda entry: entry.to(dtype), context)
    return copy.deepcopy(bijection).to(dtype), map_state(lambda leaf: leaf.to(dtype), x), given
