"""Stretches equal those of the dense Jacobian, and stay within their bounds."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import assume, given, settings

import invflow
from invflow import InvflowError
from invflow.bijections import AdditiveCoupling, Affine, Linear1x1, Psi
from invflow.diagnostics import conditioning as diagnostics
from invflow.diagnostics.conditioning import conditioning, linearized, singular_values
from invflow.measures import jacobian, with_context
from invflow.state import flatten, map_state, sample
from invflow.testing import Setting, cases
from invflow.testing.trial import Subject

TAGS = sorted(invflow.registered())

ITERATED = 1e-6
"""Relative error of an iterated singular value: the square of its last residual, over the gap to the next value."""

NEIGHBOURS = 0.1
"""The error that is allowed for a value beside others, as a part of the range of all of them."""

ROUNDING = 1e-9
"""Error of the singular values of a few dozen numbers in float64, with a condition number of at most 1e4."""


def one_sample(case, seed):
    """The layer of a case with changed weights, in float64 and eval mode, and one input."""
    trial = Subject(case.bijection(), case.shape, case.context_shape).trial(Setting(batch=1, weights=seed, seed=seed))
    return trial.bijection, sample(trial.x, 0), sample(trial.context, 0)


@pytest.mark.parametrize("tag", TAGS)
def test_no_layer_exceeds_its_bounds(tag):
    @given(case=cases(tag))
    def holds(case):
        for seed in range(3):
            layer, x, context = one_sample(case, seed)
            forward, inverse = layer.lipschitz_bounds()
            values = torch.linalg.svdvals(jacobian(with_context(layer, context), x))
            assert values[0] <= forward * (1 + diagnostics.SLACK)
            assert 1 / values[-1] <= inverse * (1 + diagnostics.SLACK)

    holds()


@pytest.mark.parametrize("tag", TAGS)
def test_iterated_singular_values_are_those_of_the_dense_jacobian(tag):
    @settings(max_examples=8)  # an iteration through an iterative inverse is slow
    @given(case=cases(tag))
    def agree(case):
        assume("tolerance" not in json.dumps(case.layers))  # with a tolerance, the inverse is not the exact one
        layer, x, context = one_sample(case, 1)
        if not layer.invertible:
            with pytest.raises(InvflowError, match="joint has no inverse, which the smallest singular value"):
                singular_values(layer, x, context, dense=0)
            return
        dense = singular_values(layer, x, context)
        iterated = singular_values(layer, x, context, dense=0)
        assert iterated.all is None
        # Of values that hardly differ, as those of a flow that hardly moves, the iteration ends between the last ones.
        allowed = {"rel": ITERATED, "abs": NEIGHBOURS * (dense.largest - dense.smallest)}
        assert iterated.largest == pytest.approx(dense.largest, **allowed)
        assert iterated.smallest == pytest.approx(dense.smallest, **allowed)

    agree()


@pytest.mark.parametrize("tag", TAGS)
def test_products_with_the_jacobian_and_its_transpose(tag):
    @given(case=cases(tag))
    def agree(case):
        layer, x, context = one_sample(case, 2)
        dense = jacobian(with_context(layer, context), x)
        apply, transpose = linearized(lambda state: layer(state, context), x)
        w, v = (torch.randn(size, dtype=torch.float64) for size in dense.shape)  # injections have more outputs
        torch.testing.assert_close(apply(v), dense @ v, rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(transpose(w), dense.T @ w, rtol=ROUNDING, atol=ROUNDING)

    agree()


def test_known_constants():
    """A diagonal map stretches by its entries; psi and a permutation by 1; a shear by the golden ratio."""
    scale = Affine(shape=(3,)).double()
    with torch.no_grad():
        scale.log_scale.copy_(torch.tensor([4.0, 1.0, 0.5]).log())
    assert scale.lipschitz_bounds() == pytest.approx((4.0, 2.0))
    assert invflow.Inverse(scale).lipschitz_bounds() == pytest.approx((2.0, 4.0))
    found = singular_values(scale, torch.zeros(1, 3).double())
    assert (found.largest, found.smallest, found.condition_number) == pytest.approx((4.0, 0.5, 8.0))
    assert invflow.Sequential(scale, scale).lipschitz_bounds() == pytest.approx((16.0, 4.0))
    assert Psi(2).lipschitz_bounds() == (1.0, 1.0)
    assert Linear1x1(shape=(5,)).lipschitz_bounds() == pytest.approx((1.0, 1.0), rel=1e-5)  # starts as a rotation

    class Halving(torch.nn.Module):
        def forward(self, x):
            return 0.5 * x

        def lipschitz_bound(self):
            return 0.5

    coupling = AdditiveCoupling(Halving())
    pair = (torch.zeros(1, 2).double(), torch.zeros(1, 2).double())
    bound = (0.5 + math.sqrt(0.25 + 4)) / 2  # the bound is reached: the larger root of t^2 = 0.5 t + 1
    assert coupling.lipschitz_bounds() == pytest.approx((bound, bound))
    assert singular_values(coupling, pair).largest == pytest.approx(bound)
    assert AdditiveCoupling(torch.nn.Linear(2, 2)).lipschitz_bounds() == (math.inf, math.inf)


def ill_conditioned(size, times):
    """``times`` linear maps across ``size`` channels whose product has condition number 10^times."""
    chain = invflow.build({"input": {"shape": [size]}, "layers": [{"type": "linear_1x1"}, {"type": "affine"}] * times})
    with torch.no_grad():
        for layer in chain:
            if isinstance(layer, Affine):
                layer.log_scale.copy_(torch.linspace(-0.5, 0.5, size) * math.log(10))
            else:
                layer.lower.zero_()
                layer.upper.zero_()
                layer.order.copy_(torch.arange(size))
                layer.sign.fill_(1.0)
                layer.log_diagonal.zero_()
    return chain


@pytest.mark.parametrize("dense", [0, diagnostics.DENSE])
def test_the_condition_number_of_a_chain(monkeypatch, dense):
    monkeypatch.setattr(diagnostics, "DENSE", dense)
    found = conditioning(ill_conditioned(4, 3))
    assert found.exact == (dense > 0)
    assert found.condition_number == pytest.approx(1e3, rel=1e-5)  # weights in float32
    assert found.chain.lipschitz == pytest.approx(10**1.5, rel=1e-5)
    assert found.chain.lipschitz_bound == pytest.approx(10**1.5, rel=1e-5)
    assert found.predicted_error["float64"] == pytest.approx(1e3 * 2**-52, rel=1e-5)
    assert found.ok


def test_the_prediction_bounds_the_round_trip():
    """Through 12 ill-conditioned layers the round trip loses digits, but no more than the condition number predicts."""
    torch.manual_seed(0)
    chain = invflow.build({"input": {"shape": [6]}, "layers": [{"type": "linear_1x1"}, {"type": "affine"}] * 6})
    with torch.no_grad():
        for layer in chain:
            if isinstance(layer, Affine):
                layer.log_scale.copy_(torch.linspace(-1, 1, 6))
    found = conditioning(chain)
    assert found.condition_number > 1e2
    for dtype, predicted in found.predicted_error.items():
        eps = torch.finfo(getattr(torch, dtype)).eps
        assert eps < found.round_trip_error[dtype] <= predicted
    assert [layer.lipschitz for layer in found.layers[1::2]] == pytest.approx([math.e] * 6, rel=1e-5)


def test_a_broken_bound_is_found(monkeypatch):
    chain = ill_conditioned(4, 1)
    monkeypatch.setattr(Affine, "lipschitz_bounds", lambda self: (1.0, 1.0))
    found = conditioning(chain)
    assert not found.ok
    assert [layer.bounds_hold for layer in found.layers] == [True, False]


def test_measuring_leaves_the_chain_alone():
    chain = invflow.build(
        {
            "input": {"shape": [2, 4, 4]},
            "layers": [
                {"type": "split"},
                {"type": "additive_coupling", "net": {"type": "conv", "hidden": [3], "norm": "batch"}},
            ],
        }
    )
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    conditioning(chain)
    assert chain.training
    assert all(torch.equal(before[name], value) for name, value in chain.state_dict().items())
    assert all(weight.grad is None for weight in chain.parameters())


def test_a_context_reaches_every_layer():
    net = {"type": "mlp", "hidden": [5], "activation": "tanh"}
    spec = {
        "input": {"shape": [6], "context_shape": [2]},
        "layers": [{"type": "split"}, {"type": "affine_coupling", "net": net}, {"type": "merge"}],
    }
    found = conditioning(invflow.build(spec))
    assert found.ok
    assert found.layers[1].lipschitz > 1


def test_a_state_of_one_number_and_a_tuple():
    pair = (torch.randn(1, 2, 2).double(), torch.randn(1, 3).double())
    layer = invflow.Sequential()
    assert flatten(map_state(torch.clone, pair)).shape == (1, 7)
    assert singular_values(layer, pair).condition_number == pytest.approx(1)
    assert singular_values(layer, pair, dense=0).condition_number == pytest.approx(1)
