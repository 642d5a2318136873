"""The shipped specs are what their notes and the comparisons in the documentation say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import invflow
from invflow.bijections import ActNorm, AffineCoupling, Psi, Residual
from invflow.models import Classifier, Flow
from invflow.nets import LipschitzConv
from invflow.training.run import check_trainable

SPECS = Path(__file__).parent.parent / "specs"


def size(model):
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("spec", sorted(SPECS.glob("*.json")), ids=lambda path: path.stem)
def test_it_names_itself_and_can_be_trained(spec, request):
    document = invflow.load_spec(spec)
    assert document.name == spec.stem.replace("_", "-")
    root = request.getfixturevalue("mnist_root") if document.training.data.name == "mnist" else None
    check_trainable(document, root)


@pytest.mark.parametrize(
    "spec",
    [path for path in sorted(SPECS.glob("*.json")) if '"prior":' in path.read_text()],
    ids=lambda path: path.stem,
)
def test_each_density_is_trained_and_drawn_from(spec, request, tmp_path):
    document = invflow.load_spec(spec).document
    options = {name: value for name, value in document["training"].items() if name not in ("epochs", "warmup")}
    data = {**options["data"], "train_size": 64, "test_size": 32}
    root = request.getfixturevalue("mnist_root") if data["name"] == "mnist" else None
    options |= {"data": data, "batch_size": 16, "steps": 3}
    options["optimizer"] = {**options["optimizer"], "lr": 1e-4}  # there is no warm-up
    short = {**document, "training": options}
    torch.manual_seed(options.get("seed", 0))
    start = {name: weight.clone() for name, weight in invflow.build_model(short).named_parameters()}
    flow = invflow.train(short, tmp_path / "run", data_root=root, progress=False).model.eval()
    assert all(not torch.equal(weight, start[name]) for name, weight in flow.named_parameters())
    flow.double()  # a float32 near 1 has no digits left for the logit of a pixel
    context_shape = document["input"].get("context_shape")
    context = () if context_shape is None else (torch.eye(*context_shape, dtype=torch.float64),)
    with torch.no_grad():
        samples, log_prob = flow.sample_with_log_prob(5, *context)
        again = flow.log_prob(samples.flatten(0, log_prob.dim() - 1), *(one.repeat(5, 1) for one in context))
    torch.testing.assert_close(again, log_prob.flatten(), rtol=1e-6, atol=1e-5)


def test_the_two_densities_of_the_moons_are_of_equal_size_and_equally_trained():
    residual, coupling = (invflow.load_spec(SPECS / f"{name}_moons.json") for name in ("iresnet", "realnvp"))
    assert size(invflow.build_model(residual)) == size(invflow.build_model(coupling)) == 8452
    assert residual.training == coupling.training
    assert sum(isinstance(layer, AffineCoupling) for layer in invflow.build(coupling)) == 16
    assert sum(isinstance(layer, Residual) for layer in invflow.build(residual)) == 16
    assert isinstance(invflow.build_model(residual), Flow)


@pytest.mark.parametrize("name", ["iresnet_mnist", "iresnet_digits"])
def test_the_classifiers_blocks_are_the_published_ones(name):
    model = invflow.build_model(SPECS / f"{name}.json")
    assert isinstance(model, Classifier)
    assert model.linear_head
    chain = model.bijection
    assert any(isinstance(layer, Psi) for layer in chain)
    assert any(isinstance(layer, ActNorm) for layer in chain)
    for block in (layer for layer in chain if isinstance(layer, Residual)):
        assert isinstance(block.net, LipschitzConv)
        assert [one.weight.shape[-1] for one in block.net.maps] == [3, 1, 3]
        assert not any(isinstance(activation, torch.nn.Identity) for activation in block.net.activations)


def test_the_classifiers_of_mnist_see_the_same_images():
    specs = [invflow.load_spec(SPECS / f"{name}_mnist.json") for name in ("irevnet", "iresnet", "vgg")]
    assert {spec.training.data.train_size for spec in specs} == {500}
    assert {spec.training.epochs for spec in specs} == {40}
