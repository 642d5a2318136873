"""Activation memory by layer and policy, and its output on the command line."""

from __future__ import annotations

import json

import pytest
import torch

import invflow
from invflow.diagnostics.memory import activation_memory, reconstructions
from invflow.errors import InvflowError

FLOAT = 4
"""Bytes of a float32."""


def document(couplings, **top):
    """Two convolutions per coupling, on halves of two channels: easy to count."""
    coupling = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [3]}}
    layers = [{"type": "split"}, *[coupling] * couplings, {"type": "merge"}]
    return {"input": {"shape": [4, 6, 6]}, "layers": layers, **top}


def test_counted_by_hand():
    batch, positions = 5, 36
    half, hidden = 2 * positions * batch * FLOAT, 3 * positions * batch * FLOAT
    found = activation_memory(invflow.build(document(4)), batch)
    first, *others = [layer.kept for layer in found.layers[1:-1]]
    # Its conditioner's input, which for the first one is a view of the batch, and the ReLU's output.
    assert first["stored"] == 2 * half + hidden
    assert [kept["stored"] for kept in others] == 3 * [half + hidden]
    # The third one ends the segment, whose state counts as its own; the last one is as in ordinary training.
    assert [kept["reversible"] for kept in (first, *others)] == [0, 0, 2 * half, hidden]
    # One half of each coupling's input already belongs to the coupling before.
    assert [kept["checkpoint"] for kept in (first, *others)] == [2 * half, half, half, half]
    assert found.kept == {
        policy: sum(layer.kept[policy] for layer in found.layers) for policy in ("stored", "reversible", "checkpoint")
    }
    assert found.peak["stored"] == found.kept["stored"]
    assert found.peak["reversible"] == max(found.kept["reversible"], 2 * half + first["stored"])


@pytest.mark.parametrize("log_det", [False, True])
def test_what_is_predicted_is_what_is_kept(log_det):
    inner = {"type": "sequential", "layers": [{"type": "actnorm"}, {"type": "linear_1x1"}, {"type": "split"}]}
    coupling = {"type": "affine_coupling", "net": {"type": "conv", "hidden": [3], "norm": "batch"}}
    layers = [{"type": "psi", "block_size": 2}, inner, *[coupling] * 3, {"type": "merge"}, {"type": "affine"}]
    chain = invflow.build({"input": {"shape": [1, 8, 8]}, "layers": layers})
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    found = activation_memory(chain, 6, log_det=log_det, measure=True)
    assert found.measured == found.kept
    assert (found.measured_peak is None) == (not torch.accelerator.is_available())
    assert all(torch.equal(before[name], tensor) for name, tensor in chain.state_dict().items())


def test_flat_in_depth():
    shallow, deep = (activation_memory(invflow.build(document(depth)), 8) for depth in (4, 64))
    assert deep.kept["reversible"] == shallow.kept["reversible"]
    assert deep.peak["reversible"] == shallow.peak["reversible"]
    assert deep.kept["stored"] > 12 * shallow.kept["stored"]


def test_a_chain_of_unknown_shape():
    with pytest.raises(InvflowError, match="activation_memory expects a chain built from a spec"):
        activation_memory(invflow.Sequential(), 8)


def test_reconstructions_of_a_spec():
    found = reconstructions(invflow.build(document(4)))
    assert list(found) == ["float32 eval", "float32 train", "float64 eval", "float64 train"]
    assert max(found["float64 train"].values()) < 1e-13 < max(found["float32 train"].values()) < 1e-5


class TestCommandLine:
    @pytest.fixture
    def spec(self, tmp_path):
        path = tmp_path / "spec.json"
        path.write_text(json.dumps(document(4)))
        return path

    @staticmethod
    def run(capsys, *arguments):
        from invflow.cli import main

        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code, *capsys.readouterr()

    def test_show_memory(self, spec, capsys):
        status, out, _ = self.run(capsys, "show", spec, "--memory", "--batch-size", 1000, "--measure")
        assert status == 0
        for word in ("batch 1000", "AdditiveCoupling", "reversible", "whole chain", "kept, measured", "MiB"):
            assert word in out

    def test_show_memory_as_data(self, spec, capsys):
        status, out, _ = self.run(capsys, "show", spec, "--memory", "--json")
        found = json.loads(out)
        assert status == 0
        assert found["batch"] == 64  # training's default
        assert found["kept"] == {p: sum(layer["kept"][p] for layer in found["layers"]) for p in found["kept"]}

    def test_options_of_memory_alone(self, spec, capsys):
        status, out, err = self.run(capsys, "show", spec, "--batch-size", 3)
        assert (status, out) == (2, "")
        assert "go with --memory" in err

    def test_check_memory(self, spec, capsys):
        status, out, _ = self.run(capsys, "check", spec, "--memory")
        assert status == 0
        assert "layers.4" in out
        assert 'backprop "reversible" reconstructs every input' in out
        _, out, _ = self.run(capsys, "check", spec, "--memory", "--json")
        assert set(json.loads(out)["reconstruction_error"]["float32 train"]) == {f"layers.{i}" for i in range(6)}

    def test_check_memory_of_a_chain_that_loses_its_input(self, spec, capsys, monkeypatch):
        found = {"float32 train": {"layers.0": torch.inf, "layers.1": 1e-4, "layers.2": 1e-6}}
        monkeypatch.setattr("invflow.diagnostics.memory.reconstructions", lambda chain: found)
        status, out, _ = self.run(capsys, "check", spec, "--memory")
        assert status == 0  # it runs backwards, but not accurately enough to be trained this way
        assert "inf lost" in out
        assert "1.0e-04 lost" in out
        assert "1.0e-06 lost" not in out
        assert 'monitor "repair" repairs each lost input once' in out
        _, out, _ = self.run(capsys, "check", spec, "--memory", "--json")
        assert json.loads(out)["reconstruction_error"]["float32 train"]["layers.0"] is None  # JSON has no infinity
