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
