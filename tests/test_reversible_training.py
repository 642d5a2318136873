"""The lab's i-RevNet, trained under each policy."""

from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch

import invflow
from invflow.spec.training import Training
from invflow.training.data import DataSet, Samples, load_data
from invflow.training.run import _quiet_lightning
from invflow.training.tasks import Classification

SPECS = Path(__file__).parent.parent / "specs"
WEIGHTS = 1e-8
"""How far an error of 1e-14 per step may grow in three epochs of float64, through ReLUs and momentum."""


def trained(document, images, policy, epochs=3):
    """The weights after some epochs in float64."""
    spec = invflow.load_spec(document).replace(backprop=policy)
    options = Training.model_validate({**(spec.expanded.get("training") or {}), "epochs": epochs})
    torch.manual_seed(options.seed)
    model = invflow.build_model(spec).double()
    module = Classification.training(Classification(model, DataSet(images, images)), options)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    with _quiet_lightning():
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, reload_dataloaders_every_n_epochs=1, **quiet
        )
        trainer.fit(module)
    assert model.bijection.backprop == policy
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


@pytest.mark.parametrize("policy", ["reversible", "checkpoint"])
def test_irevnet_on_mnist(policy, mnist_root):
    document = SPECS / "irevnet_mnist.json"
    data = load_data(invflow.load_spec(document).training.data, mnist_root).train
    images = Samples(data.values[:192].double(), data.labels[:192])
    right = trained(document, images, "stored")
    assert (trained(document, images, policy) - right).abs().max() <= WEIGHTS
    assert (trained(document, images, "stored", epochs=1) - right).abs().max() > 1e-3  # it did train


@pytest.mark.parametrize("policy", ["reversible", "checkpoint"])
def test_with_batch_norm_and_augmentation_on_digits(policy):
    document = SPECS / "irevnet_digits.json"
    data = load_data(invflow.load_spec(document).training.data).train
    images = Samples(data.values[:96].double(), data.labels[:96])
    right = trained(document, images, "stored", epochs=2)
    assert (trained(document, images, policy, epochs=2) - right).abs().max() <= WEIGHTS
