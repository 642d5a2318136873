"""The checker finds every planted fault, by the property that it breaks, and flags no sound bijection."""

from __future__ import annotations

import os

import pytest
import torch

import invflow
from invflow.testing import check_bijection
from tests.testing.faults import FAULTS, healthy

SEEDS = 100 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1
SLOW = "compiles"


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name):
    cls, shape, context_shape, found_by = FAULTS[name]
    torch.manual_seed(0)  # a fault may hide by chance: some weights round as if they were on the grid
    with pytest.raises(AssertionError) as raised:
        check_bijection(cls(), shape, context_shape=context_shape, skip=[] if found_by == SLOW else [SLOW])
    assert found_by in [finding.name for finding in raised.value.report.failures], str(raised.value)
    assert f"{found_by}: " in str(raised.value)


def test_there_are_enough_faults():
    assert len(FAULTS) >= 25


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("name", healthy())
def test_sound_bijection_is_not_flagged(name, seed):
    bijection, shape, context_shape = healthy()[name]
    check_bijection(bijection, shape, context_shape=context_shape, seed=seed, skip=[SLOW])


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("tag", sorted(invflow.registered()))
def test_registered_bijection_is_not_flagged(tag, seed):
    fields, shape = invflow.registered()[tag].examples[seed % len(invflow.registered()[tag].examples)]
    layer = invflow.build({"input": {"shape": shape}, "layers": [{"type": tag, **fields}]})[0]
    check_bijection(layer, shape, seed=seed, skip=[SLOW])
