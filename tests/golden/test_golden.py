"""Specs, checkpoints and a run of invflow 0.1 still load, build and give the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import invflow
from invflow.bijections import Residual
from invflow.spec import load_spec
from invflow.state import flatten, make_state
from invflow.training.public import evaluate
from invflow.training.run_folder import Run

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OLD = HERE / "v0.1"
NUMBERS = json.loads((OLD / "numbers.json").read_text())

SAME = 1e-9
"""Relative, in float64: another version of PyTorch may sum in another order in each of a few dozen layers."""


def pixels(shape, batch=3):
    """Numbers like pixels, the same on every machine."""

    def leaf(extents):
        count = batch * torch.Size(extents).numel()
        return ((torch.arange(count, dtype=torch.float64) * 7919) % 256 / 256).reshape(batch, *extents)

    return make_state(leaf, shape)


def chain_of(model):
    return model if isinstance(model, invflow.Sequential) else model.bijection


def first(values):
    """The first numbers of the first sample, or one number per sample."""
    return values[0].flatten()[:6] if values.dim() > 1 else values


def assert_same(found, expected):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=SAME, atol=SAME
    )


@pytest.mark.parametrize("name", [name for name in NUMBERS if name.endswith(".json")])
def test_specs_mean_what_they_meant(name):
    expected, document = NUMBERS[name], load_spec(ROOT / name)
    assert document.hash == expected["hash"]
    torch.manual_seed(0)
    model = (invflow.build_model if document.head or document.prior else invflow.build)(document).double().eval()
    chain = chain_of(model)
    x = pixels(document.input_shape)
    context = None if document.context_shape is None else pixels(document.context_shape)
    y, log_det = chain.forward_and_log_det(x, context)
    assert sum(weight.numel() for weight in model.parameters()) == expected["parameters"]
    assert_same(flatten(y)[0, :6], expected["output"])
    assert_same(flatten(y).sum(), expected["output_sum"])
    assert_same(flatten(y).square().sum(), expected["output_square"])
    assert_same(flatten(chain.inverse(y, context)).sum(), expected["inverse_sum"])
    assert_same(log_det, expected["log_det"])
    if "model" in expected:
        top = model(x, context)
        assert_same(first(top), expected["model"])
    if "gradient" in expected:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        slopes = torch.autograd.grad(top.square().mean(), weights, allow_unused=True)
        assert_same(sum(slope.abs().sum() for slope in slopes if slope is not None), expected["gradient"])


@pytest.mark.parametrize("name", ["classifier", "flow", "exact", "residual"])
def test_checkpoints_load(name):
    expected, model = NUMBERS[f"checkpoint/{name}"], invflow.load(OLD / name).double().eval()
    chain = chain_of(model)
    x = pixels(chain.declared_shape)
    context = None if chain.declared_context_shape is None else pixels(chain.declared_context_shape)
    y, log_det = chain.forward_and_log_det(x, context)
    assert_same(flatten(y)[0, :6], expected["output"])
    assert_same(log_det, expected["log_det"])
    if "model" in expected:
        assert_same(model(x, context)[0].flatten()[:6], expected["model"])


@pytest.mark.parametrize(("name", "score"), [("run", "test_accuracy"), ("moons", "test_nll")])
def test_a_run_evaluates_to_what_was_recorded(name, score):
    run = Run.open(OLD / name)
    assert evaluate(run).scores[score] == pytest.approx(run.record[score], abs=1e-5)


def test_a_document_of_version_1_keeps_its_identity():
    """By the rules of that version, for every estimator."""
    old = load_spec(OLD / "residual.json")
    assert invflow.load_spec(OLD / "residual" / "spec.json").declared_hash == NUMBERS["checkpoint/residual"]["hash"]
    assert old.hash == load_spec(invflow.to_spec(invflow.build_model(old))).hash
    kinds = [layer.log_det.type for layer in invflow.build(old).modules() if isinstance(layer, Residual)]
    assert kinds == ["auto", "auto", "exact", "power_series", "power_series", "roulette", "auto", "roulette"]
