"""Models of both the class and the density, and walks between classes that stay among the data."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow.cli import main
from invflow.errors import DataError, InvflowError, SpecError
from invflow.models import BayesHead, Classifier, Flow, GaussianMixture, Hybrid, LinearHead, StandardNormal
from invflow.samples import Batch, DataSet, InMemory
from invflow.spec.training import Midpoints
from invflow.training.classification import Classification
from invflow.training.midpoints import MidpointLoss
from invflow.training.run import task_of

COUPLINGS = [
    {"type": "split"},
    {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [16]}},
    {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [16]}},
    {"type": "merge"},
]
MIXTURE = {"type": "gaussian_mixture", "components": 2}
TRAINING = {"data": {"name": "moons"}, "epochs": 6, "batch_size": 64, "optimizer": {"type": "adam", "lr": 0.01}}


def spec(head="bayes", prior=MIXTURE, **training):
    heads = {"bayes": {"type": "bayes"}, "linear": {"type": "linear", "classes": 2}}
    document = {"input": {"shape": [2]}, "layers": COUPLINGS, "prior": prior, "training": {**TRAINING, **training}}
    return {**document, "head": heads[head]}


class TestModel:
    @pytest.mark.parametrize("head", ["bayes", "linear"])
    def test_is_a_classifier_and_a_flow(self, head):
        model, x = invflow.build_model(spec(head)).double(), torch.randn(5, 2, dtype=torch.float64)
        assert isinstance(model, Hybrid)
        assert isinstance(model, Classifier)
        assert isinstance(model, Flow)
        logits, log_prob = model(x)
        assert torch.equal(logits, model.logits(x))
        assert torch.equal(log_prob, model.log_prob(x))
        assert (model.inverse(model.features(x)) - x).abs().max() < 1e-12
        assert model.sample(7).shape == (7, 2)

    def test_bayes_rule(self):
        """p(c | x) p(x) = weight_c p_c(x), whatever the weights and the scales are."""
        model, x = invflow.build_model(spec()).double(), torch.randn(5, 2, dtype=torch.float64)
        prior = model.prior
        with torch.no_grad():
            prior.logits.copy_(torch.tensor([0.3, -1.0]))
            prior.log_scales.normal_()
        logits, log_prob = model(x)
        z, log_det = model.bijection.forward_and_log_det(x)
        for k, weight in enumerate(prior.logits.softmax(0)):
            of_class = torch.distributions.Normal(prior.means[k], prior.log_scales[k].exp()).log_prob(z).sum(1)
            joint = weight.log() + of_class + log_det
            assert (logits.log_softmax(1)[:, k] + log_prob - joint).abs().max() < 1e-12

    def test_bayes_rule_is_linear_for_equal_scales(self):
        prior = GaussianMixture(components=3, learn_scales=False, shape=(4,)).double()
        z = torch.randn(9, 4, dtype=torch.float64)
        logits = BayesHead()(z, prior)
        difference = logits - logits[:, :1]
        ones = torch.cat([z, torch.ones(9, 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(ones, difference).solution
        assert (ones @ solution - difference).abs().max() < 1e-10

    def test_a_document_and_a_checkpoint_hold_both(self, tmp_path):
        model, x = invflow.build_model(spec("linear")), torch.randn(5, 2)
        assert {"head", "prior"} <= invflow.to_spec(model).keys()
        invflow.save(model, tmp_path / "saved")
        again = invflow.load(tmp_path / "saved")
        assert type(again) is Hybrid
        assert all(map(torch.equal, again(x), model(x)))

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (spec(prior={"type": "standard_normal"}), "head: a bayes head expects a gaussian_mixture prior with"),
            ({**spec(), "prior": None}, "head: a bayes head expects a gaussian_mixture prior beside it, got none"),
            ({**spec(), "layers": [{"type": "duplicate"}]}, "prior: a flow expects a chain that adds no dimensions"),
        ],
    )
    def test_what_does_not_fit(self, document, message):
        with pytest.raises(SpecError, match=message):
            invflow.build_model({name: value for name, value in document.items() if value is not None})

    def test_in_python(self):
        chain = invflow.Sequential()
        with pytest.raises(InvflowError, match="a bayes head expects"):
            Hybrid(chain, BayesHead(), StandardNormal(shape=(2,)))
        assert Hybrid(chain, LinearHead(3, shape=(2,)), StandardNormal(shape=(2,)))(torch.zeros(4, 2))[0].shape == (
            4,
            3,
        )


class TestTraining:
    def test_learns_both(self, tmp_path, capsys):
        run = invflow.train(spec(epochs=12), tmp_path / "run", progress=False)
        found = invflow.evaluate(run)
        assert found.test_accuracy > 0.95
        assert found.test_nll < 1.5
        assert set(found.scores) == {"test_accuracy", "test_nll"}
        assert run.record["best_test_accuracy"] >= found.test_accuracy - 1e-9
        for verb in (["evaluate"], ["sample", "--json", "--count", "3"], ["check"]):
            with pytest.raises(SystemExit) as ended:
                main([verb[0], str(run.folder), *verb[1:]])
            assert ended.value.code == 0, capsys.readouterr().err

    def test_the_weight_of_the_density(self, tmp_path):
        """The loss is the cross-entropy plus the weighted negative log-density per dimension."""
        model = invflow.build_model(spec("linear"))
        values, labels = torch.randn(8, 2), torch.arange(8) % 2
        data = DataSet("some", InMemory(values, labels), InMemory(values, labels), class_names=("a", "b"))
        options = invflow.load_spec(spec("linear", density_weight=0.25)).training
        loss, more = (
            task_of(model, data).training(task_of(model, data), options).measure("train", Batch(values, labels))
        )
        logits, log_prob = model(values)
        expected = torch.nn.functional.cross_entropy(logits, labels) - 0.25 * log_prob.mean() / 2
        torch.testing.assert_close(loss, expected)
        assert more["nll"] == -log_prob.mean()

    def test_labels_that_it_does_not_know(self):
        model = invflow.build_model(spec())
        with pytest.raises(DataError, match="the label 3, but the model knows the classes 0 to 1"):
            invflow.evaluate(model, (torch.randn(8, 2), torch.full((8,), 3)))

    def test_under_a_trainer_of_ones_own(self):
        """The loss is per dimension of the model, which no data tell."""
        model = Hybrid(invflow.Sequential(), LinearHead(2, shape=(4,)), StandardNormal(shape=(4,)))
        x, y = torch.randn(8, 4), torch.arange(8) % 2
        loss, _ = invflow.lightning(model).measure("train", Batch(x, y))
        logits, log_prob = model(x)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, y) - log_prob.mean() / 4)

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (spec(prior={**MIXTURE, "components": 3}), "prior: moons has 2 classes, the prior 3 components"),
            ({**spec("linear"), "head": {"type": "linear", "classes": 3}}, "moons has 2 classes, the head 3"),
            ({**spec(density_weight=2.0), "head": None, "prior": MIXTURE}, "density_weight is for a model of both"),
            ({**spec("linear", midpoints={}), "layers": [{"type": "duplicate"}], "prior": None}, "adds dimensions"),
        ],
    )
    def test_what_does_not_fit(self, tmp_path, document, message):
        document = {name: value for name, value in document.items() if value is not None}
        with pytest.raises(SpecError, match=message):
            invflow.train(document, tmp_path / "run", progress=False)


def a_task(chain, values, labels):
    samples = InMemory(values, labels)
    data = DataSet("some", samples, samples, class_names=tuple(map(str, range(int(labels.max()) + 1))))
    return Classification(Classifier(chain, LinearHead(2, shape=(2,))).double(), data)


class TestMidpoints:
    def test_the_loss(self):
        """Half-way between two points under the identity, beside the training points of both classes alone."""
        values = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0], [1.0, 0.1]], dtype=torch.float64)
        task = a_task(invflow.Sequential(), values, torch.tensor([0, 1, 1, 2]))
        loss = MidpointLoss(task, Midpoints(weight=0.5, width=0.3))
        batch = Batch(values[:2], torch.tensor([0, 1]))
        torch.manual_seed(0)
        found = {round(float(loss(batch, task.model)), 12) for _ in range(20)}
        nearness = sum(math.exp(-d / (2 * 0.3**2)) for d in (1.0, 1.0, 9.0))
        assert found <= {0.0, round(-0.5 * math.log(nearness), 12)}  # 0 where the two fell on themselves
        assert len(found) == 2

    def test_gradients_run_through_the_inverse(self):
        torch.manual_seed(0)
        chain = invflow.build({"input": {"shape": [2]}, "layers": COUPLINGS})
        values, labels = torch.randn(16, 2, dtype=torch.float64), torch.arange(16) % 2
        task = a_task(chain, values, labels)
        loss = MidpointLoss(task, Midpoints())
        weight = next(chain.parameters())

        def value():
            torch.manual_seed(1)
            return loss(Batch(values, labels), task.model)

        (slope,) = torch.autograd.grad(value(), weight)
        step = torch.zeros_like(weight)
        step.view(-1)[0] = 1e-6
        with torch.no_grad():
            weight.add_(step)
            above = value()
            weight.sub_(2 * step)
            below = value()
        assert float((above - below) / 2e-6) == pytest.approx(float(slope.view(-1)[0]), rel=1e-5)

    def test_it_begins_after_a_fraction_of_the_steps(self, tmp_path):
        """Before, a run is bit for bit that without; after, it is not."""
        base = {"epochs": 4, "data": {"name": "moons", "train_size": 256}}
        runs = {
            name: invflow.train(spec("linear", **base, **more), tmp_path / name, progress=False)
            for name, more in {
                "without": {},
                "late": {"midpoints": {"start": 0.99}},
                "early": {"midpoints": {"start": 0.0}},
            }.items()
        }
        losses = {name: [row["train_loss"] for row in run.metrics] for name, run in runs.items()}
        assert losses["late"] == losses["without"]
        assert losses["early"][-1] != losses["without"][-1]

    def test_targets_are_of_every_class(self, monkeypatch):
        """Of many samples, sorted by class, some of each class are targets."""
        monkeypatch.setattr("invflow.training.midpoints.MOST_TARGETS", 10)
        values, labels = torch.randn(40, 2, dtype=torch.float64), torch.arange(40) // 20
        task = a_task(invflow.Sequential(), values, labels)
        loss = MidpointLoss(task, Midpoints())
        assert torch.isfinite(loss(Batch(values, labels), task.model))

    def test_without_training_samples(self):
        with pytest.raises(InvflowError, match=r"train with invflow\.fit"):
            invflow.lightning(Classifier(invflow.Sequential(), LinearHead(2, shape=(2,))), midpoints={})

    def test_no_gradients_on_a_grid(self):
        chain = invflow.build({"input": {"shape": [2]}, "layers": [], "numerics": {"mode": "snap"}})
        values = torch.zeros(4, 2)
        task = a_task(chain, values, torch.arange(4) % 2)
        with pytest.raises(InvflowError, match="leave numerics out"):
            MidpointLoss(task, Midpoints())


class TestPixels:
    """A dequantised image has its pixels in the middles of their cells, and comes back onto the grid."""

    @pytest.mark.parametrize("name", ["hybrid_digits", "irevnet_digits"])
    def test_centered_and_rounded(self, name):
        from invflow.training.data import load_data

        document = invflow.load_spec(f"specs/{name}.json")
        task = task_of(invflow.build_model(document), load_data(document.training.data))
        images = task.data.test.first(20).values
        there = task.centered(images)
        assert torch.equal(task.rounded(there), images)
        chain = task.model.bijection
        if chain.awaits_data:
            task.initialize(task.data.train.first(64))
        with torch.no_grad():
            assert torch.equal(task.rounded(chain.inverse(chain(there))), images)
