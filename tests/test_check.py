"""The check of a spec detects errors, NaN included."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import invflow
from invflow.bijections import AdditiveCoupling, Affine
from invflow.diagnostics.check import check
from invflow.diagnostics.roundtrip import errors_on_the_way_back, round_trip

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


@pytest.mark.parametrize("samples", [2, 5, 16])
def test_operations_bound_the_samples(chain, monkeypatch, samples):
    forward = 2 * (2 * 3 * 3)  # of one sample: two nets of one map
    monkeypatch.setattr("invflow.diagnostics.check.OPERATIONS", samples * 3 * forward)  # and two inverses
    found = check(chain)
    assert found.samples == samples
    assert found.ok


def test_a_check_leaves_its_chain_alone(chain):
    before = copy.deepcopy(chain.state_dict())
    check(chain)
    assert chain.training
    assert all(torch.equal(before[name], value) for name, value in chain.state_dict().items())


def test_dropout_drops_the_same_numbers_both_ways():
    stack = {"type": "stack", "parts": [{"type": "linear"}, {"type": "dropout", "probability": 0.5}]}
    chain = invflow.build({**PAIR, "layers": [{"type": "additive_coupling", "net": stack}] * 3})
    torch.manual_seed(0)
    x = (torch.randn(4, 3), torch.randn(4, 3))
    before = torch.get_rng_state()
    assert round_trip(chain.train(), x).relative <= 1e-6
    assert max(errors_on_the_way_back(chain, x)) <= 1e-6
    assert check(chain).ok
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(chain(x)[0], chain(x)[0])  # the hooks were the copy's


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_wrong_inverse_of_a_deep_chain_is_found(monkeypatch, factor):
    inverse = AdditiveCoupling.inverse

    def scaled(self, y, context=None):
        a, b = inverse(self, y, context)
        return a * factor, b

    monkeypatch.setattr(AdditiveCoupling, "inverse", scaled)
    assert check(invflow.build({**PAIR, "layers": [{"type": "repeat", "times": 25, "layers": PAIR["layers"]}]})).ok == (
        factor == 1
    )


class TestGrowth:
    """Roundings that a chain makes larger are told from a wrong inverse: they are smaller in float64."""

    def chain(self):
        """Six layers, each of which loses two digits beside its shift on the way back."""
        chain = invflow.build({"input": {"shape": [4]}, "layers": [{"type": "affine"}] * 6})
        with torch.no_grad():
            for layer in chain:
                layer.log_scale.fill_(-3.0)
                layer.shift.fill_(1.0)
        return chain

    def test_it_is_told_and_is_no_failure(self):
        report = check(self.chain())
        assert report.round_trip_error["float32 train"] > 1e-3
        assert report.ok
        assert report.growth.keys() == {"eval", "train"}
        assert report.growth["train"] > math.exp(15)

    def test_a_wrong_inverse_does_not_hide_behind_it(self, monkeypatch):
        inverse = Affine.inverse
        monkeypatch.setattr(Affine, "inverse", lambda self, y, context=None: inverse(self, y, context) + 3e-4)
        report = check(self.chain())
        assert not report.ok

    def test_one_layer_alone_must_be_right(self):
        chain = invflow.build({"input": {"shape": [4]}, "layers": [{"type": "affine"}]})
        with torch.no_grad():
            chain[0].log_scale.fill_(-12.0)
            chain[0].shift.fill_(1.0)
        assert not check(chain).ok

    @pytest.mark.parametrize("error", [1e-3, 1e-6, 1e-9])
    def test_a_wrong_inverse_is_one(self, monkeypatch, error):
        inverse = AdditiveCoupling.inverse

        def off(self, y, context=None):
            a, b = inverse(self, y, context)
            return a + error, b

        monkeypatch.setattr(AdditiveCoupling, "inverse", off)
        report = check(invflow.build(PAIR))
        assert not report.ok
        assert not report.growth
