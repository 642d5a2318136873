"""What PyTorch does with modules: copies, pickles, state_dicts, the meta device, vmap, autocast, the compiler."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import pickle
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..._torch import untraced
from ...bijection import Bijection
from ...bijections import Residual
from ...context import Context, each_entry
from ...diagnostics.rounding import condition_number, in_double
from ...diagnostics.roundtrip import in_dtype
from ...errors import InvflowError
from ...measures import difference, magnitude, same_bits
from ...state import flatten, leaves, map_state, shape_of, unflatten
from ..tolerances import AUTOCAST_ROUNDINGS, EXACT, HALF_ROUNDINGS, LARGEST_IN_HALF, SAME_ROUNDINGS, eps
from ..trial import Trial, layer_count, perturb
from .base import (
    EVAL,
    FLOAT32_EVAL,
    SEVERAL,
    all_calls,
    both_ways,
    differentiated,
    expect,
    inverts_to_rounding,
    lost,
    promised,
    roundings,
    same_numbers,
    same_states,
)
from .mathematics import sample_jacobians

_DECAY = 0.9
"""The rate of averages. The rounding of its float32 turns 3, averaged with 3, to 2."""


def _results(trial: Trial, bijection: Bijection | None = None) -> tuple[Any, ...]:
    """What a bijection, by default the trial's, returns for the states of the trial, both ways."""
    return tuple(call(state, trial.context) for _, call, state in both_ways(trial, bijection))


@promised(EXACT, trials=2)
def deepcopies(trial: Trial) -> None:
    """A deep copy returns the same bits and shares no weight with the original."""
    other = copy.deepcopy(trial.bijection)
    before = _results(trial)
    expect(same_bits(before, _results(trial, other)), "a copy to return the same bits")
    perturb(other, seed=1)
    expect(same_bits(before, _results(trial)), "a copy to have weights of its own")


@promised(EXACT, trials=2)
def pickles(trial: Trial) -> None:
    """An unpickled module returns the same bits."""
    other = pickle.loads(pickle.dumps(trial.bijection))
    expect(same_bits(_results(trial), _results(trial, other)), "an unpickled module to return the same bits")


@promised(EXACT, trials=2)
def state_dict(trial: Trial) -> None:
    """A copy with other weights has the same state_dict keys, and returns the same bits after loading this one's."""
    other = copy.deepcopy(trial.bijection)
    perturb(other, seed=1)
    expect(list(other.state_dict()) == list(trial.bijection.state_dict()), "the same keys in a copy's state_dict")
    other.load_state_dict({key: value.clone() for key, value in trial.bijection.state_dict().items()})
    expect(same_bits(_results(trial), _results(trial, other)), "the same bits after loading the state_dict")


@promised(EXACT, kinds=("normal",), trials=2, with_grad=True)
def meta_device(trial: Trial) -> None:
    """On the meta device every call returns meta tensors of the right shapes, so shapes cost no memory."""
    meta = copy.deepcopy(trial.bijection).to("meta")
    context = each_entry(lambda entry: entry.to("meta"), trial.context)
    for (name, call, state), (_, on_meta, _) in zip(both_ways(trial), both_ways(trial, meta), strict=True):
        expected = call(state, trial.context)
        found = on_meta(map_state(lambda leaf: leaf.to("meta"), state), context)
        expect(shape_of(found[0]) == shape_of(expected[0]), f"{name}: the same shapes as on the real device")
        devices = {leaf.device.type for leaf in leaves(found)}
        expect(devices == {"meta"}, f"{name}: meta tensors, got some on {sorted(devices)}")


@promised(same_states, kinds=("normal",), trials=2)
def handling(trial: Trial) -> float:
    """Averages of equal models, casts to and fro and copies by way of the meta device return the same numbers."""
    bijection = trial.bijection
    begun = _Averaged(bijection, use_buffers=False) if bijection.awaits_data else None
    expected = _results(trial)
    averaged = bijection
    for use_buffers in (False, True):
        averaged = _Averaged(averaged, use_buffers=use_buffers).update()
    found = list(zip(_results(trial, averaged), expected, strict=True))
    weights = {key: value.clone() for key, value in bijection.state_dict().items()}
    nowhere = copy.deepcopy(bijection).to("meta")
    emptied = copy.deepcopy(nowhere).to_empty(device="cpu")
    for how, other, assign in (("assign=True", nowhere, True), ("to_empty", emptied, False)):
        other.load_state_dict(weights, assign=assign)
        other.type(torch.float64).to(trial.setting.dtype)
        same = same_bits(_results(trial, other), expected)
        expect(same, f"the same bits after loading on the meta device, by {how}, and a cast to float64 and back")
    if begun is not None:
        bijection.initialize(trial.x, trial.context)
        average = begun.update()
        with contextlib.suppress(InvflowError):  # refused
            right = same_bits(_results(trial, average), _results(trial))
            expect(right, "an average that began before initialize to be refused")
    return same_numbers(trial, found)


class _Averaged:
    """An exponential average of a bijection, begun with two equal ones."""

    def __init__(self, bijection: Bijection, *, use_buffers: bool) -> None:
        self.models = nn.ModuleList([bijection, nn.Linear(1, 1)])  # PyTorch averages nothing without a weight
        rule: Any = get_ema_multi_avg_fn(_DECAY)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(self.models, multi_avg_fn=rule, use_buffers=use_buffers)
        self.update()
        self.update()

    def update(self) -> Bijection:
        """The average with the bijection as it is now."""
        self.average.update_parameters(self.models)
        return next(part for part in self.average.modules() if isinstance(part, Bijection))


@differentiated(roundings(SAME_ROUNDINGS), kinds=("normal",), trials=2, dense=True)
def vmap(trial: Trial) -> float:
    """torch.func.vmap over jacrev returns the Jacobian of each sample."""

    def one(flat: Tensor, context: Context) -> Tensor:
        given = each_entry(lambda entry: entry[None], context)
        return flatten(trial.bijection(unflatten(flat[None], trial.shape), given))[0]

    in_dims = (0, None if trial.context is None else 0)
    found = torch.func.vmap(torch.func.jacrev(one), in_dims=in_dims)(flatten(trial.x), trial.context).detach()
    expected = sample_jacobians(trial)
    worst = float(((found - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2)).clamp(min=1)).max())
    if not worst > roundings(SAME_ROUNDINGS)(trial):
        return worst
    return worst / condition_number(trial.bijection, trial.x, trial.context)


def _autocast_tolerance(trial: Trial) -> float:
    if trial.is_exact and not trial.snaps:
        return EXACT
    # bfloat16 may exceed half a step of the data's grid.
    return trial.bijection.numerics.step + AUTOCAST_ROUNDINGS * layer_count(trial.bijection) * eps(torch.bfloat16)


@promised(_autocast_tolerance, inverts_to_rounding, needs=FLOAT32_EVAL, kinds=("normal", "tiny", "zeros"), trials=4)
def autocast(trial: Trial) -> float:
    """Under autocast the state and the log-determinant stay in the input's dtype, and the round trip holds."""
    (_, forward, _), (_, inverse, _) = both_ways(trial)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, *log_dets = forward(trial.x, trial.context)
        x, *back = inverse(y, trial.context)
    for what, found in (("y", y), ("x", x), ("log-determinants", (*log_dets, *back))):
        for leaf in leaves(found):
            expect(leaf.dtype == torch.float32, f"{what} in torch.float32 under autocast, got {leaf.dtype}")
    return lost(trial, y, x, _autocast_tolerance(trial))


def _half_tolerance(trial: Trial) -> float:
    return HALF_ROUNDINGS * layer_count(trial.bijection)


def _works_in_half(bijection: Bijection) -> bool:
    """Whether it does not round to a grid, and does not iterate, which half precision makes slow."""
    iterates = any(isinstance(part, Residual) for part in bijection.modules())
    return not bijection.numerics.step and not iterates


@promised(_half_tolerance, inverts_to_rounding, _works_in_half, needs=EVAL, kinds=("normal", "tiny", "zeros"), trials=4)
def half_precision(trial: Trial) -> float:
    """In float16 and bfloat16 each call returns what it does in float64, but for roundings, or it raises."""
    ratios = [0.0]
    for dtype in (torch.float16, torch.bfloat16):
        half, x, context = in_dtype(trial.bijection, trial.x, trial.context, dtype)
        _, y, _ = in_dtype(trial.bijection, trial.image, None, dtype)
        narrow = dataclasses.replace(trial, x=x, y=y)
        wide, _, given = in_double(half, x, context)
        shake = functools.partial(_shaken, step=eps(dtype), generator=torch.Generator().manual_seed(0))
        shaken, other_context = copy.deepcopy(wide), each_entry(shake, given)
        for weight in shaken.parameters():
            weight.data = shake(weight.data)
        three = (all_calls(narrow, bijection) for bijection in (half, wide, shaken))
        for (_, call, state), (_, exact, _), (_, other, _) in zip(*three, strict=True):
            try:
                found = call(state, context)
            except Exception:  # it refuses the dtype
                continue
            double = map_state(torch.Tensor.double, state)
            expected, nearby = exact(double, given), other(map_state(shake, double), other_context)
            # The log-determinant jumps at a kink, and a rounding takes small numbers across it.
            compared = len(found) if trial.setting.kind == "normal" else 1
            for made, right, near in [*zip(found, expected, nearby, strict=True)][:compared]:
                if magnitude(right) < LARGEST_IN_HALF:
                    unit = max(eps(dtype) * magnitude(double, right), difference(right, near))
                    ratios.append(difference(right, made) / unit)
    return float(torch.tensor(ratios).max())


def _shaken(values: Tensor, step: float, generator: torch.Generator) -> Tensor:
    """The values, each off by a step of its own magnitude."""
    return values * (1 + step * (2 * torch.randint(2, values.shape, generator=generator) - 1))


@promised(same_states, attrgetter("traceable"), needs={**SEVERAL, "layout": "contiguous"}, trials=1)
def compiles(trial: Trial) -> float:
    """torch.compile(fullgraph=True) traces each direction into one graph that returns the same numbers."""
    found = []
    for _, call, state in both_ways(trial):
        torch.compiler.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        with untraced():
            found += list(zip(compiled(state, trial.context), call(state, trial.context), strict=True))
    torch.compiler.reset()
    return same_numbers(trial, found)
