"""Stems and joints, which have no inverse: trunks between them do, and every tool says which is which."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

import invflow
from invflow import NumericsError, ShapeError, SpecError
from invflow.bijections import Inverse, Joint
from invflow.cli import app
from invflow.diagnostics.check import check
from invflow.diagnostics.conditioning import conditioning
from invflow.diagnostics.memory import reconstructions
from invflow.diagnostics.roundtrip import round_trip
from invflow.models.freezing import freeze

COUPLING = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [4], "norm": "batch"}}
SHORTCUT = {
    "type": "on",
    "index": 1,
    "layers": [{"type": "joint", "parts": [{"type": "average_pool"}, {"type": "pad", "channels": 2}]}],
}
STEM = {"type": "stack", "parts": [{"type": "conv", "channels": 4, "bias": False}, {"type": "batch_norm"}]}
SPEC = {
    "input": {"shape": [3, 8, 8]},
    "stem": STEM,
    "layers": [
        {"type": "split"},
        {"type": "repeat", "times": 3, "layers": [COUPLING]},
        SHORTCUT,
        {"type": "additive_coupling", "net": {"type": "stack", "parts": [{"type": "conv", "stride": 2}]}},
        SHORTCUT,
        {"type": "repeat", "times": 3, "layers": [COUPLING]},
        {"type": "merge"},
    ],
    "head": {"type": "linear", "classes": 3},
}
"""A small RevNet: a stem, and a unit with a stride between two stages."""

JOINTS = [0, 5, 7]
"""The steps that have no inverse."""


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return invflow.build_model(SPEC).double()


@pytest.fixture
def x():
    return torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def units(model, x):
    """What the units compute, in the words of the RevNet paper: y1 = S(x1) + F(x2), y2 = S(x2) + G(y1)."""

    def shortcut(x):
        pooled = torch.nn.functional.avg_pool2d(x, 2)
        return torch.nn.functional.pad(pooled, (0, 0, 0, 0, 1, 1))

    stem, _, *couplings = model.bijection
    a, b = stem.net(x).chunk(2, dim=1)
    for one in couplings[:3]:
        a, b = one.net(a) + b, a
    a, b = couplings[4].net(a) + shortcut(b), a
    b = shortcut(b)
    for one in couplings[6:9]:
        a, b = one.net(a) + b, a
    return torch.cat([a, b], dim=1)


def test_the_forward_is_that_of_the_units(model, x):
    assert torch.equal(model.eval().features(x), units(model, x))


def test_a_stem_is_a_joint_before_the_layers():
    spelled = {key: value for key, value in SPEC.items() if key != "stem"}
    spelled["layers"] = [{"type": "joint", "parts": STEM["parts"]}, *SPEC["layers"]]
    assert invflow.load_spec(spelled).hash == invflow.load_spec(SPEC).hash
    assert invflow.load_spec(invflow.to_spec(invflow.build_model(SPEC))).hash == invflow.load_spec(SPEC).hash


class TestGradients:
    """All policies give the gradients of plain training: each trunk recomputes its states, the joints keep theirs."""

    @pytest.mark.parametrize("backprop", ["reversible", "checkpoint"])
    def test_they_are_those_of_plain_training(self, model, x, backprop):
        other = copy.deepcopy(model)
        other.bijection.backprop = backprop
        expected, found = (torch.autograd.grad(one(x).square().sum(), [*one.parameters()]) for one in (model, other))
        for name, a, b in zip(dict(model.named_parameters()), expected, found, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12), name
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))

    def test_reversible_keeps_the_inputs_of_joints_alone(self, model):
        model.bijection.backprop = "reversible"
        kept = [i for i, step in enumerate(model.bijection.steps()) if not step.reversible]
        assert kept == JOINTS

    def test_inputs_of_joints_are_not_reconstructed(self, model):
        found = reconstructions(model.bijection.float())["float32 eval"]
        assert [*found.values()][5] == 0.0
        assert all(error < 1e-5 for error in found.values())


class TestWhatIsSaid:
    """Every tool says what is invertible."""

    def test_the_caveat(self, model):
        expected = "not invertible: only split, additive_coupling, merge are, because a joint has no inverse"
        assert model.caveat == expected
        assert not model.bijection.invertible

    def test_each_trunk_is_checked(self, model, x):
        found = round_trip(model.bijection.eval(), x)
        assert [i for i, error in enumerate(found.by_step) if error is None] == JOINTS
        assert found.relative < 1e-14
        report = check(invflow.build(SPEC))
        assert report.ok
        assert not report.invertible

    def test_a_broken_trunk_is_found(self, model, x):
        class Off(torch.nn.Module):
            calls = 0

            def forward(self, x):
                self.calls += 1
                return x * self.calls  # another function in the inverse

        model.bijection[2].net = Off()
        assert round_trip(model.bijection.eval(), x).relative > 1e-3

    def test_the_command_says_so(self, tmp_path):
        spec = tmp_path / "revnet.json"
        spec.write_text(json.dumps(SPEC))
        found = CliRunner().invoke(app, ["check", str(spec)])
        assert found.exit_code == 0
        assert "ok: between its joints the chain is invertible up to rounding" in found.output
        assert "a joint has no inverse" in found.output
        told = json.loads(CliRunner().invoke(app, ["check", str(spec), "--json"]).stdout)
        assert told["layers"][0]["round_trip_error"]["float32 eval"] is None
        assert told["invertible"] is False

    def test_trunks_are_slices(self, model, x):
        chain = model.bijection.eval()
        trunk, state = chain[1:5], chain[0](x)
        back = trunk.inverse(trunk(state))
        assert (back - state).abs().max() < 1e-14


class TestRefusals:
    """One line, which names the joint."""

    def test_an_inverse(self, model, x):
        for call in (model.inverse, model.bijection.inverse):
            with pytest.raises(ShapeError, match="joint has no inverse; only the layers between joints run backwards"):
                call(model.features(x))
        for call in (lambda: Inverse(model.bijection), lambda: model.bijection[::-1]):
            with pytest.raises(ShapeError, match="cannot be run backwards: it is, or holds, a joint"):
                call()
        with pytest.raises(ShapeError, match="joint has no inverse, so it has no log-determinant"):
            model.bijection.forward_and_log_det(x)
        with pytest.raises(ShapeError, match="joint has no inverse"):
            model.bijection.inverse_and_log_det(model.features(x))

    def test_a_density(self):
        flow = {**{key: value for key, value in SPEC.items() if key != "head"}, "prior": {"type": "standard_normal"}}
        with pytest.raises(SpecError, match=r"^prior: a flow expects a chain that has an inverse"):
            invflow.build_model(flow)

    @pytest.mark.parametrize(
        ("numerics", "line"),
        [
            ({"mode": "exact"}, r"^stem: joint cannot be exact: it has no inverse"),
            ({"mode": "grid"}, r"^stem: joint cannot be grid: it has no inverse"),
            ({"mode": "snap"}, r"^numerics: snap rounds what the inverse returns, and the chain has none"),
        ],
    )
    def test_numerics(self, numerics, line):
        with pytest.raises(SpecError, match=line):
            invflow.build({**SPEC, "numerics": numerics})

    def test_freezing(self, model, x):
        with pytest.raises(NumericsError, match="joint"):
            freeze(model, x, invflow.numerics.Exact(mode="exact"))

    def test_conditioning_and_interpolation(self, model, x):
        with pytest.raises(invflow.InvflowError, match="conditioning expects a chain that has an inverse"):
            conditioning(invflow.build(SPEC))
        with pytest.raises(ShapeError, match="joint has no inverse"):
            invflow.interpolate(model, x[:1], x[1:2])

    def test_another_shape(self):
        joint = Joint(shape=(2, 4))
        with pytest.raises(ShapeError, match=r"joint expects a batch of states of shape \(2, 4\)"):
            joint(torch.zeros(1, 2, 5))
        with pytest.raises(ShapeError, match=r"joint expects the shape \(2, 4\), got \(2, 5\)"):
            joint.output_shape((2, 5))

    @pytest.mark.parametrize(
        ("stem", "line"),
        [
            (3, 'a stem is a net made of parts, {"type": "stack", "parts": [...]}, got 3'),
            (
                {"type": "conv"},
                'a stem is a net made of parts, {"type": "stack", "parts": [...]}, got {"type": "conv"}',
            ),
        ],
    )
    def test_a_stem_that_is_none(self, stem, line):
        with pytest.raises(SpecError) as caught:
            invflow.load_spec({**SPEC, "stem": stem})
        assert caught.value.errors[0]["message"] == line
        assert caught.value.errors[0]["path"] == "stem"

    def test_a_part_of_a_stem_has_its_place(self):
        stem = {"type": "stack", "parts": [{"type": "conv", "channels": 4}, {"type": "attention", "heads": 3}]}
        with pytest.raises(SpecError, match=r"^stem.parts.1: attention with 3 heads expects channels"):
            invflow.build({**SPEC, "stem": stem})
        with pytest.raises(SpecError, match=r"^a spec needs 'layers'"):
            invflow.load_spec({key: value for key, value in SPEC.items() if key != "layers"})


def test_an_actnorm_in_a_stem_is_initialised_from_data(x):
    stem = {"type": "stack", "parts": [{"type": "conv", "channels": 4}, {"type": "actnorm"}]}
    model = invflow.build_model({**SPEC, "stem": stem}).double()
    assert model.bijection.awaits_data
    model.bijection.initialize(x)
    assert not model.bijection.awaits_data
    made = model.bijection[0](x)
    assert made.mean((0, 2, 3)).abs().max() < 1e-12
    head = {"type": "stack", "classes": 3, "parts": [{"type": "mean"}, {"type": "actnorm"}, {"type": "linear"}]}
    with pytest.raises(SpecError, match=r"^head: a stack head cannot hold an actnorm"):
        invflow.build_model({**SPEC, "head": head})


def test_layers_from_vars_stand_on_a_stem_too():
    spec = {**SPEC, "vars": {"two": [{"type": "split"}, {"type": "merge"}]}, "layers": {"$var": "two"}}
    assert [layer.tag for layer in invflow.build(spec)] == ["joint", "split", "merge"]
    with pytest.raises(SpecError, match=r"^stem.zero_last: unknown key 'zero_last' of a stem"):
        invflow.load_spec({**SPEC, "stem": {**STEM, "zero_last": False}})
