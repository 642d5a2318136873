"""What ends a training is one line that says what to do, and what was saved stays valid."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import invflow
from invflow.diagnostics import pictures
from invflow.errors import InvflowError, RunError
from invflow.report import write as reporting
from invflow.training import run as runs
from invflow.training.module import ModelTraining
from invflow.training.run_folder import Run
from invflow.training.saving import Interval, Saving
from tests.test_density_training import points
from tests.test_training import fill_the_disk, tiny

LAST = Path("resume", "last.ckpt")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take longer than all else."""
    monkeypatch.setattr(pictures, "write_figure", lambda *_: None)
    monkeypatch.setattr(pictures, "write_gif", lambda *_: None)
    monkeypatch.setattr(reporting, "write_report", lambda *_: "report.html")


@pytest.fixture
def spec(tmp_path):
    """The file of a classifier of 4 steps an epoch, and its document."""
    document = tiny(epochs=3).document
    (tmp_path / "spec.json").write_text(json.dumps(document))
    return "spec.json"


def meanwhile(patch, epoch, batch, act):
    """Let something happen in the middle of a step of the training, counted from 0."""
    step = ModelTraining.training_step

    def training_step(module, given, index):
        if (module.current_epoch, module.batches_done) == (epoch, batch):
            act(module)
        return step(module, given, index)

    patch.setattr(ModelTraining, "training_step", training_step)


def position(folder):
    """The epoch and the batches at which a run was saved."""
    state = torch.load(folder / LAST, weights_only=True)
    return state["epoch"], state["batches"]


class TestSaveEvery:
    @pytest.mark.parametrize("text", ["0", "0m", "-5", "5s", "m", "", "1.5", "five", "nan", "1e3", "5 m", "٣x"])
    def test_what_is_no_interval_is_refused(self, call, spec, text):
        status, out, err = call("train", spec, "--out", "run", f"--save-every={text}")
        said = f"--save-every expects steps, such as 200, or minutes, such as 5m, got {text!r}"
        assert (status, out, err) == (2, "", f"invflow: {said}\n")
        assert not Path("run").exists()

    @pytest.mark.parametrize(("every", "saved"), [(1, (1, 2)), (3, (1, 2)), (4, (1, 0)), (5, (1, 1)), ("1h", None)])
    def test_a_state_is_saved_after_so_many_steps(self, tmp_path, monkeypatch, every, saved):
        def stop(_):
            raise KeyboardInterrupt

        meanwhile(monkeypatch, 1, 2, stop)
        if saved is None:
            with pytest.raises(InvflowError, match="--save-every expects steps"):
                runs.train(tiny(), tmp_path / "run", save_every=every, progress=False)
            return
        with pytest.raises(KeyboardInterrupt):
            runs.train(tiny(), tmp_path / "run", save_every=every, progress=False)
        assert position(tmp_path / "run") == saved

    def test_minutes_count_from_the_last_save(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr("invflow.training.saving.time.monotonic", lambda: now[0])
        interval = Interval.parse("2m")
        assert not interval.over(200, 100.0)
        now[0] = 219.9
        assert not interval.over(200, 100.0)
        now[0] = 220.0
        assert interval.over(1, 100.0)

    def test_a_resumption_saves_as_often_unless_it_is_told(self, tmp_path, monkeypatch):
        def stop(_):
            raise KeyboardInterrupt

        run = tmp_path / "run"
        told = [(3, "3", (0, 3)), ("2", "2", (1, 2)), (None, "2", (2, 2))]
        for number, (every, recorded, saved) in enumerate(told):
            with monkeypatch.context() as patch:
                meanwhile(patch, number, 3, stop)
                begin = runs.resume if number else functools.partial(runs.train, tiny())
                with pytest.raises(KeyboardInterrupt):
                    begin(run, save_every=every, progress=False)
            assert Run.open(run).record["save_every"] == recorded
            assert position(run) == saved


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a shell starts what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
class TestSignals:
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_signal_saves_at_once(self, call, spec, monkeypatch, number, status):
        before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
        with monkeypatch.context() as patch:
            meanwhile(patch, 1, 1, lambda _: signal.raise_signal(number))
            ended, out, err = call("train", spec, "--out", "run")
        assert (ended, out) == (status, "")
        assert err.splitlines()[-1] == "interrupted; resume with: invflow train --resume run"
        assert "Traceback" not in err
        assert position(Path("run")) == (1, 2), "the step is finished, then the state is saved"
        assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
        runs.resume(Path("run"), progress=False)
        runs.train(invflow.load_spec(spec), Path("whole"), progress=False)
        weights = [next(Path(name).glob("weights-*")).name for name in ("run", "whole")]
        assert weights[0] == weights[1]
        assert Run.open(Path("run")).metrics == Run.open(Path("whole")).metrics

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_a_second_one_acts_at_once(self, call, spec, monkeypatch, number, status):
        def twice(_):
            signal.raise_signal(number)
            signal.raise_signal(number)

        meanwhile(monkeypatch, 1, 1, twice)
        ended, _, err = call("train", spec, "--out", "run")
        assert ended == status
        assert err.splitlines()[-1] == "interrupted; resume with: invflow train --resume run"
        assert position(Path("run")) == (1, 0)

    @pytest.mark.parametrize("stage", ["validation_step", "on_train_epoch_end"])
    def test_in_an_evaluation_it_is_finished_first(self, call, spec, monkeypatch, stage):
        found = getattr(ModelTraining, stage)

        def told(module, *rest):
            if module.current_epoch == 1:
                signal.raise_signal(signal.SIGTERM)
            return found(module, *rest)

        monkeypatch.setattr(ModelTraining, stage, told)
        assert call("train", spec, "--out", "run")[0] == 143
        assert position(Path("run")) == (2, 0)
        assert len(Run.open(Path("run")).metrics) == 2

    @pytest.mark.parametrize("stage", ["configure_optimizers", "train_dataloader", "on_train_start"])
    def test_when_the_training_begins(self, call, spec, monkeypatch, stage):
        found = getattr(ModelTraining, stage)

        def told(module, *rest):
            signal.raise_signal(signal.SIGTERM)
            return found(module, *rest)

        monkeypatch.setattr(ModelTraining, stage, told)
        status, _, err = call("train", spec, "--out", "run")
        assert (status, err.splitlines()[-1]) == (143, "interrupted; resume with: invflow train --resume run")
        assert "Traceback" not in err

    def test_the_processes_that_load_data_may_end_first(self, call, spec, monkeypatch):
        def end(_):
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated")

        meanwhile(monkeypatch, 1, 1, end)
        status, _, err = call("train", spec, "--out", "run")
        assert (status, err.splitlines()[-1]) == (143, "interrupted; resume with: invflow train --resume run")
        assert position(Path("run")) == (1, 0)

    def test_another_failure_is_no_signal(self, spec, monkeypatch, tmp_path):
        def fail(_):
            raise RuntimeError("a layer is wrong")

        meanwhile(monkeypatch, 1, 1, fail)
        with pytest.raises(RuntimeError, match="a layer is wrong"):
            runs.train(tiny(), tmp_path / "run", progress=False)

    def test_before_and_after_the_training_too(self, call, spec, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(runs, "fit", lambda *_: signal.raise_signal(signal.SIGTERM))
            status, _, err = call("train", spec, "--out", "run")
        assert (status, err) == (143, "interrupted; resume with: invflow train --resume run\n")
        with monkeypatch.context() as patch:
            patch.setattr("invflow.training.illustrate.illustrate", lambda *_: signal.raise_signal(signal.SIGTERM))
            status, _, err = call("train", "--resume", "run")
        assert (status, err.splitlines()[-1]) == (143, "interrupted; resume with: invflow train --resume run")
        with monkeypatch.context() as patch:
            patch.setattr(runs, "check_trainable", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
            assert call("train", spec, "--out", "other") == (143, "", ""), "there is nothing to resume"

    def test_in_python_a_signal_does_what_it_would_have_done(self, tmp_path, monkeypatch):
        class Ended(Exception):
            pass

        def end(*_):
            raise Ended

        before = signal.signal(signal.SIGTERM, end)
        try:
            meanwhile(monkeypatch, 0, 1, lambda _: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Ended):
                runs.train(tiny(), tmp_path / "run", progress=False)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert position(tmp_path / "run") == (0, 2)

    def test_a_path_is_quoted_and_the_data_root_is_named(self, call, spec, monkeypatch):
        meanwhile(monkeypatch, 0, 1, lambda _: signal.raise_signal(signal.SIGTERM))
        _, _, err = call("train", spec, "--out", "my run", "--data-root", ".")
        assert err.splitlines()[-1] == "interrupted; resume with: invflow train --resume 'my run' --data-root ."


@pytest.fixture
def interrupted(call, spec, monkeypatch):
    """A run that was interrupted in its second epoch."""
    with monkeypatch.context() as patch:
        meanwhile(patch, 1, 1, lambda _: signal.raise_signal(signal.SIGTERM))
        assert call("train", spec, "--out", "run")[0] == 143
    return Path("run")


class TestFolders:
    @pytest.mark.parametrize("deleted", [False, True])
    @pytest.mark.parametrize("replaced", [False, True])
    def test_deleted_underneath(self, call, spec, monkeypatch, replaced, deleted):
        def delete(_):
            if deleted:
                shutil.rmtree("run")
            else:
                os.rename("run", "elsewhere")  # noqa: PTH104 -- `Path.rename` is patched by other tests
            if replaced:
                Path("run").mkdir()
                Path("run", "run.json").write_text("{}")
                Path("run", ".training").write_text("of another process")

        meanwhile(monkeypatch, 1, 1, delete)
        status, out, err = call("train", spec, "--out", "run", "--save-every", 1)
        said = "run: the run folder was deleted or moved during the training, which stops here; "
        said += "resume it where it is now, or train again"
        assert (status, out, err.splitlines()[-1]) == (2, "", f"invflow: {said}")
        assert "resume with" not in err
        left = {path.name for path in Path("run").rglob("*")} if replaced else Path("run").exists()
        assert left == ({"run.json", ".training"} if replaced else False), "it writes where it does not belong"

    def test_emptied_underneath(self, call, spec, monkeypatch):
        def empty(_):
            for path in Path("run").iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

        meanwhile(monkeypatch, 1, 3, empty)
        status, _, err = call("train", spec, "--out", "run")
        assert (status, err.splitlines()[-1].partition(": the run")[0]) == (2, "invflow: run")
        assert list(Path("run").iterdir()) == []

    def test_read_only(self, call, spec, interrupted, monkeypatch):
        """Root may write everywhere, so that the system's refusal is played."""
        opened, made = os.open, Path.mkdir

        def refuse(path, *rest, **more):
            if Path(path).name == ".training":
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *rest, **more)

        def refuse_folder(path, *rest, **more):
            if path.name == "new":
                raise PermissionError(13, "Permission denied", str(path))
            return made(path, *rest, **more)

        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(Path, "mkdir", refuse_folder)
        said = "a run is written there, which is not possible: Permission denied"
        assert call("train", "--resume", interrupted) == (2, "", f"invflow: run: {said}\n")
        assert call("train", spec, "--out", "new") == (2, "", f"invflow: new: {said}\n")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_really_read_only(self, call, interrupted):
        interrupted.chmod(0o500)
        assert call("train", "--resume", interrupted)[0] == 2
        interrupted.chmod(0o700)

    @pytest.mark.parametrize("name", ["last.ckpt", "metrics.csv", "run.json", "spec.json"])
    def test_full_disk(self, call, spec, monkeypatch, name):
        with monkeypatch.context() as patch:
            fill_the_disk(patch, name, at=3)
            status, out, err = call("train", spec, "--out", "run", "--save-every", 1)
        assert (status, out) == (2, "")
        resume, said = [line for line in err.splitlines() if line.startswith(("invflow", "interrupted"))]
        assert resume == "interrupted; resume with: invflow train --resume run"
        assert re.fullmatch(rf"invflow: run/\S*{name}: No space left on device", said)
        assert "Traceback" not in err
        assert runs.resume(Path("run"), progress=False).record["status"] == "finished"

    def test_edited_training_options(self, call, interrupted):
        path = interrupted / "spec.json"
        document = json.loads(path.read_text())
        document["training"]["optimizer"]["lr"] = 0.5
        path.write_text(json.dumps(document))
        edited = "the training options were edited after the run began: training.optimizer.lr: 0.05 -> 0.5"
        advice = "undo that, or train the spec into another folder"
        said = f"invflow: run/spec.json: {edited}; {advice}\n"
        assert call("train", "--resume", interrupted) == (2, "", said)
        document["training"]["optimizer"]["lr"] = 0.05
        path.write_text(json.dumps(document))
        assert runs.resume(interrupted, progress=False).record["status"] == "finished"

    def test_edited_layers(self, call, interrupted):
        path = interrupted / "spec.json"
        document = json.loads(path.read_text())
        del document["layers"][3]
        path.write_text(json.dumps(document))
        status, out, err = call("train", "--resume", interrupted)
        assert (status, out) == (2, "")
        assert err.startswith("invflow: run/spec.json: the layers were changed after the weights were saved")
        assert err.count("\n") == 1

    def test_a_damaged_state(self, call, interrupted):
        content = (interrupted / LAST).read_bytes()
        middle = len(content) // 2
        other = torch.load(interrupted / LAST, weights_only=True)
        damaged = {
            "nothing": b"",
            "half": content[:middle],
            "noise": os.urandom(1000),
            "another file": _packed({"weights": torch.zeros(3)}),
            "another model": _packed({**other, "model": {}}),
            "another optimiser": _packed({**other, "optimizers": []}),
            "no averages": _packed({**other, "averages": {"losses": 3}}),
        }
        for kind, bytes_ in damaged.items():
            (interrupted / LAST).write_bytes(bytes_)
            status, out, err = call("train", "--resume", interrupted)
            said = "run/resume/last.ckpt: cannot be resumed: damaged, or of another run or version"
            assert (status, out) == (2, ""), kind
            assert err.startswith(f"invflow: {said}"), kind
            assert err.count("\n") == 1, kind
        (interrupted / LAST).write_bytes(content)
        assert runs.resume(interrupted, progress=False).record["status"] == "finished"

    def test_two_resumptions_at_once(self, call, interrupted, monkeypatch):
        second = []

        def resume(_):
            with pytest.raises(RunError) as error:
                runs.resume(interrupted, progress=False)
            second.append(str(error.value))

        meanwhile(monkeypatch, 2, 0, resume)
        assert runs.resume(interrupted, progress=False).record["status"] == "finished"
        assert len(second) == 1
        assert second[0].startswith("run: another process writes this run; wait until it has ended")


def _packed(state):
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


class TestDiverged:
    """A loss or a weight that is not finite."""

    BEST = "run holds the weights after 1 epoch, run/best the best"

    def diverge(self, call, monkeypatch, spec, act, *, at=(1, 2), options=("--save-every", 1)):
        with monkeypatch.context() as patch:
            meanwhile(patch, *at, act)
            status, out, err = call("train", spec, "--out", "run", *options)
        assert (status, out) == (2, "")
        assert "Traceback" not in err
        return err.splitlines()[-1]

    @pytest.mark.parametrize("layer", [2, 3])
    def test_the_first_layer_is_named(self, call, spec, monkeypatch, layer):
        def spoil(module):
            for part in module.model.bijection[layer:-1]:
                for weight in part.parameters():
                    torch.nn.init.constant_(weight, math.nan)

        said = self.diverge(call, monkeypatch, spec, spoil)
        assert said.startswith("invflow: run: training diverged in epoch 2, step 6: the loss is nan, ")
        assert f"the first output that is not finite is that of layers.{layer}, AdditiveCoupling(" in said
        assert said.endswith(self.BEST)
        assert Run.open(Path("run")).record["status"] == "diverged"
        for folder in ("run", "run/best"):
            warns = pytest.warns(UserWarning, match="diverged") if folder == "run" else contextlib.nullcontext()
            with warns:
                assert all(weight.isfinite().all() for weight in invflow.load(folder).state_dict().values())
        status, _, err = call("train", "--resume", "run")
        assert (status, err.count("\n")) == (2, 1)
        assert "layers." in err

    def test_the_head_is_named(self, call, spec, monkeypatch):
        def spoil(module):
            torch.nn.init.constant_(next(module.model.head.parameters()), math.inf)

        assert "is that of the head; try" in self.diverge(call, monkeypatch, spec, spoil)

    def test_the_prior_is_named(self, call, monkeypatch, tmp_path):
        (tmp_path / "points.json").write_text(json.dumps(points(epochs=3).document))

        def spoil(module):
            torch.nn.init.constant_(module.model.bijection[0].shift, 1e30)

        said = self.diverge(call, monkeypatch, "points.json", spoil, at=(1, 1))
        assert "epoch 2, step 4: the loss is inf" in said
        assert "is that of the prior; try" in said

    @pytest.mark.parametrize("batch", [1, 3])
    def test_a_weight_is_named_before_it_is_saved(self, call, spec, monkeypatch, batch):
        """The loss of the step is finite, what the optimiser made of it is not."""

        def spoil(module):
            weight = next(module.model.bijection[3].parameters())
            weight.register_hook(lambda gradient: gradient * math.inf)

        said = self.diverge(call, monkeypatch, spec, spoil, at=(1, batch))
        assert f"in epoch 2, step {5 + batch}: the weight bijection.layers.3." in said
        assert "of layers.3, AdditiveCoupling(" in said
        assert " is not finite; try" in said
        assert said.endswith(self.BEST)
        assert position(Path("run")) == (1, batch)

    def test_without_an_epoch_there_is_no_best(self, call, spec, monkeypatch):
        def spoil(module):
            torch.nn.init.constant_(next(module.model.head.parameters()), math.nan)

        said = self.diverge(call, monkeypatch, spec, spoil, at=(0, 0))
        assert said.endswith("; run holds the weights after 0 epochs")


def test_the_state_never_holds_what_is_not_finite(tmp_path, monkeypatch):
    """A state that was saved can always be resumed."""
    saved = []
    save = Saving._save

    def remember(saving, trainer, module, epoch):
        save(saving, trainer, module, epoch)
        saved.append(torch.load(tmp_path / "run" / LAST, weights_only=True)["model"])

    monkeypatch.setattr(Saving, "_save", remember)
    hot = tiny(optimizer={"type": "sgd", "lr": 1e25})
    with pytest.raises(InvflowError, match="diverged"):
        runs.train(hot, tmp_path / "run", save_every=1, progress=False)
    assert all(weight.isfinite().all() for state in saved for weight in state.values())
