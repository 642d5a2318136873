"""Glow as a document: its length, its published size, its round trip, its gradients and its memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import invflow
from invflow.bijections import ActNorm, FactorOut
from invflow.diagnostics.memory import activation_memory
from invflow.measures import difference, magnitude
from invflow.state import flatten, map_state, shape_of

PATH = Path(__file__).parent.parent / "specs" / "published" / "glow_cifar10.json"

OFFICIAL = 44_603_604
ZEROS_CONVOLVED = 96 * 96 * 9
TOP_PRIOR = 96 * 9 + 96 + 96
"""The weights of the mark, the biases and the scales of the learned top prior, where this document has a normal one."""

NOISE = 0.02
"""Added to every weight: those that start at zero then make scales from 0.8 to 1."""

ROUND_TRIP = 1e-12
"""In units of the largest number met on the way."""


def glow(steps, width=16, size=16, **options):
    """The document with fewer steps and channels, on smaller images."""
    text = PATH.read_text().replace('"times": 32', f'"times": {steps}').replace("512", str(width))
    return {**json.loads(text), "input": {"shape": [3, size, size]}, **options}


def trained(spec):
    """The chain as a training leaves it: initialised from data, no weight at its start."""
    torch.manual_seed(0)
    chain = invflow.build(spec).double()
    chain.initialize(torch.rand(20, *chain.declared_shape, dtype=torch.float64))
    with torch.no_grad():
        for weight in chain.parameters():
            weight.add_(NOISE * torch.randn_like(weight))
    return chain


def test_the_document_is_short():
    assert len(PATH.read_text().splitlines()) <= 40


def test_it_has_the_parameters_of_the_official_code():
    with torch.device("meta"):
        model = invflow.build_model(PATH)
    assert sum(weight.numel() for weight in model.parameters()) == OFFICIAL - ZEROS_CONVOLVED - TOP_PRIOR
    assert shape_of(model.bijection(torch.zeros(1, 3, 32, 32, device="meta"))) == ((6, 16, 16), (12, 8, 8), (48, 4, 4))


@pytest.mark.parametrize("training", [False, True])
def test_the_round_trip_both_ways(training):
    chain = trained(glow(steps=4)).train(training)
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        z, forward = chain.forward_and_log_det(x)
        back, backward = chain.inverse_and_log_det(z)
        assert difference(x, back) < ROUND_TRIP * magnitude(*chain.trace(x))
        torch.testing.assert_close(forward, -backward, rtol=ROUND_TRIP, atol=0)
        drawn = map_state(torch.randn_like, z)
        x = chain.inverse(drawn)
        assert difference(drawn, chain(x)) < ROUND_TRIP * magnitude(*chain.trace(x))


def test_every_actnorm_is_initialised_those_in_the_nets_too():
    chain = invflow.build(glow(steps=2))
    norms = [module for module in chain.modules() if isinstance(module, ActNorm)]
    assert len(norms) == 3 * 2 * 3
    chain.initialize(torch.rand(8, 3, 16, 16))
    assert not any(norm.awaits_data for norm in norms)


def test_reversible_gradients_are_the_stored_ones():
    stored, reversible = (trained(glow(steps=2, backprop=policy)) for policy in ("stored", "reversible"))
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    for chain in (stored, reversible):
        z, log_det = chain.forward_and_log_det(x)
        (flatten(z).square().sum() / 2 - log_det.sum()).backward()
    for a, b in zip(stored.parameters(), reversible.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9 * float(a.grad.abs().max()))


def test_the_memory_of_a_reversible_step_does_not_grow_with_the_steps():
    few, many = (
        activation_memory(invflow.build(glow(steps, width=4, backprop="reversible")), batch=2, log_det=True).kept
        for steps in (8, 32)
    )
    assert many["reversible"] <= 1.1 * few["reversible"]
    assert many["stored"] > 3 * few["stored"]


class TestFactorOut:
    def test_what_is_done_is_standardised_given_what_goes_on(self):
        """Under a standard normal prior it has the density of N(-t exp(-r), exp(-2 r))."""
        net = torch.nn.Linear(2, 4).double()
        layer = FactorOut(net=net)
        x = torch.randn(5, 4, dtype=torch.float64)
        (done, goes_on), log_det = layer.forward_and_log_det(x)
        assert torch.equal(goes_on, x[:, :2])
        raw, shift = net(goes_on).chunk(2, 1)
        conditional = torch.distributions.Normal(-shift * torch.exp(-raw), torch.exp(-raw))
        standard = torch.distributions.Normal(0.0, 1.0)
        found = standard.log_prob(done).sum(1) + log_det
        torch.testing.assert_close(found, conditional.log_prob(x[:, 2:]).sum(1), rtol=1e-12, atol=1e-12)

    def test_with_the_shift_first_the_net_gives_the_mean_itself(self):
        """Under a standard normal prior what is done has the density of N(-t, exp(-2 r)), as in Glow."""
        net = torch.nn.Linear(2, 4).double()
        layer = FactorOut(net=net, shift_first=True)
        x = torch.randn(5, 4, dtype=torch.float64)
        (done, goes_on), log_det = layer.forward_and_log_det(x)
        raw, shift = net(goes_on).chunk(2, 1)
        conditional = torch.distributions.Normal(-shift, torch.exp(-raw))
        found = torch.distributions.Normal(0.0, 1.0).log_prob(done).sum(1) + log_det
        torch.testing.assert_close(found, conditional.log_prob(x[:, 2:]).sum(1), rtol=1e-12, atol=1e-12)

    def test_a_shift_without_a_net_is_refused(self):
        with pytest.raises(invflow.InvflowError, match="factor_out has shift_first with a net only"):
            FactorOut(shift_first=True)

    @pytest.mark.parametrize("mode", ["grid", "exact"])
    def test_on_a_grid_the_numbers_stay_as_they_are(self, mode):
        spec = {
            "input": {"shape": [4, 3, 3]},
            "numerics": {"mode": mode, "frac_bits": 8},
            "layers": [{"type": "factor_out", "goes_on": "second", "net": {"type": "conv"}}],
        }
        chain = invflow.build(spec).eval()
        x = torch.randint(0, 256, (2, 4, 3, 3)) / 256
        done, goes_on = chain(x)
        assert chain.exactness == mode or chain.exactness == "exact"
        assert torch.equal(torch.cat([done, goes_on], 1), x)
        assert torch.equal(chain.inverse((done, goes_on)), x)

    def test_levels_are_a_repeat_of_on_and_factor_out(self):
        level = [{"type": "on", "layers": [{"type": "psi", "block_size": 2}]}, {"type": "factor_out"}]
        layers = [{"type": "repeat", "times": 3, "layers": level}]
        chain = invflow.build({"input": {"shape": [1, 8, 8]}, "layers": layers})
        x = torch.randn(2, 1, 8, 8)
        z = chain(x)
        assert shape_of(z) == ((2, 4, 4), (4, 2, 2), (8, 1, 1), (8, 1, 1))
        assert torch.equal(chain.inverse(z), x)

    @pytest.mark.parametrize(
        ("shape", "fields", "message"),
        [
            ([1, 4], {}, "factor_out expects at least 2 channels along dim 1 to make two parts of, got 1"),
            ([5], {"sizes": [2, 2]}, "factor_out with sizes [2, 2] expects 4 along dim 1, got 5"),
            ([[2], [[3], [4]]], {}, "factor_out expects one tensor, got a tuple state"),
        ],
    )
    def test_a_split_that_the_state_does_not_allow(self, shape, fields, message):
        with pytest.raises(invflow.SpecError) as caught:
            invflow.build({"input": {"shape": shape}, "layers": [{"type": "factor_out", **fields}]})
        assert str(caught.value).startswith(f"layers.0: {message}")

    def test_the_inverse_of_a_single_tensor_is_refused(self):
        with pytest.raises(
            invflow.ShapeError, match="the inverse of factor_out expects a tuple of at least two states"
        ):
            FactorOut().inverse(torch.zeros(2, 4))
