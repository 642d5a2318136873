"""What bijections promise that are exact on a grid."""

from __future__ import annotations

import copy
import dataclasses

import torch

from ...bijection import Bijection
from ...measures import same_bits
from ...numerics.verify import computed_otherwise
from ...state import map_state
from ..tolerances import EXACT
from ..trial import Trial
from .base import all_calls, expect, promised

UNEVEN = {"training": False, "dtype": torch.float32}


def _has_to_be(bijection: Bijection) -> bool:
    return bijection.exactness == "exact" and not bijection.numerics.about_data


@promised(EXACT, needs=UNEVEN, about=_has_to_be)
def order_free(trial: Trial) -> float:
    """Any split, order and layout of the batch, 1 or 2 threads, oneDNN or not, float32 or float64: the same bits."""
    double = copy.deepcopy(trial.bijection).double()
    in_double = None if trial.context is None else trial.context.double()
    with torch.no_grad():
        # The calls of the copy are wanted, not its states.
        others = all_calls(dataclasses.replace(trial, bijection=double, y=trial.image))
        for (name, call, state), (_, other, _) in zip(all_calls(trial), others, strict=True):
            expected = call(state, trial.context)
            for way, found in computed_otherwise(call, state, trial.context):
                expect(same_bits(expected, found), f"{name} to return the same bits computed otherwise: {way}")
            wide = other(map_state(torch.Tensor.double, state), in_double)
            narrow = map_state(lambda leaf: leaf.to(torch.float32), wide)
            same = same_bits(wide, map_state(torch.Tensor.double, expected)) and same_bits(narrow, expected)
            expect(same, f"{name} to return the same bits computed otherwise: in float64")
    return 0.0
