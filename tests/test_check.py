"""The check of a spec detects errors, NaN included."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow.bijections import AdditiveCoupling
from invflow.diagnostics.check import check
from invflow.diagnostics.roundtrip import round_trip

PAIR = {
    "input": {"shape": [[3], [3]]},
    "layers": [
        {"type": "additive_coupling", "net": {"type": "mlp"}},
        {"type": "additive_coupling", "net": {"type": "mlp"}},
    ],
}


@pytest.fixture
def chain():
    return invflow.build(PAIR)


def test_a_healthy_chain_is_ok(chain):
    report = check(chain)
    assert report.ok
    assert [layer.exactness for layer in report.layers] == ["float", "float"]
    assert all(error <= 1e-6 for name, error in report.round_trip_error.items() if name.startswith("float32"))


@pytest.mark.parametrize("half", [0, 1])
def test_not_a_number_is_not_lost(chain, monkeypatch, half):
    inverse = AdditiveCoupling.inverse

    def broken(self, y, context=None):
        x = list(inverse(self, y, context))
        x[half] = x[half] * float("nan")
        return tuple(x)

    monkeypatch.setattr(AdditiveCoupling, "inverse", broken)
    assert math.isnan(round_trip(chain, (torch.ones(2, 3), torch.ones(2, 3))).relative)
    assert not check(chain).ok


def test_a_large_state_is_checked_on_few_samples(monkeypatch):
    monkeypatch.setattr("invflow.diagnostics.check.LARGEST_BATCH", 20)
    drawn = []
    randint = torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda high, size, **options: drawn.append(size) or randint(high, size, **options)
    )
    check(invflow.build({"input": {"shape": [8]}, "layers": []}))
    assert drawn == [(2, 8)]
