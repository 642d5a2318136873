"""Learning rates step by step, and how long a training is."""

from __future__ import annotations

import json
import math

import lightning
import pytest
import torch

import invflow
from invflow.errors import InvflowError, SpecError
from invflow.spec.training import Training
from invflow.training import run as runs
from invflow.training.fit import quiet_lightning
from invflow.training.module import ModelTraining, make_schedules
from invflow.training.public import evaluate
from invflow.training.run_folder import Run
from tests.test_density_training import points
from tests.test_training import tiny

PEAK = 0.1
ROUNDING = 1e-12
"""Relative: PyTorch multiplies one rate by a factor to have the next, some dozens of times."""


def changed(spec, **training):
    """The spec with other entries of its training block; ``steps`` are in place of epochs."""
    return runs.overridden(spec, training)


def rates(count, an_epoch=1, /, **training):
    """The learning rate of each step."""
    options = Training.model_validate_json(json.dumps(training))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    schedules, found = make_schedules(options, optimizer, count), []
    for step in range(1, count + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for schedule in schedules:
            if schedule["interval"] == "step" or step % an_epoch == 0:
                schedule["scheduler"].step()
    return found


def watched(patch):
    """The learning rate of every step of the trainings to come, in one list."""
    step, found = ModelTraining.optimizer_step, []

    def stepped(module, *args, **kwargs):
        step(module, *args, **kwargs)  # which a test may interrupt
        found.append(module.trainer.optimizers[0].param_groups[0]["lr"])

    patch.setattr(ModelTraining, "optimizer_step", stepped)
    return found


def stop_at(patch, at):
    """Interrupt a training before it takes step ``at``, counted from 0."""
    step = ModelTraining.training_step

    def training_step(module, batch, index):
        if module.global_step == at:
            raise KeyboardInterrupt
        return step(module, batch, index)

    patch.setattr(ModelTraining, "training_step", training_step)


def require_resumed_exactly(folder, monkeypatch, spec, stops, **options):
    """Assert that interruptions change no learning rate, weight or metric; return the whole run and its rates."""
    with monkeypatch.context() as patch:
        expected = watched(patch)
        whole = runs.train(spec, folder / "whole", progress=False, **options)
    for stop in stops:
        place = folder / f"stopped-{stop}"
        with monkeypatch.context() as patch:
            found = watched(patch)
            with patch.context() as inner:
                stop_at(inner, stop)
                with pytest.raises(KeyboardInterrupt):
                    runs.train(spec, place, save_every=1, progress=False, **options)
            run = runs.resume(place, progress=False, **options)
        assert found == expected
        assert run.metrics == whole.metrics
        states = [one.load().state_dict() for one in (whole, run)]
        torch.testing.assert_close(*states, rtol=0, atol=0)
        records = [{**one.record, "seconds": None, "save_every": None} for one in (whole, run)]
        assert records[0] == records[1]
    return whole, expected


class TestWarmup:
    @pytest.mark.parametrize("warmup", [4, 0.4])
    def test_a_constant_rate_is_reached_in_equal_steps(self, warmup):
        expected = [PEAK * min((step + 1) / 5, 1) for step in range(10)]
        assert rates(10, warmup=warmup) == pytest.approx(expected, rel=ROUNDING)

    def test_a_cosine_falls_in_the_rest_of_the_steps(self):
        found = rates(10, warmup=4, schedule={"type": "cosine", "final_lr": 0.02})
        assert found[:4] == pytest.approx([PEAK * (step + 1) / 5 for step in range(4)], rel=ROUNDING)
        cosine = [0.02 + 0.08 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
        assert found[4:] == pytest.approx(cosine, rel=ROUNDING)

    def test_milestones_count_from_the_first_epoch(self):
        found = rates(12, 3, warmup=2, schedule={"type": "multi_step", "milestones": [1, 3], "factor": 0.5})
        rising = [PEAK / 3, 2 * PEAK / 3, PEAK]
        assert found == pytest.approx([*rising, *[PEAK / 2] * 6, *[PEAK / 4] * 3], rel=ROUNDING)

    def test_a_fraction_is_at_least_one_step(self):
        assert rates(3, warmup=0.01) == pytest.approx([PEAK / 2, PEAK, PEAK], rel=ROUNDING)

    @pytest.mark.parametrize(
        ("training", "place", "message"),
        [
            ({"warmup": 12}, "warmup", r"12 steps of warm-up in a run of 12; take fewer, or a fraction such as 0\.1"),
            ({"warmup": 1000}, "warmup", "1000 steps of warm-up in a run of 12"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, tmp_path, training, place, message):
        with pytest.raises(SpecError, match=rf"training\.{place}: {message}"):
            runs.train(points(**training), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


class Unsized(torch.utils.data.IterableDataset):
    """Points that nobody has counted."""

    def __iter__(self):
        yield from torch.randn(20, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [{"warmup": 0.1}, {"schedule": {"type": "cosine"}}])
def test_a_part_of_a_run_of_unknown_length_is_refused(tmp_path, training):
    loader = torch.utils.data.DataLoader(Unsized(), batch_size=5)
    why = f"{next(iter(training))}: the data do not say how many batches an epoch has; give the length"
    with pytest.raises(SpecError, match=rf"training\.{why}"):
        invflow.fit(points(), loader, tmp_path / "run", test=torch.randn(9, 2), progress=False, **training)
    with pytest.raises(InvflowError, match=why):
        rates(None, **training)


def lowered(values, patience, threshold, higher_is_better=False):
    """How often a plateau has lowered the rate before each epoch, from what was measured at the ends of epochs."""
    best, bad, times, found = None, 0, 0, []
    for value in values:
        found.append(times)
        if value is None:
            continue
        gain = math.inf if best is None else (value - best if higher_is_better else best - value)
        best, bad = (value, 0) if gain > threshold else (best, bad + 1)
        if bad > patience:
            times, bad = times + 1, 0
    return found


class TestPlateau:
    @pytest.mark.parametrize("evaluate_every", [1, 2])
    @pytest.mark.parametrize("make", [points, tiny])
    def test_it_watches_the_validation_samples(self, tmp_path, monkeypatch, make, evaluate_every):
        """Thresholds so large that most epochs are no improvement."""
        flow = make is points
        data = {"name": "moons" if flow else "digits", "train_size": 110, "test_size": 20, "validation_size": 30}
        patience, threshold = 2 - evaluate_every, 0.1
        plateau = {"type": "plateau", "factor": 0.5, "patience": patience, "threshold": threshold, "final_lr": PEAK / 5}
        optimizer = {"type": "adam", "lr": PEAK}
        options = {"epochs": 9, "batch_size": 40, "evaluate_every": evaluate_every, "optimizer": optimizer}
        spec = make(data=data, schedule=plateau, **options)
        run, found = require_resumed_exactly(tmp_path, monkeypatch, spec, [8, 11])
        values = run.metrics.column("val_nll" if flow else "val_accuracy")
        times = lowered(values, patience, threshold, higher_is_better=not flow)
        assert 0 < times[-1] < 4, "the test sees nothing"
        expected = [max(PEAK / 2**time, PEAK / 5) for time in times for _ in range(3)]
        assert found == pytest.approx(expected, rel=ROUNDING)
        assert "test_loss" not in run.metrics.columns

    def test_without_them_it_watches_the_training_loss(self, tmp_path, monkeypatch):
        plateau = {"type": "plateau", "patience": 0, "threshold": 0.01, "factor": 0.5}
        optimizer = {"type": "adam", "lr": PEAK}
        spec = points(epochs=9, schedule=plateau, optimizer=optimizer, warmup=2, batch_size=48)
        run, found = require_resumed_exactly(tmp_path, monkeypatch, spec, [7, 12])
        times = lowered(run.metrics.column("train_loss"), 0, 0.01)
        assert times[-1] > 0
        assert times != lowered(run.metrics.column("test_loss"), 0, 0.01), "the test sees nothing"
        rising = [1 / 3, 2 / 3, *[1] * 16]
        expected = [PEAK * part / 2 ** times[step // 2] for step, part in enumerate(rising)]
        assert found == pytest.approx(expected, rel=ROUNDING)

    def test_negative_scores_improve_by_falling(self):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
        options = Training.model_validate({"schedule": {"type": "plateau", "patience": 0, "threshold": 0.0}})
        (made,) = make_schedules(options, optimizer, 10)
        for loss, rate in ((-2.0, PEAK), (-2.1, PEAK), (-2.0999, PEAK / 10)):
            made["scheduler"].step(loss)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


SCHEDULES = {
    "constant": {"warmup": 3},
    "cosine": {"warmup": 3, "schedule": {"type": "cosine", "final_lr": 1e-4}},
    "multi_step": {"warmup": 0.2, "schedule": {"type": "multi_step", "milestones": [1, 3], "factor": 0.5}},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optimizer", ["adamax", "rmsprop"])
def test_an_interruption_changes_no_rate(tmp_path, monkeypatch, schedule, optimizer):
    spec = points(**SCHEDULES[schedule], optimizer={"type": optimizer, "lr": PEAK})
    _, found = require_resumed_exactly(tmp_path, monkeypatch, spec, [1, 5, 9])
    assert found == pytest.approx(rates(12, 3, **SCHEDULES[schedule]), rel=ROUNDING)


class TestSteps:
    """Three steps are an epoch of these points."""

    STEPS = 8

    @pytest.mark.parametrize("evaluate_every", [1, 2, 5])
    def test_a_run_ends_in_the_middle_of_an_epoch(self, tmp_path, monkeypatch, evaluate_every):
        spec = points(evaluate_every=evaluate_every, average={"decay": 0.9})
        stops = [1, 4, 7]
        run, found = require_resumed_exactly(tmp_path, monkeypatch, changed(spec, steps=self.STEPS), stops)
        assert len(found) == self.STEPS
        assert run.metrics.column("step") == [3, 6, 8]
        measured = [value is not None for value in run.metrics.column("test_nll")]
        assert measured == [(epoch + 1) % evaluate_every == 0 or epoch == 2 for epoch in range(3)]
        assert (run.record["status"], run.record["epochs_done"], run.record["steps_done"]) == ("finished", 3, 8)
        assert run.record["test_nll"] == pytest.approx(evaluate(run).test_nll, abs=1e-5)

    def test_its_last_epoch_is_the_beginning_of_a_whole_one(self, tmp_path, monkeypatch):
        weights = []
        step = ModelTraining.optimizer_step

        def stepped(module, *args, **kwargs):
            step(module, *args, **kwargs)
            weights.append({name: weight.clone() for name, weight in module.model.state_dict().items()})

        monkeypatch.setattr(ModelTraining, "optimizer_step", stepped)
        runs.train(points(), tmp_path / "whole", progress=False)
        expected = weights[self.STEPS - 1]
        run = runs.train(changed(points(), steps=self.STEPS), tmp_path / "run", progress=False)
        torch.testing.assert_close(run.load().state_dict(), expected, rtol=0, atol=0)

    def test_whole_epochs_are_the_same_as_steps(self, tmp_path):
        found = runs.train(changed(points(), steps=12), tmp_path / "steps", progress=False)
        expected = runs.train(points(), tmp_path / "epochs", progress=False)
        torch.testing.assert_close(found.load().state_dict(), expected.load().state_dict(), rtol=0, atol=0)
        assert found.metrics == expected.metrics

    @pytest.mark.parametrize(
        "training",
        [
            {"schedule": {"type": "one_cycle"}},
            {"schedule": {"type": "cosine"}, "warmup": 0.25},
            {"schedule": {"type": "multi_step", "milestones": [2, 7]}},
        ],
    )
    def test_schedules_are_as_long_as_the_run(self, tmp_path, monkeypatch, training):
        spec = changed(points(optimizer={"type": "adam", "lr": PEAK}), steps=self.STEPS, **training)
        _, found = require_resumed_exactly(tmp_path, monkeypatch, spec, [5, 7])
        assert found == pytest.approx(rates(self.STEPS, steps=self.STEPS, **training), rel=ROUNDING)

    def test_milestones_are_steps(self):
        found = rates(6, 2, steps=6, schedule={"type": "multi_step", "milestones": [1, 4]})
        assert found == pytest.approx([PEAK, *[PEAK / 10] * 3, *[PEAK / 100] * 2], rel=ROUNDING)

    def test_batches_that_nobody_has_counted(self, tmp_path, monkeypatch):
        """Four of them are an epoch."""
        loader = torch.utils.data.DataLoader(Unsized(), batch_size=5)
        found = watched(monkeypatch)
        options = {"steps": 10, "schedule": {"type": "cosine"}, "optimizer": {"type": "adam", "lr": PEAK}}
        run = invflow.fit(points(), loader, tmp_path / "run", test=torch.randn(9, 2), progress=False, **options)
        assert found == pytest.approx(rates(10, **options), rel=ROUNDING)
        assert run.metrics.column("step") == [4, 8, 10]

    def test_a_run_that_ended_unnoticed_takes_no_step_more(self, tmp_path, monkeypatch):
        """It is killed after its last state is saved."""
        spec, folder = changed(points(), steps=self.STEPS), tmp_path / "run"
        whole = runs.train(spec, folder, progress=False)
        whole.update(status="training")
        found = watched(monkeypatch)
        run = runs.resume(folder, progress=False)
        assert not found
        assert run.record["status"] == "finished"
        assert run.metrics == whole.metrics

    def test_an_unfinished_one_says_how_far_it_came(self, tmp_path, monkeypatch):
        stop_at(monkeypatch, 4)
        with pytest.raises(KeyboardInterrupt):
            runs.train(changed(points(), steps=self.STEPS), tmp_path / "run", progress=False)
        assert "the weights are those after 3 of 8 steps" in Run.open(tmp_path / "run").unfinished

    def test_one_length_overrides_the_other(self, tmp_path, call):
        path = tmp_path / "spec.json"
        path.write_text(json.dumps(points().document))
        status, _, err = call("train", path, "--steps", 2, "--out", tmp_path / "by-steps")
        assert status == 0, err
        by_steps = Run.open(tmp_path / "by-steps")
        assert (by_steps.training.steps, by_steps.training.epochs) == (2, None)
        assert by_steps.metrics.column("step") == [2]
        again = runs.overridden(by_steps.spec, {"epochs": 3}).training
        assert (again.steps, again.epochs) == (None, 3)
        status, _, err = call("train", path, "--steps", 2, "--epochs", 3, "--out", tmp_path / "both")
        assert (status, err.count("\n")) == (2, 1)
        assert "training.epochs: expected either epochs or steps, got 3" in err

    @pytest.mark.parametrize(
        ("training", "message"),
        [
            (
                {"steps": 3, "schedule": {"type": "plateau"}},
                "training.schedule: a plateau acts after the end of an epoch, which has 3 steps, and",
            ),
            ({"steps": 3, "warmup": 3}, "training.warmup: 3 steps of warm-up in a run of 3"),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, tmp_path, training, message):
        spec = points().expanded
        mine = {name: value for name, value in spec["training"].items() if name != "epochs"}
        with pytest.raises(SpecError, match=message):
            runs.train(invflow.load_spec({**spec, "training": mine | training}), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


def test_a_trainer_of_your_own_warms_up(monkeypatch):
    module = invflow.lightning(invflow.build_model(points()), optimizer={"type": "adam", "lr": PEAK}, warmup=0.5)
    loader = torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=2)
    found = watched(monkeypatch)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with quiet_lightning():
        lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet).fit(module, loader)
    assert found == pytest.approx([PEAK * min((step + 1) / 5, 1) for step in range(8)], rel=ROUNDING)
