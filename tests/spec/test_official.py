"""Official checkpoints: which module becomes which, what is refused, and that no code of a file runs.

The files are written here in the official layouts: github.com/jhjacobsen/pytorch-i-revnet,
github.com/jhjacobsen/invertible-resnet, github.com/rtqichen/residual-flows and github.com/bayesiains/nsf. Beside the
official codes, with their weights imported, features agree in float64 to 1e-13.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from typer.testing import CliRunner

import invflow
from invflow import CheckpointError
from invflow.bijections import ActNorm, Linear1x1, Residual, SplineCoupling
from invflow.cli import app
from invflow.spec.official import import_weights

PUBLISHED = Path(__file__).parents[2] / "specs" / "published"
OFFICIAL = 1e-10
"""Relative, in float64: the sums of convolutions, whose order depends on the machine."""
EXACT = 1e-6
"""Of weights in float32 that are divided or added to."""


def document(name, **changes):
    """A published document with other text in places."""
    text = (PUBLISHED / f"{name}.json").read_text()
    for old, new in changes.get("text", {}).items():
        assert old in text, old
        text = text.replace(old, new)
    found = json.loads(text)
    found["input"] = {"shape": changes.get("shape", found["input"]["shape"])}
    return found


def wave(shape, start):
    return torch.sin(1.7 * torch.arange(math.prod(shape), dtype=torch.float32) + 0.3 * start).reshape(shape)


IREVNET = {"text": {'"times": 17': '"times": 1'}}
"""Two blocks a stage."""


@pytest.fixture
def irevnet():
    return document("irevnet_cifar10", **IREVNET)


def official_irevnet(spec):
    """A state_dict in the official layout, from waves; and the model of the spec with the same weights, put by hand."""
    model = invflow.build_model(spec)
    state, by_hand = {}, {}
    couplings = [layer for layer in model.bijection if layer.tag == "additive_coupling"]
    for i, coupling in enumerate(couplings):
        for position, part in enumerate(coupling.net):
            for name, tensor in part.state_dict().items():
                value = 0.1 * wave(tensor.shape, len(state)) if tensor.dtype.is_floating_point else torch.tensor(7)
                value = value.abs() + 0.5 if name == "running_var" else value
                state[f"stack.{i}.bottleneck_block.{position}.{name}"] = value
                by_hand[f"bijection.layers.{[*model.bijection].index(coupling)}.net.{position}.{name}"] = value
    for ours, theirs in (("0", "bn1"), ("3", "linear")):
        for name, tensor in model.head.net[int(ours)].state_dict().items():
            value = wave(tensor.shape, len(state)).abs() + 0.1 if tensor.dtype.is_floating_point else torch.tensor(7)
            state[f"{theirs}.{name}"] = by_hand[f"head.net.{ours}.{name}"] = value
    model.load_state_dict(by_hand)
    return state, model.eval()


class TestIRevNet:
    """Its key names are ours but for their order; files keep any order."""

    def test_the_official_code_returns_the_same(self, irevnet, tmp_path):
        state, _ = official_irevnet(irevnet)
        torch.save(state, tmp_path / "official.pth")
        model = import_weights(irevnet, tmp_path / "official.pth").model.double()
        x = 0.5 + 0.45 * wave((1, 3, 32, 32), 0).double()
        logits = [70.56496553809396, 68.6892485386254, 67.15111391170643, 62.42706903329788, 58.34023427549293]
        features = [0.4634062801957823, 0.012748679785663623, 0.005195520827332781, 0.024599979347537285]
        assert model(x)[0, :5].tolist() == pytest.approx(logits, rel=OFFICIAL)
        assert model.features(x).flatten()[::8000][:4].tolist() == pytest.approx(features, rel=OFFICIAL)

    @pytest.mark.parametrize("wrapper", ["", "module."])
    @pytest.mark.parametrize("inside", [None, "state_dict"])
    @pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
    def test_every_key_is_taken(self, irevnet, tmp_path, wrapper, inside, suffix):
        state, expected = official_irevnet(irevnet)
        file = tmp_path / f"checkpoint{suffix}"
        held = {f"{wrapper}{key}": value for key, value in state.items()}
        if suffix == ".safetensors":
            safetensors.torch.save_file(held, file)
        else:
            torch.save(held if inside is None else {"epoch": 3, "arch": "i-revnet", inside: held}, file)
        found = import_weights(irevnet, file)
        assert (found.tensors, found.left_out, found.changes) == (len(state), {}, [])
        x = torch.rand(2, 3, 32, 32)
        assert torch.equal(found.model(x), expected(x))

    def test_the_format_of_old_files(self, irevnet, tmp_path):
        state, expected = official_irevnet(irevnet)
        torch.save({"state_dict": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        found = import_weights(irevnet, tmp_path / "old.pth")
        assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), expected.parameters(), strict=True))

    def test_the_command_writes_a_checkpoint(self, irevnet, tmp_path):
        state, expected = official_irevnet(irevnet)
        torch.save(state, tmp_path / "official.pth")
        (tmp_path / "spec.json").write_text(json.dumps(irevnet))
        arguments = ["import-weights", str(tmp_path / "spec.json"), str(tmp_path / "official.pth")]
        told = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out"), "--json"])
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout)["tensors"] == len(state)
        x = torch.rand(2, 3, 32, 32)
        loaded = invflow.load(tmp_path / "out").eval()
        assert torch.equal(loaded(x), expected(x))
        assert json.loads((tmp_path / "out" / "spec.json").read_text())["name"] == "irevnet-cifar10"

    def test_nothing_is_written_over(self, irevnet, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "weights-0123456789abcdef.safetensors").write_bytes(b"mine")
        (tmp_path / "spec.json").write_text(json.dumps(irevnet))
        torch.save(official_irevnet(irevnet)[0], tmp_path / "official.pth")
        arguments = ["import-weights", str(tmp_path / "spec.json"), str(tmp_path / "official.pth")]
        told = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
        assert isinstance(told.exception, CheckpointError)
        assert "exists already; name another folder with --out" in str(told.exception)
        assert len([*(tmp_path / "out").iterdir()]) == 1

    @pytest.mark.parametrize(
        ("change", "line"),
        [
            (lambda s: s.pop("stack.3.bottleneck_block.2.weight"), "the file has 17 modules of weight, the spec 18"),
            (lambda s: s.update({"bn2.weight": torch.ones(3)}), "the file has 19 modules of weight, the spec 18"),
            (
                lambda s: s.update({"linear.extra": torch.ones(3)}),
                "another network than the spec's: the file has 0 mod",
            ),
            (
                lambda s: s.update({"stack.0.bottleneck_block.0.weight": torch.ones(4, 16, 5, 5)}),
                "stack.0.bottleneck_block.0, {'weight': (4, 16, 5, 5)}, meets bijection.layers.3.net.0",
            ),
            (
                lambda s: s.update({"linear.bias": torch.full((10,), math.nan)}),
                "what becomes head.net.3.bias is not finite",
            ),
        ],
    )
    def test_another_network(self, irevnet, tmp_path, change, line):
        state, _ = official_irevnet(irevnet)
        change(state)
        torch.save(state, tmp_path / "official.pth")
        with pytest.raises(CheckpointError, match=re.escape(line)):
            import_weights(irevnet, tmp_path / "official.pth")


def official_pair(weight, sides):
    """The singular vectors of the largest singular value of a convolution on these positions."""
    inputs, pad = weight.shape[1], weight.shape[-1] // 2
    basis = torch.eye(inputs * math.prod(sides), dtype=torch.float64).reshape(-1, inputs, *sides)
    dense = nn.functional.conv2d(basis, weight.double(), padding=pad).flatten(1).T
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    return left[:, 0].float(), right[0].float(), float(values[0])


DENSITY = {
    "text": {"[512, 512]": "[4, 5]", '"times": 16': '"times": 1', '"times": 15': '"times": 1'},
    "shape": [3, 8, 8],
}


class TestIResNet:
    """The density: its prior, its norms, and its unused head."""

    def official(self, spec, factor=1.0):
        model = invflow.build_model(spec)
        norms, blocks = ([m for m in model.modules() if isinstance(m, kind)] for kind in (ActNorm, Residual))
        state, expected = {}, []
        for i, (norm, block) in enumerate(zip(norms, blocks, strict=True)):
            place = f"stack.{min(i // 2, 2)}.stack.{i}"
            for j, one in enumerate(block.net.maps):
                weight = wave(one.weight.shape, i + j)
                u, v, largest = official_pair(weight, one.in_shape[1:])
                if one.weight.shape[-1] == 1:
                    u, v, largest = official_pair(weight, (1, 1))
                key = f"{place}.bottleneck_block.{2 * j + (i > 0)}"
                named = {"bias": wave(one.bias.shape, j), "weight_orig": weight, "weight_u": u, "weight_v": v * factor}
                state |= {f"{key}.{name}": value for name, value in named.items()}
                state[f"{key}.weight_sigma"] = torch.tensor(largest)
                more = 1e-5 if one.weight.shape[-1] > 1 else 0.0
                expected.append(weight / (max(1.0, largest * factor / 0.9) + more))
            shape = (1, len(norm.shift), 1, 1)
            state |= {
                f"{place}.actnorm._log_scale": 0.1 * wave(shape, i),
                f"{place}.actnorm._shift": wave(shape, i + 1),
            }
        numbers = model.prior.mean.numel()
        state |= {"bn1.weight": torch.ones(3), "logits.bias": torch.ones(3)}
        return {"prior_mu": wave((numbers,), 0), "prior_logstd": wave((numbers,), 1), **state}, expected

    def test_weights_norms_and_prior(self, tmp_path):
        spec = document("iresnet_density_cifar10", **DENSITY)
        state, expected = self.official(spec)
        torch.save(state, tmp_path / "density.pth")
        found = import_weights(spec, tmp_path / "density.pth")
        assert set(found.left_out.values()) == {"a class head that the density does not use"}
        maps = [one for block in found.model.modules() if isinstance(block, Residual) for one in block.net.maps]
        for one, weight in zip(maps, expected, strict=True):
            assert torch.allclose(one.normalized_weight(), weight, rtol=0, atol=EXACT)
        assert torch.equal(found.model.prior.mean.flatten(), state["prior_mu"])
        norms = [m for m in found.model.modules() if isinstance(m, ActNorm)]
        assert torch.equal(norms[1].shift, state["stack.0.stack.1.actnorm._shift"].flatten())
        assert not found.model.bijection.awaits_data

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("weight_u", None),
            ("bias", None),
            ("gamma", torch.ones(4)),
            ("weight_v", torch.ones(3)),
            ("weight_orig", torch.ones(4)),
            ("weight_orig", torch.zeros(1, 1, 1, 1).expand(10**8, 3, 1, 1)),
            ("bias", torch.ones(4, dtype=torch.complex64)),
            ("bias", torch.ones(4, dtype=torch.int64)),
            ("bias", torch.ones(4).to_sparse()),
        ],
    )
    def test_what_a_module_cannot_be_made_of(self, tmp_path, name, value):
        spec = document("iresnet_density_cifar10", **DENSITY)
        state, _ = self.official(spec)
        key = f"stack.0.stack.0.bottleneck_block.0.{name}"
        state = {k: v for k, v in {**state, key: value}.items() if v is not None}
        torch.save(state, tmp_path / "density.pth")
        with pytest.raises(CheckpointError, match=r"another network than|no plain tensor|no file of tensors"):
            import_weights(spec, tmp_path / "density.pth")

    def test_norms_that_had_not_converged_raise_the_bounds(self, tmp_path):
        spec = document("iresnet_density_cifar10", **DENSITY)
        state, expected = self.official(spec, factor=0.98)  # the official estimate is too small
        torch.save(state, tmp_path / "density.pth")
        found = import_weights(spec, tmp_path / "density.pth")
        (change,) = found.changes
        assert change.startswith("bounds of norms are raised by 2.0")
        maps = [one for block in found.model.modules() if isinstance(block, Residual) for one in block.net.maps]
        for one, weight in zip(maps, expected, strict=True):
            assert torch.allclose(one.normalized_weight(), weight, rtol=0, atol=EXACT)
        assert invflow.build_model(found.document).bijection[3].net.maps[0].bound > 0.9

    def test_a_bound_may_be_a_variable(self, tmp_path):
        net = '{"type": "lipschitz_conv", "hidden": [4, 5], "bound": {"$var": "b"}}'
        text = {**DENSITY["text"], '{"$var": "net"}': net, '"vars": {': '"vars": {"b": 0.9, '}
        spec = document("iresnet_density_cifar10", text=text, shape=[3, 8, 8])
        torch.save(self.official(spec, factor=0.98)[0], tmp_path / "density.pth")
        found = import_weights(spec, tmp_path / "density.pth")
        assert invflow.build_model(found.document).bijection[3].net.maps[0].bound > 0.9

    def test_norms_far_too_large_are_scaled_down_and_the_result_says_so(self, tmp_path):
        spec = document("iresnet_density_cifar10", **DENSITY)
        state, _ = self.official(spec, factor=0.5)
        torch.save(state, tmp_path / "density.pth")
        found = import_weights(spec, tmp_path / "density.pth")
        assert "so the network is not quite the official one" in found.changes[0]
        x = torch.rand(2, 3, 8, 8)
        y = found.model.bijection(x)
        assert (found.model.bijection.inverse(y) - x).abs().max() < 1e-4


FLOW = {
    "text": {'"hidden": [512, 512]': '"hidden": [4, 5]', "[128, 128]": "[3, 4]", '"times": 15': '"times": 1'}
    | {'"times": 16': '"times": 1', '"times": 4': '"times": 1'},
    "shape": [1, 8, 8],
}


class TestResidualFlow:
    """Steepness, the order of shift and scale, the estimator's records, and the average beside the weights."""

    def official(self, spec):
        model = invflow.build_model(spec)
        state = {}
        for i, layer in enumerate(model.bijection.modules()):
            key = f"transforms.0.chain.{i}"
            if isinstance(layer, ActNorm):
                shape = layer.shift.shape
                state |= {f"{key}.weight": 0.1 * wave(shape, i), f"{key}.bias": wave(shape, i + 1)}
                state[f"{key}.initialized"] = torch.tensor(1)
            elif isinstance(layer, Residual):
                state |= {f"{key}.geom_p": torch.tensor(0.1), f"{key}.last_n_samples": torch.zeros(3)}
                pairs = zip(layer.net.activations, layer.net.maps, strict=True)
                for j, (activation, one) in enumerate(pairs):
                    if hasattr(activation, "beta"):
                        state[f"{key}.nnet.{2 * j}.beta"] = torch.full((1,), 0.1 * (i + j))
                    named = {"weight": 0.01 * wave(one.weight.shape, i), "bias": wave(one.bias.shape, j)}
                    named |= {"u": torch.zeros(one.weight.shape[0]), "v": torch.zeros(one.weight.shape[1])}
                    named["scale"] = torch.tensor(0.5)
                    if one.weight.dim() == 4:
                        named |= {"initialized": torch.tensor(1), "spatial_dims": torch.ones(2)}
                    if one.weight.dim() == 4 and one.weight.shape[-1] > 1:
                        named |= {"u": torch.zeros(one.out_shape).flatten(), "v": torch.zeros(one.in_shape).flatten()}
                    state |= {f"{key}.nnet.{2 * j + 1}.{name}": value for name, value in named.items()}
        return state

    def check(self, found, state):
        blocks = [m for m in found.model.modules() if isinstance(m, Residual)]
        betas = [float(a.beta.detach()) for block in blocks for a in block.net.activations if hasattr(a, "beta")]
        assert betas == pytest.approx([float(v) for k, v in state.items() if k.endswith("beta")])
        maps = [one.weight for block in blocks for one in block.net.maps]
        official = [v for k, v in state.items() if k.endswith("weight") and ".nnet." in k]
        assert all(torch.allclose(a, b) for a, b in zip(maps, official, strict=True))
        norm = next(m for m in found.model.modules() if isinstance(m, ActNorm))
        x = torch.rand(2, *norm.shift.shape, 2, 2)
        key = next(k for k in state if k.endswith("initialized"))[: -len("initialized")]
        scale, bias = (state[f"{key}{name}"][:, None, None] for name in ("weight", "bias"))
        assert torch.allclose(norm(x), (x + bias) * scale.exp(), atol=EXACT)

    def test_weights(self, tmp_path):
        spec = document("residual_flow_mnist", **FLOW)
        state = self.official(spec)
        torch.save(state, tmp_path / "flow.pth")
        found = import_weights(spec, tmp_path / "flow.pth")
        assert set(found.left_out.values()) == {"settings and records of an estimator"}
        self.check(found, state)

    def test_an_average_beside_the_weights_is_preferred(self, tmp_path):
        class Average:  # of a class that is not here when the file is read
            def __init__(self, module, shadow):
                self.module, self.shadow_params = module, shadow

        spec = document("residual_flow_mnist", **FLOW)
        state = self.official(spec)
        trained = ("weight", "bias", "beta")
        shadow = {key: 1.5 * value for key, value in state.items() if key.endswith(trained)}
        Average.__module__, Average.__qualname__ = __name__, "Average"
        globals()["Average"] = Average
        held = {"state_dict": state, "ema": Average(nn.Linear(2, 2), shadow), "args": argparse.Namespace(lr=0.1)}
        torch.save(held, tmp_path / "flow.pth")
        del globals()["Average"]
        self.check(import_weights(spec, tmp_path / "flow.pth"), {**state, **shadow})
        torch.save({"state_dict": state, "ema": shadow}, tmp_path / "plain.pth")
        self.check(import_weights(spec, tmp_path / "plain.pth"), {**state, **shadow})
        torch.save({"state_dict": state, "ema": {"other": torch.ones(1)}}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="'ema', has other keys"):
            import_weights(spec, tmp_path / "other.pth")


SPLINES = {
    "text": {
        '"times": 3, "with": {"seeds"': '"times": 1, "with": {"seeds"',
        "[[0, 1, 2, 3, 4, 5, 6], [8, 9, 10, 11, 12, 13, 14], [16, 17, 18, 19, 20, 21, 22]]": "[[0]]",
        "[7, 15, 23]": "[7]",
        '"times": 7': '"times": 1',
        '"times": 3, "parts"': '"times": 1, "parts"',
        '"channels": 96': '"channels": 4',
    },
    "shape": [3, 4, 4],
}


class TestSplineFlow:
    """Permutations, LU in two lists, and the order of the numbers of the splines."""

    def test_weights(self, tmp_path):
        spec = document("nsf_cifar10", **SPLINES)
        model = invflow.build_model(spec)
        coupling = next(m for m in model.modules() if isinstance(m, SplineCoupling))
        first, *_, last = (m for m in coupling.net.modules() if isinstance(m, nn.Conv2d))
        inner = [m for m in coupling.net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)][1:-1]
        numbers, channels = 3 * 4 - 1, last.weight.shape[0] // (3 * 4 - 1)
        start = "_transform._transforms.1._transforms.0._transforms"
        state = {
            "_transform._transforms.0._shift": torch.tensor(-0.5),
            "_transform._transforms.0._scale": torch.tensor(1.0),
        }
        state |= {f"{start}.1.log_scale": 0.1 * wave((12,), 1), f"{start}.1.shift": wave((12,), 2)}
        for i, place in enumerate((f"{start}.2", f"{start}.4")):
            state |= {f"{place}.bias": wave((12,), i), f"{place}.lower_entries": wave((66,), i)}
            state |= {f"{place}.upper_entries": wave((66,), i + 5), f"{place}.unconstrained_upper_diag": wave((12,), i)}
            state[f"{place}.permutation._permutation"] = torch.arange(12).roll(i + 1)
        state |= {f"{start}.3.identity_features": torch.arange(6, 12), f"{start}.3.transform_features": torch.arange(6)}
        net = f"{start}.3.transform_net"
        state |= {f"{net}.initial_layer.{key}": wave(value.shape, 4) for key, value in first.state_dict().items()}
        for i, one in enumerate(inner):
            state |= {
                f"{net}.blocks.0.layers.{i}.{key}": wave(value.shape, i).abs() + 0.1 if value.dim() else value
                for key, value in one.state_dict().items()
            }
        state |= {f"{net}.final_layer.{key}": wave(value.shape, 9) for key, value in last.state_dict().items()}
        torch.save(state, tmp_path / "flow.pt")
        found = import_weights(spec, tmp_path / "flow.pt").model
        linear = [m for m in found.modules() if isinstance(m, Linear1x1)]
        for one, place in zip(linear, (f"{start}.2", f"{start}.4"), strict=True):
            rows, columns = torch.tril_indices(12, 12, -1)
            assert torch.equal(one.factors[rows, columns], state[f"{place}.lower_entries"])
            assert torch.equal(one.factors.T[columns, rows].sort()[0], state[f"{place}.lower_entries"].sort()[0])
            assert torch.equal(one.factors.diagonal(), state[f"{place}.unconstrained_upper_diag"])
        orders = [m.order for m in found.modules() if m.__class__.__name__ == "Permute"]
        assert [order.tolist() for order in orders] == [torch.arange(12).roll(i).tolist() for i in (1, 2)]
        mine = next(m for m in found.modules() if isinstance(m, SplineCoupling)).net[-1]
        official = state[f"{net}.final_layer.bias"]
        slope_1 = math.log(math.expm1(1 - 1e-3))
        for channel in range(channels):
            for number in range(numbers):
                wanted = official[channel * numbers + number] - (slope_1 if number >= 8 else 0.0)
                assert float(mine.bias.detach()[number * channels + channel]) == pytest.approx(float(wanted), abs=EXACT)
        assert torch.equal(mine.weight[channels], state[f"{net}.final_layer.weight"][1])
        halves, scale = f"{start}.3.transform_features", "_transform._transforms.0._scale"
        for key, value, line in (
            (halves, torch.arange(6, 12), "than the spec's"),
            (scale, torch.tensor(0.01), "by 0.01"),
        ):
            torch.save({**state, key: value}, tmp_path / "other.pt")
            with pytest.raises(CheckpointError, match=line):
                import_weights(spec, tmp_path / "other.pt")
