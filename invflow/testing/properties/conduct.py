"""How a bijection behaves towards its caller: no side effects, no mixing of samples, the same result each time."""

from __future__ import annotations

import copy
import gc
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..._torch import DispatchMode, float32_precisions, version
from ...bijection import Bijection
from ...context import each_entry, entries
from ...diagnostics.rounding import in_double
from ...measures import difference, same_bits
from ...numerics.verify import computed_otherwise
from ...state import State, batch_size, flat_size, leaves, map_state, sample, shape_of
from ..tolerances import EXACT
from ..trial import Trial
from .base import (
    FLOAT32_EVAL,
    SEVERAL,
    all_calls,
    both_ways,
    expect,
    has_exact_log_det,
    inverts_to_rounding,
    promised,
    same_numbers,
    same_states,
)

_LARGE = 2**16
"""The most numbers in a large batch, or in its Jacobians if these cost most."""


@promised(EXACT, needs={})
def input_untouched(trial: Trial) -> None:
    """A call does not write to the caller's tensors, not even the numbers that they hold."""
    for name, call, state in all_calls(trial):
        given = [*leaves(state), *entries(trial.context)]
        before = [(leaf.clone(), version(leaf)) for leaf in given]
        call(state, trial.context)
        for leaf, (values, count) in zip(given, before, strict=True):
            expect(same_bits(leaf, values), f"{name} not to change its input; it did, by {difference(leaf, values)}")
            expect(version(leaf) == count, f"{name} not to write to its input in place")


@promised(EXACT, with_grad=True)
def module_untouched(trial: Trial) -> None:
    """In eval mode a call changes no weight, no buffer, no mode and no random number generator."""
    bijection = trial.bijection
    for name, call, state in all_calls(trial):
        before = {key: value.clone() for key, value in bijection.state_dict().items()}
        modes, generators = _modes(bijection), _generators()
        call(state, trial.context)
        after = bijection.state_dict()
        expect(list(after) == list(before), f"{name} to keep the state_dict's keys {list(before)}, got {list(after)}")
        moved = [key for key, value in after.items() if not same_bits(value, before[key])]
        expect(not moved, f"{name} to keep weights and buffers; it changed {moved}")
        expect(_modes(bijection) == modes, f"{name} to keep train and eval mode")
        expect(_generators() == generators, f"{name} to draw no random numbers in eval mode")


def _modes(module: torch.nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state())


@promised(EXACT, needs={}, trials=3)
def global_state_untouched(trial: Trial) -> None:
    """A call leaves PyTorch's settings alone: default dtype and device, gradient mode, autocast, threads, precision."""
    for name, call, state in all_calls(trial):
        before = _global_state()
        call(state, trial.context)
        after = _global_state()
        changed = [f"{what} {was}, got {after[what]}" for what, was in before.items() if after[what] != was]
        expect(not changed, f"{name} to keep the {'; '.join(changed)}")


def _global_state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "number of threads": torch.get_num_threads(),
        "precision of products": [*map(float32_precisions, ("cuda", "mkldnn"))],
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


@promised(EXACT, trials=2)
def memory_released(trial: Trial) -> None:
    """A call keeps no tensor that it was given or made, with gradients or without."""
    for name, call, state in all_calls(trial):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                call(state, trial.context)  # makes what is made only once
                with _Made() as made:
                    # Clones that nobody else holds: they can go when the call is over.
                    call(map_state(torch.clone, state), each_entry(torch.clone, trial.context))
            if made.alive():
                gc.collect()  # a cycle is no leak
            expect(not made.alive(), f"{name} to keep none of its tensors; it kept {made.alive()}")


class _Made(DispatchMode):  # type: ignore[no-untyped-call]
    """Watches the memory of every tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: list[StorageWeakRef] = []

    def alive(self) -> int:
        return sum(not storage.expired() for storage in self._storages)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {_storage(one) for one in args if isinstance(one, Tensor)}  # views share theirs with a weight, perhaps
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor) and _storage(one) not in given:
                self._storages.append(StorageWeakRef(one.untyped_storage()))  # type: ignore[no-untyped-call]
        return made


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@promised(same_states, inverts_to_rounding, has_exact_log_det, needs={}, trials=3)
def gradient_modes(trial: Trial) -> float:
    """With gradients enabled, and for inputs that require them, each call returns the numbers of no_grad."""
    expected = _in_mode(trial, torch.no_grad)
    found: list[tuple[State, State]] = []
    for mode, requires_grad in ((torch.no_grad, True), (torch.enable_grad, False), (torch.enable_grad, True)):
        found += zip(expected, _in_mode(trial, mode, requires_grad=requires_grad), strict=True)
    return same_numbers(trial, found)


def _in_mode(trial: Trial, mode: Callable[[], Any], *, requires_grad: bool = False) -> list[State]:
    """What a copy returns from each call, with the same random numbers; without a graph if the mode records none."""
    bijection, found = copy.deepcopy(trial.bijection), []
    for name, call, state in all_calls(trial, bijection):
        torch.manual_seed(trial.setting.seed)
        with mode():
            given = map_state(lambda leaf: leaf.clone().requires_grad_(requires_grad), state)
            result = call(given, trial.context)
            if not torch.is_grad_enabled():
                held = {_storage(leaf) for leaf in leaves(given)}  # the input itself and views of it require one
                free = all(not leaf.requires_grad or _storage(leaf) in held for leaf in leaves(result))
                expect(free, f"{name} to return tensors that require no gradient under {mode.__name__}")
        found += [map_state(torch.Tensor.detach, one) for one in result]
    return found


@promised(EXACT)
def determinism(trial: Trial) -> None:
    """The same call returns the same bits twice."""
    for name, call, state in all_calls(trial):
        first, second = call(state, trial.context), call(state, trial.context)
        expect(same_bits(first, second), f"{name} to return the same bits twice")


@promised(EXACT, needs=SEVERAL, kinds=("normal", "huge"))
def no_memory(trial: Trial) -> None:
    """What a call returns does not depend on earlier calls."""
    for name, call, state in all_calls(trial):
        first = call(state, trial.context)
        for _, other, given in both_ways(trial):
            other(sample(given, 0), sample(trial.context, 0))
            other(*(_reversed(one) for one in (given, trial.context)))
        expect(same_bits(first, call(state, trial.context)), f"{name} to return the same bits after other calls")


def _reversed(state: Any) -> Any:
    return None if state is None else map_state(lambda leaf: leaf.flip(0), state)


@promised(same_states, inverts_to_rounding, needs=SEVERAL)
def batch_independence(trial: Trial) -> float:
    """In eval mode a sample's result does not depend on the rest of the batch."""
    found = []
    for _, call, state in all_calls(trial):
        together = call(state, trial.context)
        for i in range(batch_size(state)):
            alone = call(sample(state, i), sample(trial.context, i))
            found += [(sample(a, i), b) for a, b in zip(together, alone, strict=True)]
    return same_numbers(trial, found)


@promised(same_states, inverts_to_rounding, needs={"training": False, "batch": 5}, trials=2)
def large_batch(trial: Trial) -> float:
    """In eval mode a sample's result is the same in a batch of hundreds."""
    size = flat_size(trial.shape) ** (1 if trial.bijection.cheap_inverse else 2)
    times = max(16, min(205, _LARGE // size))  # five samples: no power of two is a multiple

    def repeated(state: Any) -> Any:
        return None if state is None else map_state(lambda leaf: torch.cat([leaf] * times), state)

    found: list[tuple[State, State]] = []
    for _, call, state in all_calls(trial):
        few, many = call(state, trial.context), call(repeated(state), repeated(trial.context))
        found += [(repeated(a), b) for a, b in zip(few, many, strict=True)]
    return same_numbers(trial, found)


@promised(EXACT, needs={"training": False, "batch": 0}, kinds=("normal",), trials=2)
def empty_batch(trial: Trial) -> None:
    """An empty batch comes back as an empty batch, in the usual shapes."""
    outgoing = trial.bijection.output_shape(trial.shape)
    for (name, call, state), shape in zip(all_calls(trial), (outgoing, trial.shape) * 2, strict=False):
        result = call(state, trial.context)[0]
        expect(batch_size(result) == 0, f"{name} to return no samples, got {batch_size(result)}")
        expect(shape_of(result) == shape, f"{name}: shape {shape}, got {shape_of(result)}")


@promised(same_states, inverts_to_rounding, lambda bijection: not bijection.numerics.on_grid, needs=SEVERAL)
def nan_contained(trial: Trial) -> float:
    """A NaN in one sample reaches no other sample."""
    found = []
    for _, call, state in all_calls(trial):
        spoilt = map_state(lambda leaf: leaf.clone().index_fill(0, torch.tensor([1]), float("nan")), state)
        for clean, other in zip(call(state, trial.context), call(spoilt, trial.context), strict=True):
            found += [(sample(clean, i), sample(other, i)) for i in (0, 2)]
    return same_numbers(trial, found)


@promised(same_states, inverts_to_rounding)
def memory_layout(trial: Trial) -> float:
    """Strided, expanded and channels-last inputs give the same results as contiguous ones."""
    found = []
    for _, call, state in all_calls(trial):
        plain = map_state(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state)
        found += list(zip(call(state, trial.context), call(plain, trial.context), strict=True))
    return same_numbers(trial, found)


@promised(EXACT, needs={})
def dtype_kept(trial: Trial) -> None:
    """The output has the dtype and the device of the input, and finite inputs give finite outputs."""
    like = next(leaves(trial.x))
    for name, call, state in all_calls(trial):
        for leaf in leaves(call(state, trial.context)[0]):
            expect(leaf.dtype == like.dtype, f"{name}: {like.dtype}, got {leaf.dtype}")
            expect(leaf.device == like.device, f"{name}: device {like.device}, got {leaf.device}")
            expect(bool(leaf.isfinite().all()), f"{name}: finite numbers, got infinite ones or NaN")


def _is_exact(bijection: Bijection) -> bool:
    """Whether its states are exact on a grid between the layers too, and not only where data enter."""
    return bijection.exactness == "exact" and not bijection.numerics.about_data


@promised(EXACT, _is_exact, needs=FLOAT32_EVAL)
def order_free(trial: Trial) -> None:
    """Any split, order and layout of the batch, 1 or 2 threads, oneDNN or not, float32 or float64: the same bits."""
    double, _, context = in_double(trial.bijection, trial.x, trial.context)
    for (name, call, state), (_, other, _) in zip(all_calls(trial), all_calls(trial, double), strict=True):
        expected = call(state, trial.context)
        for way, found in computed_otherwise(call, state, trial.context):
            expect(same_bits(expected, found), f"{name} to return the same bits computed otherwise: {way}")
        wide = other(map_state(torch.Tensor.double, state), context)
        narrow = map_state(lambda leaf: leaf.to(torch.float32), wide)
        same = same_bits(wide, map_state(torch.Tensor.double, expected)) and same_bits(narrow, expected)
        expect(same, f"{name} to return the same bits computed otherwise: in float64")
