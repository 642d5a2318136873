"""What PyTorch does with modules: copies, pickles, state_dicts, the meta device, the compiler, autocast."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch

from ..._torch import untraced
from ...measures import difference, same_bits
from ...state import leaves, map_state, shape_of
from ..tolerances import AUTOCAST_ROUNDINGS, EXACT, eps
from ..trial import Trial, layer_count, perturb
from .base import all_there_is, both_ways, expect, promised, same_states
from .conduct import same_numbers, seen_through
from .inversion import relative

ONCE = 2
FLOAT32_EVAL = {"training": False, "dtype": torch.float32}


@promised(EXACT, trials=ONCE)
def pickles(trial: Trial) -> float:
    """What comes out of pickle gives the same bits."""
    other = pickle.loads(pickle.dumps(trial.bijection))
    expect(same(trial, other), "an unpickled module to give the same bits")
    return 0.0


@promised(EXACT, trials=ONCE)
def deepcopies(trial: Trial) -> float:
    """A deep copy gives the same bits and shares no weight with the original."""
    other = copy.deepcopy(trial.bijection)
    expect(same(trial, other), "a copy to give the same bits")
    before = seen_through(trial.bijection, trial)
    perturb(other, seed=1)
    after = seen_through(trial.bijection, trial)
    expect(same_bits(tuple(before), tuple(after)), "a copy's weights to be its own")
    return 0.0


@promised(EXACT, trials=ONCE)
def state_dict(trial: Trial) -> float:
    """A module with other weights that loads this one's state_dict gives the same bits, and the keys stay the same."""
    other = copy.deepcopy(trial.bijection)
    perturb(other, seed=1)
    expect(list(other.state_dict()) == list(trial.bijection.state_dict()), "the same keys in a copy's state_dict")
    other.load_state_dict({key: value.clone() for key, value in trial.bijection.state_dict().items()})
    expect(same(trial, other), "the same bits after loading the state_dict")
    return 0.0


def same(trial: Trial, other: Any) -> bool:
    """Whether another instance returns the same bits as the trial's."""
    return same_bits(tuple(seen_through(trial.bijection, trial)), tuple(seen_through(other, trial)))


@promised(EXACT, kinds=("normal",), trials=ONCE)
def meta_device(trial: Trial) -> float:
    """On the meta device every call gives meta tensors of the right shapes, so that shapes cost no memory."""
    meta = copy.deepcopy(trial.bijection).to("meta")
    context = None if trial.context is None else trial.context.to("meta")
    for (name, call, state), on_meta in zip(both_ways(trial), all_there_is(meta).values(), strict=True):
        expected = call(state, trial.context)
        found = on_meta(map_state(lambda leaf: leaf.to("meta"), state), context)
        expect(shape_of(found[0]) == shape_of(expected[0]), f"{name}: the shapes of the real device")
        devices = {leaf.device.type for leaf in leaves(found)}
        expect(devices == {"meta"}, f"{name}: meta tensors, got some on {sorted(devices)}")
    return 0.0


@promised(same_states, needs={"training": False, "batch": 3, "layout": "contiguous"}, trials=1)
def compiles(trial: Trial) -> float:
    """torch.compile(fullgraph=True) traces both directions into one graph that gives the same numbers."""
    found = []
    for _, call, state in both_ways(trial):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        with torch.no_grad(), untraced():
            found += list(zip(compiled(state, trial.context), call(state, trial.context), strict=True))
    torch.compiler.reset()
    return same_numbers(trial, found, same_states(trial))


def _autocast_tolerance(trial: Trial) -> float:
    if trial.is_exact and not trial.snaps:
        return EXACT
    # bfloat16 may go beyond half a step of the data's grid.
    return trial.step + AUTOCAST_ROUNDINGS * layer_count(trial.bijection) * eps(torch.bfloat16)


@promised(_autocast_tolerance, needs=FLOAT32_EVAL, kinds=("normal", "tiny", "zeros"), trials=4)
def autocast(trial: Trial) -> float:
    """Under autocast the state and the log-determinant stay in the input's dtype, and the round trip holds."""
    bijection = trial.bijection
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        forward, inverse = all_there_is(bijection).values()
        y, *log_dets = forward(trial.x, trial.context)
        x, *back = inverse(y, trial.context)
    for what, leaf in [*(("y", leaf) for leaf in leaves(y)), *(("x", leaf) for leaf in leaves(x))]:
        expect(leaf.dtype == torch.float32, f"{what} in torch.float32 under autocast, got {leaf.dtype}")
    for found in (*log_dets, *back):
        expect(found.dtype == torch.float32, f"log-determinants in torch.float32 under autocast, got {found.dtype}")
    return relative(trial, difference(trial.x, x), [trial.x, y], _autocast_tolerance(trial))
