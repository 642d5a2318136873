"""Training: data, augmentation, optimisers, runs that are interrupted and resumed."""

from __future__ import annotations

import errno
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import invflow
from invflow.errors import DataError, RunError, UnfinishedWarning
from invflow.samples import InMemory
from invflow.spec.training import (
    SGD,
    Adam,
    Adamax,
    AdamW,
    Augmentation,
    Cosine,
    Data,
    Elastic,
    OneCycle,
    RandomAffine,
    RMSprop,
    Stroke,
    Training,
)
from invflow.training import run as runs
from invflow.training import saving
from invflow.training.augment import Augment
from invflow.training.data import load_data, seed_at, train_loader
from invflow.training.module import ModelTraining, make_optimizer, make_schedule
from invflow.training.public import evaluate
from invflow.training.run_folder import Run, folder_name


def tiny(**training):
    options = {"data": {"name": "digits", "train_size": 64}, "batch_size": 16, "epochs": 4, **training}
    coupling = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [4], "norm": "batch"}}
    return invflow.load_spec(
        {
            "name": "tiny",
            "input": {"shape": [1, 8, 8]},
            "layers": [{"type": "psi", "block_size": 2}, {"type": "split"}, coupling, coupling, {"type": "merge"}],
            "head": {"type": "linear", "classes": 10},
            "training": {"optimizer": {"type": "sgd", "lr": 0.05, "momentum": 0.9}, **options},
        }
    )


class TestData:
    def test_digits_lie_on_a_grid_of_sixteenths(self):
        data = load_data(Data())
        assert data.shape == (1, 8, 8)
        assert (len(data.train), len(data.test)) == (1348, 449)
        assert torch.equal(data.train.all().values * 16, (data.train.all().values * 16).round())
        assert sorted(data.test.labels.unique().tolist()) == list(range(10))

    def test_mnist_is_the_first_images_over_256(self, mnist_root):
        data = load_data(Data(name="mnist", train_size=500), mnist_root)
        assert data.shape == (1, 28, 28)
        assert (len(data.train), len(data.test)) == (500, 10_000)
        assert data.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
        assert data.train.all().values.max() == 255 / 256

    def test_an_absent_data_set_is_one_line(self, tmp_path):
        with pytest.raises(DataError, match=r"mnist is not in .*may not be downloaded; name the folder.*--data-root"):
            load_data(Data(name="mnist"), tmp_path)

    def test_more_images_than_there_are(self):
        with pytest.raises(DataError, match="digits has 1348 training samples, the spec asks for 5000"):
            load_data(Data(train_size=5000))

    def test_each_epoch_has_its_own_order_which_the_seed_decides(self):
        images = InMemory(torch.zeros(10, 1, 2, 2), torch.arange(10))

        def orders(seed):
            loaders = [train_loader(images, 4, seed_at(seed, epoch)) for epoch in range(3)]
            return [torch.cat([share.batch.labels for share in loader]).tolist() for loader in loaders]

        assert orders(0) == orders(0) != orders(1)
        assert len({tuple(order) for order in orders(0)}) == 3
        assert all(sorted(order) == list(range(10)) for order in orders(0))
        assert [share.number for share in train_loader(images, 4, 0)] == [4, 4, 2]
        assert [share.number for share in train_loader(images, 9, 0)] == [10], "a batch of one has no statistics"


class TestAugmentation:
    def test_nothing_to_do_is_the_identity(self):
        images = torch.rand(3, 1, 8, 8)
        torch.testing.assert_close(Augment(Augmentation())(images), images, atol=1e-5, rtol=0)  # one bilinear sampling

    def test_each_image_has_its_own_change(self):
        image = torch.rand(1, 1, 28, 28)
        for options in (Augmentation(affine=RandomAffine(degrees=20)), Augmentation(elastic=Elastic())):
            first, second = Augment(options)(image.expand(2, -1, -1, -1))
            assert not torch.allclose(first, second, atol=1e-2)

    def test_strokes_become_thicker_and_thinner(self):
        line = torch.zeros(64, 1, 9, 9)
        line[..., 3:6] = 1
        torch.manual_seed(0)
        changed = Augment(Augmentation(stroke=Stroke(probability=1.0)))(line)
        assert changed.min() >= 0
        assert changed.max() <= 1
        widths = changed[:, 0, 4].sum(1)
        assert widths.min() < 2.6
        assert widths.max() > 3.4
        unchanged = Augment(Augmentation(stroke=Stroke(probability=0.0)))(line)
        torch.testing.assert_close(unchanged, line, atol=1e-5, rtol=0)

    def test_a_right_angle_is_a_rotation(self, monkeypatch):
        image = torch.rand(1, 1, 8, 8)
        monkeypatch.setattr(torch, "rand", torch.ones)  # the upper limit of every range
        turned = Augment(Augmentation(affine=RandomAffine(degrees=90)))(image)
        torch.testing.assert_close(turned, image.rot90(-1, (2, 3)), atol=1e-5, rtol=0)

    def test_a_shift_moves_by_its_fraction(self, monkeypatch):
        image = torch.rand(1, 1, 8, 8)
        monkeypatch.setattr(torch, "rand", torch.ones)
        moved = Augment(Augmentation(affine=RandomAffine(translate=0.25)))(image)
        torch.testing.assert_close(moved[..., 2:, 2:], image[..., :-2, :-2], atol=1e-5, rtol=0)
        assert moved[..., :2, :].abs().max() < 1e-5

    def test_the_elastic_strength_is_torchvisions(self):
        from torchvision.transforms.v2 import ElasticTransform

        from invflow.training.augment import _displacements

        torch.manual_seed(0)
        ours = _displacements(Elastic(alpha=90, sigma=4), 200, 28, 28)
        theirs = torch.cat(
            [ElasticTransform(90.0, 4.0).make_params([torch.zeros(1, 28, 28)])["displacement"] for _ in range(200)]
        )
        # The distributions differ by the width of the reflected border only: those of 400 fields agree within 10 %.
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)


class TestOptimisers:
    @pytest.mark.parametrize(
        ("options", "kind"),
        [
            (SGD(type="sgd", lr=0.1, momentum=0.5, nesterov=True), torch.optim.SGD),
            (Adam(type="adam", lr=0.1), torch.optim.Adam),
            (AdamW(type="adamw", lr=0.1, weight_decay=0.3), torch.optim.AdamW),
            (Adamax(type="adamax", lr=0.1, betas=(0.8, 0.9)), torch.optim.Adamax),
            (RMSprop(type="rmsprop", lr=0.1, alpha=0.9, momentum=0.5), torch.optim.RMSprop),
        ],
    )
    def test_the_spec_names_the_optimiser(self, options, kind):
        optimizer = make_optimizer(options, torch.nn.Linear(2, 2))
        assert type(optimizer) is kind
        for name, value in options.model_dump(exclude={"type"}).items():
            assert optimizer.defaults[name] == value

    def test_schedules_reach_their_ends(self):
        def rates(options):
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
            schedule = make_schedule(options, optimizer, 100)
            found = []
            for _ in range(100):
                found.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step() if len(found) < 100 else None
            return found

        cycle = rates(OneCycle(type="one_cycle", warmup=0.25, start_factor=10, final_factor=100))
        assert cycle[0] == pytest.approx(0.01)
        assert max(cycle) == pytest.approx(0.1)
        assert cycle.index(max(cycle)) == 24
        assert cycle[-1] == pytest.approx(0.0001)
        cosine = rates(Cosine(type="cosine", final_lr=0.02))
        assert cosine[0] == pytest.approx(0.1)
        assert cosine[50] == pytest.approx(0.06)
        assert all(later < earlier for earlier, later in itertools.pairwise(cosine))


def fill_the_disk(patch, name, at=1):
    """From the given time on that a file of this name is to be replaced, there is no space for it."""
    replace, left = Path.replace, [at]

    def full(temporary, target):
        left[0] -= target.name == name
        if target.name == name and left[0] < 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(temporary, target)

    patch.setattr(Path, "replace", full)


class TestRuns:
    def test_a_run_folder_holds_everything(self, tmp_path):
        run = runs.train(tiny(), tmp_path / "run", overrides={"epochs": 2, "lr": 0.01, "seed": 3}, progress=False)
        reopened = Run.open(tmp_path / "run")
        assert reopened.record["status"] == "finished"
        assert reopened.record["overrides"] == {"epochs": 2, "lr": 0.01, "seed": 3}
        assert (reopened.training.epochs, reopened.training.optimizer.lr, reopened.training.seed) == (2, 0.01, 3)
        assert {"torch", "invflow", "python"} <= set(reopened.record["versions"])
        assert [row["epoch"] for row in run.metrics] == [0, 1]
        assert {"train_loss", "train_accuracy", "test_loss", "test_accuracy"} <= set(run.metrics[0])
        logged = EventAccumulator(str(next((tmp_path / "run" / "logs" / "tensorboard").rglob("events*")))).Reload()
        for name in run.metrics[0].keys() - {"step"}:
            points = [(point.step, point.value) for point in logged.Scalars(name)]
            assert points == [(row["step"], pytest.approx(row[name])) for row in run.metrics]
        assert isinstance(invflow.load(tmp_path / "run" / "best"), invflow.Classifier)
        found = evaluate(reopened)
        assert found.test_accuracy == pytest.approx(run.metrics[-1]["test_accuracy"], abs=1e-6)
        for (dtype, _), trip in found.round_trips.items():
            assert trip.relative <= 64 * torch.finfo(getattr(torch, dtype)).eps  # two couplings: a few roundings

    def test_the_same_seed_gives_the_same_weights(self, tmp_path):
        a, b, c = (
            runs.train(tiny(seed=seed, epochs=1), tmp_path / name, progress=False).load().state_dict()
            for name, seed in (("a", 1), ("b", 1), ("c", 2))
        )
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not all(torch.equal(a[name], c[name]) for name in a)

    @pytest.mark.parametrize("epoch", [0, 2])
    def test_an_interrupted_run_ends_as_if_it_had_not_been(self, tmp_path, monkeypatch, epoch):
        spec = tiny(
            data={"name": "digits", "train_size": 64, "augmentation": {"affine": {"degrees": 10}}},
            schedule={"type": "one_cycle"},
        )
        whole = runs.train(spec, tmp_path / "whole", progress=False)

        step = ModelTraining.training_step

        def interrupt(module, batch, index):
            if module.current_epoch == epoch and index == 2:
                raise KeyboardInterrupt
            return step(module, batch, index)

        with monkeypatch.context() as patch:
            patch.setattr(ModelTraining, "training_step", interrupt)
            with pytest.raises(KeyboardInterrupt):
                runs.train(spec, tmp_path / "run", progress=False)
        with pytest.warns(UnfinishedWarning, match=f"those after {epoch} of 4 epochs"):
            assert isinstance(invflow.load(tmp_path / "run"), invflow.Classifier), "not readable after it"
        assert Run.open(tmp_path / "run").record["epochs_done"] == epoch
        run = runs.resume(tmp_path / "run", progress=False)
        expected, found = whole.load().state_dict(), run.load().state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert [row["epoch"] for row in run.metrics] == [0, 1, 2, 3]
        assert run.metrics[-1]["test_accuracy"] == whole.metrics[-1]["test_accuracy"]
        assert runs.resume(tmp_path / "run").record == run.record, "a finished run is left as it is"

    def test_the_last_epoch_is_evaluated_whatever_the_interval(self, tmp_path):
        run = runs.train(tiny(epochs=3, evaluate_every=2), tmp_path / "run", progress=False)
        weights = run.load().state_dict()
        every = runs.train(tiny(epochs=3), tmp_path / "every", progress=False).load().state_dict()
        assert all(torch.equal(weights[name], every[name]) for name in weights)
        assert [row["epoch"] for row in run.metrics] == [0, 1, 2]
        assert "test_accuracy" in run.metrics[-1]
        assert run.record["epochs_done"] == 3

    def test_a_folder_that_holds_something_is_not_touched(self, tmp_path):
        (tmp_path / "precious").write_text("data")
        with pytest.raises(RunError, match="exists already"):
            runs.train(tiny(), tmp_path)
        assert (tmp_path / "precious").read_text() == "data"

    def test_a_run_has_one_owner(self, tmp_path):
        run = runs.train(tiny(epochs=1), tmp_path / "run", progress=False)
        run.update(status="training")
        (tmp_path / "new").mkdir()
        with runs.owned(tmp_path / "run"), runs.owned(tmp_path / "new"):
            with pytest.raises(RunError, match="run: another process writes this run"):
                runs.resume(tmp_path / "run", progress=False)
            with pytest.raises(RunError, match="new: another process writes this run"):
                runs.train(tiny(epochs=1), tmp_path / "new", progress=False)
        assert runs.resume(tmp_path / "run", progress=False).record["status"] == "finished"
        assert runs.train(tiny(epochs=1), tmp_path / "new", progress=False).record["status"] == "finished"

    @pytest.mark.parametrize(("apart", "states"), [(0.0, 4), (1e6, 2)])
    def test_the_state_is_saved_at_most_once_a_second(self, tmp_path, monkeypatch, apart, states):
        """At the ends of epochs: of the first and the last always. What fails between has the metrics all the same."""
        written: list[Path] = []
        write = saving.write_atomically
        monkeypatch.setattr(saving, "_SECONDS_APART", apart)
        monkeypatch.setattr(saving, "write_atomically", lambda path, text: (written.append(path), write(path, text)))
        whole = runs.train(tiny(), tmp_path / "whole", progress=False)
        assert [path.name for path in written].count("last.ckpt") == states
        assert len(whole.metrics) == 4

        def fail(module: ModelTraining) -> None:
            if module.current_epoch == 3:
                raise RuntimeError("a layer is wrong")

        with monkeypatch.context() as patch:
            patch.setattr(ModelTraining, "on_train_epoch_start", fail)
            with pytest.raises(RuntimeError, match="a layer is wrong"):
                runs.train(tiny(), tmp_path / "failed", progress=False)
        assert Run.open(tmp_path / "failed").metrics == whole.metrics[:3]
        again = runs.resume(tmp_path / "failed", progress=False)
        assert again.metrics == whole.metrics
        expected, found = whole.load().state_dict(), again.load().state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)

    @pytest.mark.parametrize("name", ["run.json", "spec.json", "last.ckpt", "metrics.csv"])
    def test_a_full_disk_leaves_a_run_to_resume(self, tmp_path, monkeypatch, name):
        whole = runs.train(tiny(epochs=2), tmp_path / "whole", progress=False)
        folder = tmp_path / "run"
        with monkeypatch.context() as patch:
            fill_the_disk(patch, name, at=2)
            with pytest.raises(OSError, match="No space left on device") as error:
                runs.train(tiny(epochs=2), folder, progress=False)
        assert Path(error.value.filename).name == name
        assert {path.name for path in folder.rglob(".*")} == set(), "partial files stay"
        (folder / "resume").mkdir(exist_ok=True)
        (folder / "resume" / ".last.ckpt.0123abcd").write_text("of a training that was killed")
        run = runs.resume(folder, progress=False)
        assert [path.name for path in (folder / "resume").iterdir()] == ["last.ckpt"]
        expected, found = whole.load().state_dict(), run.load().state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert run.metrics == whole.metrics

    def test_a_run_that_cannot_begin_leaves_nothing(self, tmp_path, monkeypatch):
        with monkeypatch.context() as patch:
            fill_the_disk(patch, "run.json")
            with pytest.raises(OSError, match=r"No space left on device: .*run\.json"):
                runs.train(tiny(epochs=1), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    def test_of_two_trainings_into_one_folder_one_gets_in(self, tmp_path, monkeypatch):
        """The second comes after the first was told that the folder is empty."""
        initialized = runs._initialized
        other = tmp_path / "run"

        def meanwhile(spec, data, model):
            with monkeypatch.context() as patch:
                patch.setattr(runs, "_initialized", initialized)
                runs.train(tiny(epochs=1, seed=1), other, progress=False)
            return initialized(spec, data, model)

        monkeypatch.setattr(runs, "_initialized", meanwhile)
        with pytest.raises(RunError, match="exists already"):
            runs.train(tiny(epochs=1), other, progress=False)
        assert Run.open(other).training.seed == 1
        assert Run.open(other).record["status"] == "finished"

    @pytest.mark.parametrize("content", [None, "{", "[]"])
    def test_a_folder_that_is_no_run(self, tmp_path, content):
        if content is not None:
            invflow.save(invflow.build_model(tiny()), tmp_path)
            (tmp_path / "run.json").write_text(content)
        with pytest.raises(RunError, match="no run here" if content is None else "cannot be read"):
            Run.open(tmp_path)

    def test_a_truncated_state_cannot_be_gone_on_from(self, tmp_path):
        run = runs.train(tiny(epochs=1), tmp_path / "run", progress=False)
        run.update(status="training")
        last = tmp_path / "run" / "resume" / "last.ckpt"
        last.write_bytes(last.read_bytes()[:1000])
        with pytest.raises(RunError, match=r"last\.ckpt: cannot be resumed"):
            runs.resume(tmp_path / "run", progress=False)

    def test_averages_of_the_weights_are_what_is_measured_and_saved(self, tmp_path, monkeypatch):
        seen, step = [], ModelTraining.optimizer_step

        def stepped(module, *args, **kwargs):
            step(module, *args, **kwargs)
            seen.append(module.model.head.linear.weight.detach().clone())

        monkeypatch.setattr(ModelTraining, "optimizer_step", stepped)
        run = runs.train(tiny(average={"decay": 0.8}, epochs=2), tmp_path / "run", progress=False)
        expected = seen[0]
        for weight in seen[1:]:
            expected = 0.8 * expected + 0.2 * weight
        torch.testing.assert_close(run.model.head.linear.weight, expected, atol=1e-6, rtol=1e-5)  # float32
        assert not torch.allclose(run.model.head.linear.weight, seen[-1], atol=1e-4)
        assert evaluate(run).test_accuracy == pytest.approx(run.metrics[-1]["test_accuracy"], abs=1e-6)

    @pytest.mark.parametrize("name", ["../../escape", "/absolute", "..", "a/b", "", None, "x" * 500])
    def test_a_specs_name_leads_to_no_other_folder(self, name):
        made = folder_name(tiny().replace(name=name))
        assert made
        assert Path("runs") / made == (Path("runs") / made).parent / Path(made).name
        assert len(made) <= 60

    def test_a_spec_that_cannot_be_trained_leaves_no_folder(self, tmp_path):
        spec = tiny().replace(input={"shape": [1, 8, 8], "context_shape": [2]})
        with pytest.raises(invflow.SpecError, match=r"input\.context_shape: digits gives no context"):
            runs.train(spec, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_images_that_do_not_fit_the_spec(self, tmp_path):
        spec = tiny().replace(input={"shape": [1, 28, 28]})
        with pytest.raises(invflow.SpecError, match=r"input.shape: digits has images of shape \(1, 8, 8\)"):
            runs.train(spec, tmp_path / "run")
        spec = tiny().replace(head={"type": "linear", "classes": 3})
        with pytest.raises(invflow.SpecError, match=r"head.classes: digits has 10 classes, the head 3"):
            runs.train(spec, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_overrides_fill_in_what_the_spec_leaves_out(self):
        spec = invflow.load_spec({"input": {"shape": [2]}, "layers": [], "head": {"type": "linear", "classes": 2}})
        training = runs.overridden(spec, {"lr": 0.5, "train_size": 7}).training
        assert training == Training(
            data=Data(train_size=7), optimizer=Training().optimizer.model_copy(update={"lr": 0.5})
        )

    def test_run_json_is_plain_data(self, tmp_path):
        runs.train(tiny(epochs=1), tmp_path / "run", progress=False)
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert math.isfinite(record["seconds"])
