"""How a bijection behaves towards its caller: no traces, no mixing, the same answer each time."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import torch

from ..._torch import version
from ...bijection import Bijection
from ...diagnostics.rounding import condition_number, in_double
from ...measures import difference, magnitude, same_bits
from ...state import State, batch_size, leaves, map_state, sample, shape_of
from ..tolerances import EXACT
from ..trial import Trial
from .base import all_calls, all_there_is, both_ways, expect, promised, same_states

SEVERAL = {"training": False, "batch": 3}


def same_numbers(trial: Trial, found: list[tuple[Any, Any]], tolerance: float) -> float:
    """How far pairs of states, that should be the same numbers computed twice, are apart."""
    states = [state for pair in found for state in pair]
    worst = max(difference(a, b) for a, b in found) / magnitude(trial.x, *states)
    if not worst > tolerance:
        return worst
    bijection, x, context = in_double(trial.bijection, trial.x, trial.context)
    return worst / condition_number(bijection, x, context)


@promised(same_states)
def plain_call(trial: Trial) -> float:
    """A plain call returns what the call with the log-determinant returns first."""
    bijection = trial.bijection
    found = []
    with torch.no_grad():
        for (_, call, state), plain in zip(both_ways(trial), (bijection.forward, bijection.inverse), strict=True):
            found.append((plain(state, trial.context), call(state, trial.context)[0]))
    return same_numbers(trial, found, same_states(trial))


@promised(EXACT, needs={})
def input_untouched(trial: Trial) -> float:
    """The caller's tensors hold the same numbers after a call as before, and were never written to."""
    for name, call, state in all_calls(trial):
        given = [*leaves(state), *([] if trial.context is None else [trial.context])]
        before = [(leaf.clone(), version(leaf)) for leaf in given]
        with torch.no_grad():
            call(state, trial.context)
        for leaf, (values, count) in zip(given, before, strict=True):
            expect(
                same_bits(leaf, values), f"{name} to leave its input as it is; it differs by {difference(leaf, values)}"
            )
            expect(version(leaf) == count, f"{name} to leave its input alone; it was written to in place")
    return 0.0


@promised(EXACT)
def module_untouched(trial: Trial) -> float:
    """In eval mode a call moves no weight, no buffer, no mode, and no generator of random numbers."""
    bijection = trial.bijection
    for name, call, state in all_calls(trial):
        before = {key: value.clone() for key, value in bijection.state_dict().items()}
        modes, generators = _modes(bijection), _generators()
        call(state, trial.context)
        after = bijection.state_dict()
        expect(
            list(after) == list(before), f"{name} to keep the keys of the state_dict {list(before)}, got {list(after)}"
        )
        moved = [key for key, value in after.items() if not same_bits(value, before[key])]
        expect(not moved, f"{name} to leave weights and buffers as they are; it moved {moved}")
        expect(_modes(bijection) == modes, f"{name} to leave train and eval mode as they are")
        expect(_generators() == generators, f"{name} to draw no random numbers in eval mode")
    return 0.0


def _modes(module: torch.nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())


@promised(EXACT)
def determinism(trial: Trial) -> float:
    """The same call gives the same bits twice."""
    with torch.no_grad():
        for name, call, state in all_calls(trial):
            first, second = call(state, trial.context), call(state, trial.context)
            expect(same_bits(first, second), f"{name} to return the same bits twice")
    return 0.0


@promised(EXACT, needs=SEVERAL, kinds=("normal", "huge"))
def no_memory(trial: Trial) -> float:
    """What a call returns does not depend on the calls before it."""
    with torch.no_grad():
        for name, call, state in all_calls(trial):
            first = call(state, trial.context)
            for _, other, given in both_ways(trial):
                other(sample(given, 0), sample(trial.context, 0))
                other(*(_reversed(one) for one in (given, trial.context)))
            expect(same_bits(first, call(state, trial.context)), f"{name} to return the same bits after other calls")
    return 0.0


def _reversed(state: State | None) -> State | None:
    return None if state is None else map_state(lambda leaf: leaf.flip(0), state)


@promised(same_states, needs=SEVERAL)
def batch_independence(trial: Trial) -> float:
    """In eval mode each sample gets what it would get alone."""
    found = []
    with torch.no_grad():
        for _, call, state in all_calls(trial):
            together = call(state, trial.context)
            for i in range(batch_size(state)):
                alone = call(sample(state, i), sample(trial.context, i))
                found += [(sample(a, i), b) for a, b in zip(together, alone, strict=True)]
    return same_numbers(trial, found, same_states(trial))


@promised(EXACT, needs={"training": False, "batch": 0}, kinds=("normal",), trials=2)
def empty_batch(trial: Trial) -> float:
    """A batch of no samples comes back as one of none, of the shapes that any other has."""
    told = trial.bijection.output_shape(trial.shape)
    with torch.no_grad():
        for (name, call, state), shape in zip(all_calls(trial), (told, trial.shape) * 2, strict=False):
            result = call(state, trial.context)[0]
            expect(batch_size(result) == 0, f"{name} to return no samples, got {batch_size(result)}")
            expect(shape_of(result) == shape, f"{name}: shape {shape}, got {shape_of(result)}")
    return 0.0


@promised(same_states, needs=SEVERAL, about=lambda bijection: not bijection.numerics.on_grid)
def nan_contained(trial: Trial) -> float:
    """A NaN in one sample reaches no other."""
    found = []
    with torch.no_grad():
        for _, call, state in all_calls(trial):
            spoilt = map_state(lambda leaf: leaf.clone().index_fill(0, torch.tensor([1]), float("nan")), state)
            for clean, other in zip(call(state, trial.context), call(spoilt, trial.context), strict=True):
                found += [(sample(clean, i), sample(other, i)) for i in (0, 2)]
    return same_numbers(trial, found, same_states(trial))


@promised(same_states)
def memory_layout(trial: Trial) -> float:
    """Strided, expanded and channels-last inputs give what contiguous ones give."""
    found = []
    with torch.no_grad():
        for _, call, state in all_calls(trial):
            plain = map_state(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state)
            found += list(zip(call(state, trial.context), call(plain, trial.context), strict=True))
    return same_numbers(trial, found, same_states(trial))


@promised(EXACT, needs={})
def dtype_kept(trial: Trial) -> float:
    """The output has the dtype and the device of the input, and finite inputs give finite outputs."""
    like = next(leaves(trial.x))
    with torch.no_grad():
        for name, call, state in all_calls(trial):
            result = call(state, trial.context)[0]
            for leaf in leaves(result):
                expect(leaf.dtype == like.dtype, f"{name}: {like.dtype}, got {leaf.dtype}")
                expect(leaf.device == like.device, f"{name}: device {like.device}, got {leaf.device}")
                expect(bool(leaf.isfinite().all()), f"{name}: finite numbers, got infinite ones or NaN")
    return 0.0


def seen_through(bijection: Bijection, trial: Trial) -> list[Any]:
    """What another instance returns for the inputs of a trial, both ways."""
    with torch.no_grad():
        states = (trial.x, trial.image)
        calls = all_there_is(bijection).values()
        return [call(state, trial.context) for call, state in zip(calls, states, strict=True)]
