"""What a Python program calls to train, measure and draw models of its own data."""

from __future__ import annotations

import lightning
import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import invflow
from invflow.cli import main
from invflow.errors import DataError, InvflowError
from invflow.samples import DataSet, InMemory
from invflow.training.run_folder import Run

FLOW = {
    "input": {"shape": [2]},
    "layers": [{"type": "affine"}, {"type": "linear_1x1"}],
    "prior": {"type": "standard_normal"},
}
CLASSIFIER = {
    "input": {"shape": [1, 4, 4]},
    "layers": [{"type": "psi", "block_size": 2}, {"type": "actnorm"}],
    "head": {"type": "linear", "classes": 3},
}
CONDITIONAL = {
    "input": {"shape": [2], "context_shape": [3]},
    "layers": [
        {"type": "split"},
        {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [8]}},
        {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [8]}},
        {"type": "merge"},
    ],
    "prior": {"type": "standard_normal"},
}
QUIET = {"epochs": 2, "progress": False, "batch_size": 16}


def points(count=60):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0))


def images(count=60):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    pixels[:, 0, 0] = (labels * 100).byte()[:, None]
    return pixels, labels


class Pairs(Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, position):
        pixels, labels = images()
        return pixels[position] / 256, labels[position]


class Module(lightning.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(Pairs(), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Pairs(), batch_size=30)


class TestFit:
    @pytest.mark.parametrize("kind", [torch.as_tensor, lambda x: x.numpy(), lambda x: x.numpy().astype(np.float64)])
    def test_values_alone(self, tmp_path, kind):
        run = invflow.fit(FLOW, kind(points()), tmp_path / "run", **QUIET)
        assert run.spec.training.data.name == "given"
        assert run.model.log_prob(points()).isfinite().all()
        assert [row["epoch"] for row in run.metrics] == [0, 1]
        assert len(invflow.open_run(str(tmp_path / "run")).metrics) == 2

    @pytest.mark.parametrize("kind", ["arrays", "dataset", "loader", "module", "data set"])
    def test_images_with_labels(self, tmp_path, kind):
        pixels, labels = images()
        samples = InMemory(pixels, labels, levels=256)
        given = {
            "arrays": (pixels.numpy(), labels.numpy()),
            "dataset": Pairs(),
            "loader": DataLoader(Pairs(), batch_size=16, shuffle=True),
            "module": Module(),
            "data set": DataSet("mine", samples, samples, levels=256, class_names=("a", "b", "c")),
        }[kind]
        test = {"test": (pixels, labels)} if kind == "loader" else {}
        run = invflow.fit(CLASSIFIER, given, tmp_path / "run", **{**QUIET, "epochs": 8}, lr=0.05, **test)
        assert run.metrics[-1]["test_accuracy"] > 0.9
        assert invflow.evaluate(run, (pixels, labels)).test_accuracy > 0.9

    def test_a_model_is_trained_itself(self, tmp_path):
        model = invflow.build_model(FLOW)
        before = invflow.evaluate(model, 3 + points()).test_nll
        run = invflow.fit(model, 3 + points(), tmp_path / "run", **{**QUIET, "epochs": 20}, lr=0.1)
        assert invflow.evaluate(model, 3 + points()).test_nll < before - 1
        assert torch.equal(run.model.log_prob(points()), model.eval().log_prob(points()))

    def test_a_model_that_was_composed_in_python(self, tmp_path):
        chain = invflow.Sequential(invflow.bijections.Affine(shape=(2,)))
        flow = invflow.Flow(chain, invflow.models.StandardNormal(shape=(2,)))
        assert invflow.fit(flow, points(), tmp_path / "run", **QUIET).spec.input_shape == (2,)

    def test_without_a_folder_a_new_one_is_made(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        first, second = (invflow.fit(FLOW, points(), **QUIET) for _ in range(2))
        assert first.folder.parent.name == second.folder.parent.name == "runs"
        assert first.folder != second.folder

    @pytest.mark.parametrize("named", ["moons", {"name": "moons", "noise": 0.05, "train_size": 100, "test_size": 50}])
    def test_data_by_name(self, tmp_path, named):
        run = invflow.fit(FLOW, named, tmp_path / "run", **QUIET)
        assert run.spec.training.data.name == "moons"
        assert invflow.evaluate(run).test_nll == pytest.approx(run.record["test_nll"], abs=1e-5)

    def test_the_context_is_the_second_entry_or_the_labels(self, tmp_path):
        labels = torch.arange(60) % 3
        context = torch.nn.functional.one_hot(labels).float()
        runs = [
            invflow.fit(CONDITIONAL, (points(), context), tmp_path / "a", **QUIET),
            invflow.fit(CONDITIONAL, (points(), labels), tmp_path / "b", context="labels", **QUIET),
        ]
        losses = [[row["train_loss"] for row in run.metrics] for run in runs]
        assert losses[0] == losses[1]
        with pytest.raises(invflow.SpecError, match="context_shape: given gives no context"):
            invflow.fit(CONDITIONAL, points(), tmp_path / "c", **QUIET)
        with pytest.raises(invflow.SpecError, match="but the input has no context_shape"):
            invflow.fit(FLOW, (points(), context), tmp_path / "c", **QUIET)

    @pytest.mark.parametrize("kind", ["arrays", "loader"])
    def test_an_interrupted_run_is_resumed_with_the_same_data(self, tmp_path, kind):
        pixels, labels = images()
        given, test = (pixels, labels), {}
        if kind == "loader":  # whose order is drawn from torch's global generator
            given, test = DataLoader(Pairs(), batch_size=16, shuffle=True), {"test": given}
        options = {**QUIET, "epochs": 4, "save_every": 1, **test}
        whole = invflow.fit(CLASSIFIER, given, tmp_path / "whole", **options)
        model, steps = invflow.build_model(CLASSIFIER), []

        def interrupt(*_):
            steps.append(None)
            if len(steps) == 8:
                raise KeyboardInterrupt

        hook = model.head.register_full_backward_hook(interrupt)
        torch.manual_seed(0)  # as the training of a spec begins
        model.load_state_dict(invflow.build_model(CLASSIFIER).state_dict())
        with pytest.raises(KeyboardInterrupt):
            invflow.fit(model, given, tmp_path / "run", **options)
        hook.remove()
        torch.rand(7)  # another state of the generator
        run = invflow.fit(CLASSIFIER, given, tmp_path / "run", resume=True, progress=False, **test)
        assert run.metrics == whole.metrics
        weights, expected = run.load().state_dict(), whole.load().state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)

    def test_measured_on_a_loader(self, tmp_path):
        run = invflow.fit(CLASSIFIER, images(), tmp_path / "run", **QUIET)
        loader = DataLoader(Pairs(), batch_size=7)
        assert invflow.evaluate(run, loader).scores == invflow.evaluate(run, images()).scores
        with pytest.raises(DataError, match="a classifier is measured on samples with labels"):
            invflow.evaluate(run, images()[0])

    def test_an_exact_model_has_no_gradients(self, tmp_path):
        spec = {**CLASSIFIER, "layers": [{"type": "psi", "block_size": 2}], "numerics": {"mode": "exact"}}
        assert invflow.fit(spec, images(), tmp_path / "run", **QUIET).model.bijection.exactness == "exact"
        with pytest.raises(InvflowError, match="fit expects a model that is not exact yet"):
            invflow.fit(invflow.build_model(spec), images(), tmp_path / "other", **QUIET)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (torch.full((10, 2), torch.nan), "values: NaN or infinite in 10 of 10 rows, first in row 0"),
            (torch.zeros(0, 2), "values: expected at least one sample, in rows, got shape (0, 2)"),
            ((torch.zeros(10, 2), torch.arange(9)), "labels: expected 10 rows, as there are samples, got 9"),
            ((torch.zeros(10, 2), torch.arange(10) - 1), "labels: expected classes counted from 0, got -1"),
            ([[0.0, 1.0]], "data: expected numbers, as a tensor or a numpy array, got list"),
            (np.array([["a", "b"]]), "data: expected numbers, as a tensor or a numpy array, got an array of <U1"),
            (
                DataLoader(TensorDataset(torch.zeros(10, 2))),
                "fit expects test=, the test data, along with a",
            ),
        ],
    )
    def test_data_that_cannot_be_used_are_refused_in_one_line(self, tmp_path, data, message):
        with pytest.raises(DataError) as caught:
            invflow.fit(FLOW, data, tmp_path / "run", **QUIET)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    def test_a_chain_alone_is_no_model(self, tmp_path):
        with pytest.raises(InvflowError, match="head"):
            invflow.fit({"input": {"shape": [2]}, "layers": []}, points(), tmp_path / "run")


class TestOwnLoop:
    """The lab's own loop: plain PyTorch on `build_model`, then the tools on the folder of `invflow.save`."""

    SPEC = "tests/golden/v0.1/irevnet_digits.json"

    @pytest.fixture
    def folder(self, tmp_path):
        model = invflow.build_model(self.SPEC)
        from invflow.training.data import load_data

        samples = load_data(invflow.load_spec(self.SPEC).training.data).train.first(256)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(10):
            for x, y in zip(samples.values.split(64), samples.labels.split(64), strict=True):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        invflow.save(model, tmp_path / "mine")
        return tmp_path / "mine"

    @pytest.mark.parametrize("verb", ["evaluate", "check", "freeze", "interpolate"])
    def test_every_verb_takes_the_folder(self, folder, verb, capsys):
        with pytest.raises(SystemExit) as ended:
            main([verb, str(folder)])
        assert ended.value.code == 0, capsys.readouterr().err

    @pytest.mark.parametrize("from_fit", [True, False])
    def test_a_flow_is_sampled_without_data(self, tmp_path, from_fit, capsys):
        folder = tmp_path / "flow"
        if from_fit:
            invflow.fit(FLOW, points(), folder, **QUIET)
        else:
            invflow.save(invflow.build_model(FLOW), folder)
        for arguments in (["--json"], []):
            with pytest.raises(SystemExit) as ended:
                main(["sample", str(folder), "--count", "5", *arguments])
            assert ended.value.code == 0, capsys.readouterr().err
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", str(folder)])
        assert ended.value.code == 2
        expected = "passed to invflow.fit; pass them to" if from_fit else "digits is the default: name others in"
        assert expected in capsys.readouterr().err

    def test_a_conditional_flow_says_what_it_needs(self, tmp_path, capsys):
        invflow.save(invflow.build_model(CONDITIONAL), tmp_path / "flow")
        for arguments, status in ((["--context", "0,1,0"], 0), ([], 2), (["--context", "1"], 2)):
            with pytest.raises(SystemExit) as ended:
                main(["sample", str(tmp_path / "flow"), *arguments])
            assert ended.value.code == status, capsys.readouterr().err
        assert "--context expects 3 numbers with commas, got '1'" in capsys.readouterr().err

    def test_in_python(self, folder):
        assert invflow.evaluate(folder).test_accuracy > 0.5
        assert isinstance(invflow.open_run(folder), Run)


@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*does not have many workers", "ignore:.*log_every_n_steps"
)
class TestLightning:
    @pytest.mark.parametrize("document", [FLOW, CLASSIFIER])
    def test_a_trainer_of_your_own(self, tmp_path, document):
        model = invflow.build_model(document)
        pixels, labels = images()
        data = TensorDataset(points()) if document is FLOW else TensorDataset(pixels / 256, labels)
        module = invflow.lightning(model, lr=0.05)
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        loader = DataLoader(data, batch_size=16)
        trainer.fit(module, loader, loader)
        assert {"train_loss", "val_loss"} <= set(trainer.callback_metrics)
        assert trainer.callback_metrics["val_loss"] < 4


class TestPictures:
    def test_they_work_for_any_model_or_chain_and_show_in_a_notebook(self, tmp_path):
        pixels, labels = images(8)
        values = pixels / 256
        classifier, flow = invflow.build_model(CLASSIFIER).eval(), invflow.build_model(FLOW)
        run = invflow.fit(FLOW, points(), tmp_path / "run", **QUIET)
        figures = [
            invflow.plot.samples(classifier, (values, labels)),
            invflow.plot.samples(flow, points(), 50),
            invflow.plot.samples(run),
            invflow.plot.density(str(run.folder), points()),
            invflow.plot.psi(classifier, values),
            invflow.plot.reconstructions(classifier.bijection, values),
            invflow.plot.interpolation(classifier, values[:2], values[2:4]),
            invflow.plot.curves(run),
            run.plot(),
        ]
        for figure in figures:
            assert isinstance(figure, mpl.figure.Figure)
            assert figure._repr_png_().startswith(b"\x89PNG")

    def test_round_trips_and_walks(self):
        model, (pixels, _) = invflow.build_model(CLASSIFIER).eval(), images(4)
        values = pixels / 256
        assert invflow.round_trip(model, values).relative < 1e-6
        assert invflow.interpolate(model, values[:2], values[2:], steps=3).shape == (2, 3, 1, 4, 4)

    @pytest.mark.parametrize(
        ("draw", "message"),
        [
            (lambda model, x: invflow.plot.samples(model), "pass images and labels"),
            (invflow.plot.density, "expects a flow"),
            (lambda model, x: invflow.plot.psi(invflow.build_model(FLOW), x), "expects a chain with a psi layer"),
            (lambda model, x: invflow.plot.curves("nowhere"), "no run here"),
        ],
    )
    def test_what_cannot_be_drawn(self, draw, message):
        with pytest.raises(InvflowError, match=message):
            draw(invflow.build_model(CLASSIFIER), images()[0])


def test_reprs_are_short(tmp_path):
    run = invflow.fit(FLOW, points(), tmp_path / "run", **QUIET)
    for shown in (
        run,
        run.spec,
        invflow.evaluate(run, points()),
        DataSet("mine", InMemory(points()), InMemory(points())),
    ):
        assert len(repr(shown)) < 300, repr(shown)
    assert "<table" in run.metrics._repr_html_()
    assert run.metrics.column("train_loss") == [row["train_loss"] for row in run.metrics]
