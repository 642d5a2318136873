"""Learning rates step by step, and how long a training is."""

from __future__ import annotations

import json
import math

import lightning
import pytest
import torch
from torch import nn

import invflow
from invflow.errors import InvflowError, SpecError
from invflow.spec.training import Training
from invflow.training import run as runs
from invflow.training.fit import quiet_lightning
from invflow.training.module import ModelTraining, make_schedules
from tests.test_density_training import points
from tests.test_training import tiny

PEAK = 0.1
ROUNDING = 1e-12
"""Relative: PyTorch multiplies one rate by a factor to have the next, some dozens of times."""


def rates(steps, an_epoch=1, **training):
    """The learning rate of each step."""
    options = Training.model_validate_json(json.dumps(training))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    schedules, found = make_schedules(options, optimizer, steps), []
    for step in range(1, steps + 1):
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
            ({"warmup": 0}, "warmup", "input should be greater than 0, got 0"),
            (
                {"warmup": 3, "schedule": {"type": "one_cycle"}},
                "warmup",
                "one_cycle has a warm-up of its own, in the schedule: leave this one out, got 3",
            ),
            (
                {"schedule": {"type": "multi_step", "milestones": [3, 3]}},
                "schedule.milestones",
                r"milestones are expected in increasing order, got \[3, 3\]",
            ),
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
    with pytest.raises(SpecError, match=f"training.{next(iter(training))}: the length of the run must be known"):
        invflow.fit(points(), loader, tmp_path / "run", test=torch.randn(9, 2), progress=False, **training)
    with pytest.raises(InvflowError, match=f"{next(iter(training))}: the length of the run must be known"):
        make_schedules(
            Training.model_validate_json(json.dumps(training)), torch.optim.SGD(nn.Linear(1, 1).parameters()), None
        )


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


def test_a_trainer_of_your_own_warms_up(monkeypatch):
    module = invflow.lightning(invflow.build_model(points()), optimizer={"type": "adam", "lr": PEAK}, warmup=0.5)
    loader = torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=2)
    found = watched(monkeypatch)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with quiet_lightning():
        lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet).fit(module, loader)
    assert found == pytest.approx([PEAK * min((step + 1) / 5, 1) for step in range(8)], rel=ROUNDING)
