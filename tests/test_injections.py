"""Injections: layers that add dimensions, what they promise and where they are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import invflow
from invflow import Flow, Inverse, Sequential, ShapeError, SpecError
from invflow.bijections import Affine, Each, On, Pad, Parallel, Psi
from invflow.diagnostics.check import check
from invflow.diagnostics.conditioning import conditioning
from invflow.models import StandardNormal
from invflow.testing import BijectionError, check_bijection, property_tests

from .authors import Doubling, spec_of

pytestmark = pytest.mark.usefixtures("forget_what_a_test_registers")


class TestInjections:
    def document(self, **top):
        coupling = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [3], "norm": "batch"}}
        layers = [{"type": "pad", "channels": 2}, {"type": "split"}, *[coupling] * 3, {"type": "merge"}]
        return spec_of(*layers, shape=(2, 4, 4), **top)

    def test_a_layer_that_adds_channels_has_to_say_so(self):
        @invflow.register("acme.wider")
        class Wider(Doubling):
            def forward(self, x, context=None):
                return functional.pad(x, [0, 2])

            def inverse(self, y, context=None):
                return y[:, :-2]

            def output_shape(self, shape):
                return (shape[0] + 2,)

        with pytest.raises(SpecError, match=r"layers.0: acme.wider turns 4 numbers into 6, \(4,\) into \(6,\)"):
            invflow.build(spec_of({"type": "acme.wider"}, prior={"type": "standard_normal"}))
        flow = Flow(Sequential(Wider()), StandardNormal((6,)))
        for call in (lambda: flow.log_prob(torch.zeros(1, 4)), lambda: flow.sample(2)):
            with pytest.raises(ShapeError, match="keep the size of the state"):
                call()
        with pytest.raises(BijectionError, match=r"shapes: .*\n +expected 4 numbers of 4, got 6"):
            check_bijection(Wider(), (4,), only=["shapes"])

    def test_below_a_head(self):
        model = invflow.build_model(self.document(head={"type": "linear", "classes": 3}))
        x = torch.randn(5, 2, 4, 4)
        z = model.features(x)
        assert z.shape == (5, 4, 4, 4)
        torch.testing.assert_close(model.bijection.inverse(z), x, atol=1e-5, rtol=0)
        again = invflow.build(invflow.to_spec(model))
        assert again.input_shape((4, 4, 4)) == (2, 4, 4)

    def test_under_a_prior_it_is_refused(self):
        with pytest.raises(SpecError, match=r"prior: a flow expects a chain that adds no dimensions, .* pad"):
            invflow.build_model(self.document(prior={"type": "standard_normal"}))
        with pytest.raises(ShapeError, match="put a head on it"):
            Flow(Sequential(Affine((2,)), Pad(2)), StandardNormal((4,)))

    @pytest.mark.parametrize("wrap", [lambda pad: pad, Sequential, lambda pad: Parallel(pad, Psi(2)), On, Each])
    def test_it_cannot_be_run_backwards(self, wrap):
        layer = wrap(Pad(2))
        assert not layer.surjective
        with pytest.raises(ShapeError, match="cannot be run backwards: it adds dimensions"):
            Inverse(layer)
        with pytest.raises(ShapeError, match="cannot be run backwards"):
            _ = Sequential(Affine((2,)), layer)[::-1]
        inverse = {"type": "inverse", "layer": {"type": "pad", "channels": 2}}
        with pytest.raises(SpecError, match=r"layers.0: pad cannot be run backwards"):
            invflow.build(spec_of(inverse))

    def test_it_has_no_log_determinant(self):
        chain = Sequential(Pad(2), Affine((4,)))
        for call in (chain.forward_and_log_det, Pad(2).forward_and_log_det):
            with pytest.raises(ShapeError, match="adds dimensions, so it has no log-determinant"):
                call(torch.zeros(1, 2))
        with pytest.raises(ShapeError, match="adds dimensions, so it has no log-determinant"):
            chain.inverse_and_log_det(torch.zeros(1, 4))

    @pytest.mark.parametrize("mode", ["snap", "grid", "exact"])
    def test_in_other_numerics(self, mode):
        chain = invflow.build(self.document(numerics={"mode": mode})).eval()
        x = torch.randint(256, (6, 2, 4, 4)) / 256
        assert torch.equal(chain.inverse(chain(x)), x)
        assert check(chain).ok == (mode != "snap") or mode == "snap"

    def test_an_inverse_of_what_is_no_image_has_the_right_gradient(self):
        coupling = {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [4]}}
        part = [{"type": "split"}, *[coupling] * 2, {"type": "merge"}]
        torch.manual_seed(0)
        chain = invflow.build(spec_of(*part, {"type": "pad", "channels": 2}, *part)).double()
        z = torch.randn(5, 6, dtype=torch.float64)

        def gradients(policy):
            one = copy.deepcopy(chain)
            one.backprop = policy
            given = z.clone().requires_grad_()
            one.inverse(given).square().sum().backward()
            return torch.cat([tensor.grad.flatten() for tensor in (given, *one.parameters())])

        assert (gradients("reversible") - gradients("stored")).abs().max() < 1e-10

    def test_one_that_loses_numbers(self):
        @invflow.register("acme.lossy")
        class Lossy(Pad):
            def forward(self, x, context=None):
                return x[:, :1]

            def output_shape(self, shape):
                return (1,)

        with pytest.raises(SpecError, match=r"layers.0: acme.lossy turns 4 numbers into 1"):
            invflow.build(spec_of({"type": "acme.lossy", "channels": 2}))

    def test_it_trains_in_constant_memory(self):
        chain = invflow.build(self.document()).double().train()
        chain = Sequential(*[layer for layer in chain if not isinstance(layer, nn.BatchNorm2d)]).double()
        x = torch.randn(5, 2, 4, 4, dtype=torch.float64)

        def gradients(policy):
            one = copy.deepcopy(chain)
            one.backprop, one.monitor = policy, "off"
            one(x).square().sum().backward()
            return torch.cat([weight.grad.flatten() for weight in one.parameters()])

        right = gradients("stored")
        assert [step.reversible for step in Sequential(*chain, backprop="reversible").steps((2, 4, 4))] == [True] * 6
        assert (gradients("reversible") - right).abs().max() <= 1e-10 * right.abs().max()

    def test_its_properties_run_one_way(self):
        report = check_bijection(Pad(2), (3,))
        assert report.ok
        names = {finding.name for finding in report.findings}
        assert "round trip" in names
        assert not names & {"inverse round trip", "log det", "inverse log det", "log det form"}
        property_tests("pad")

    def test_a_left_inverse_that_is_none_is_found(self):
        class Lossy(Pad):
            def inverse(self, y, context=None):
                return y[:, self.channels :]

        with pytest.raises(BijectionError, match="round trip"):
            check_bijection(Lossy(2), (3,), skip=["compiles"])

    def test_its_conditioning_is_measured(self):
        found = conditioning(invflow.build(spec_of({"type": "pad", "channels": 2}, {"type": "affine"})))
        assert [(layer.lipschitz, layer.inverse_lipschitz) for layer in found.layers] == [(1, 1), (1, 1)]
