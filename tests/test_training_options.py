"""Precision, compilation, parts of a batch, early stopping, trials of learning rates, profiles."""

from __future__ import annotations

import json

import pytest
import torch

import invflow
from tests.processes import trainings

STEPS = 20


def fitted(folder, spec, **training):
    return invflow.fit(spec, spec["training"]["data"], folder, progress=False, device="cpu", **training)


def weights(run):
    return invflow.load(run.folder).state_dict()


@pytest.fixture
def points():
    return trainings.flow_of_points()


class TestPrecision:
    def test_64_is_that_of_weights_which_stay_so(self, tmp_path, points):
        run = fitted(tmp_path / "run", points, precision=64)
        assert {weight.dtype for weight in weights(run).values() if weight.is_floating_point()} == {torch.float64}
        assert invflow.evaluate(run).test_nll == pytest.approx(run.record["test_nll"], abs=1e-5)

    def test_32_is_that_of_a_model_in_64(self, tmp_path, points):
        model = invflow.build_model(points).double()
        run = invflow.fit(model, torch.randn(50, 2), tmp_path / "run", epochs=1, precision=32, progress=False)
        assert {weight.dtype for weight in weights(run).values() if weight.is_floating_point()} == {torch.float32}

    def test_bfloat16_is_that_of_products_alone(self, tmp_path, points):
        seen = set()

        class Watched(torch.nn.Linear):
            def forward(self, x):
                made = super().forward(x)
                seen.add((self.training, made.dtype))
                return made

        model = invflow.build_model(points)
        for layer in model.modules():
            if type(layer) is torch.nn.Linear:
                layer.__class__ = Watched
        options = {"epochs": 1, "precision": "bf16-mixed", "progress": False}
        run = invflow.fit(model, torch.randn(50, 2), tmp_path / "run", **options)
        assert (True, torch.bfloat16) in seen
        assert {weight.dtype for weight in weights(run).values() if weight.is_floating_point()} == {torch.float32}
        assert run.record["training"]["precision"] == "bf16-mixed"


def test_a_compiled_training_has_the_same_losses(tmp_path):
    spec = trainings.classifier(batch_size=100, precision=32, evaluate_every=100)  # each epoch is one step
    losses = []
    for compiled in (False, True):
        run = fitted(tmp_path / str(compiled), spec, compile=compiled, deterministic=True)
        losses.append([row["train_loss"] for row in run.metrics])
        assert run.record["training"]["compile"] == compiled
    torch.use_deterministic_algorithms(False)
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_it_ends_early(tmp_path, points):
    """Nothing improves at a learning rate that changes nothing."""
    options = {"steps": None, "epochs": 50, "optimizer": {"type": "sgd", "lr": 1e-12}, "average": None}
    run = fitted(tmp_path / "run", points, early_stopping={"patience": 2, "threshold": 1e-3}, **options)
    assert run.record["status"] == "finished"
    assert run.record["epochs_done"] == 1 + 3  # the first one improves on nothing, three in a row do not
    assert run.unfinished is None


def test_early_stopping_goes_by_the_validation_samples(tmp_path, points):
    points["training"]["data"]["validation_size"] = 20
    options = {"steps": None, "epochs": 50, "optimizer": {"type": "sgd", "lr": 1e-12}, "evaluate_every": 2}
    run = fitted(tmp_path / "run", points, early_stopping={"patience": 0, "threshold": 1e-3}, **options)
    measured = [row for row in run.metrics if "val_nll" in row]
    assert run.record["epochs_done"] == 4, "the second evaluation is after four epochs"
    assert len(measured) == 2


def test_a_trial_finds_a_learning_rate(tmp_path, points):
    points["training"]["data"]["train_size"] = 1000
    run = fitted(tmp_path / "run", points, find_lr=True, batch_size=20)
    assert 1e-6 < run.record["found_lr"] < 1
    assert json.loads((run.folder / "spec.json").read_text())["training"]["optimizer"]["lr"] == run.record["found_lr"]
    again = fitted(tmp_path / "again", points, lr=run.record["found_lr"], batch_size=20)
    for name, weight in weights(run).items():
        assert torch.equal(weight, weights(again)[name]), "the trial leaves nothing behind"


@pytest.mark.parametrize("profile", ["simple", "pytorch"])
def test_a_profile_is_in_the_logs(tmp_path, points, profile):
    run = fitted(tmp_path / "run", points, profile=profile)
    assert list((run.folder / "logs").glob("*profile*"))


def test_shares_of_batch_norm_have_two_samples(tmp_path):
    spec = trainings.classifier(batch_size=33, accumulate=2)  # the last batch of 100 has one sample, and joins another
    spec["layers"][2]["net"] = {**trainings.CONV, "norm": "batch"}
    assert fitted(tmp_path / "run", spec).record["status"] == "finished"
    spec["training"]["batch_size"] = 49
    with pytest.raises(invflow.InvflowError, match="a batch of 2 samples leaves less than 2 for each of 2 shares"):
        fitted(tmp_path / "other", spec)


def test_a_batch_of_one_sample_in_parts(tmp_path, points):
    """The gradient is that of the sample, also if it is the only one."""
    points["training"] |= {"average": None, "steps": 3}
    x = torch.randn(5, 2, dtype=torch.float64)
    loader = torch.utils.data.DataLoader(x, batch_size=4)
    runs = [
        invflow.fit(points, loader, tmp_path / str(parts), test=x, accumulate=parts, progress=False) for parts in (1, 3)
    ]
    for name, weight in weights(runs[0]).items():
        assert torch.allclose(weight.double(), weights(runs[1])[name].double(), rtol=0, atol=1e-12)
