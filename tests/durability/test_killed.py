"""Trainings that are killed at any moment end as if they had not been, to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from invflow.training import run as runs
from invflow.training.module import ModelTraining
from tests.durability.killing import command, require_equal
from tests.test_density_training import points
from tests.test_training import tiny

SLOW = bool(os.environ.get("INVFLOW_SLOW"))
KILLED_RUNS = 10 if SLOW else 1
"""Of each kind; all 20 of them take minutes."""
EVERY = 3
"""Steps between two saves."""


def classifier():
    """It has batch norm, momentum, averages of the weights, augmentation, a schedule, and a validation part."""
    data = {"name": "digits", "train_size": 160, "test_size": 40, "validation_size": 32}
    data["augmentation"] = {"affine": {"degrees": 10}}
    return tiny(data=data, schedule={"type": "one_cycle"}, average={"decay": 0.9}, batch_size=13, epochs=5)


def flow():
    """It has actnorm, Adam, a last batch of its own size, and epochs without evaluation."""
    data = {"name": "moons", "train_size": 100, "test_size": 50, "validation_size": 30}
    return points(data=data, schedule={"type": "cosine"}, batch_size=8, epochs=5, evaluate_every=2, clip_gradient=1.0)


KINDS = {"classifier": classifier, "flow": flow}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The spec of each kind, the folder of its uninterrupted run, and how long that took."""
    found = {}
    command(tmp_path_factory.getbasetemp(), "--version")  # the server starts
    for kind, spec in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        path = folder / "spec.json"
        path.write_text(json.dumps(spec().document))
        ended = command(folder, "train", path, "--out", "run", "--save-every", EVERY)
        assert ended.status == 0, ended.printed
        found[kind] = path, folder / "run", ended.seconds
    return found


@pytest.mark.parametrize("seed", range(KILLED_RUNS))
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_if_it_had_not_been(whole, tmp_path, kind, seed):
    spec, expected, seconds = whole[kind]
    drawn = random.Random(f"{kind} {seed}")
    kills = [drawn.uniform(0, 0.9 * seconds) for _ in range(drawn.randint(2, 4))]
    run, killed = tmp_path / "run", 0
    for after in (*kills, None):
        if not (run / "run.json").is_file():  # killed before there was a run: it is begun again
            shutil.rmtree(run, ignore_errors=True)
        begun = ("train", "--resume", "run") if run.exists() else ("train", spec, "--out", "run", "--save-every", EVERY)
        ended = command(tmp_path, *begun, after=after)
        assert ended.status in ((0, -9) if after is not None else (0,)), ended.printed
        killed += ended.status == -9
    assert killed, "it was quicker than it was killed"
    require_equal(run, expected)


def test_a_terminated_run_says_how_to_resume_it(whole, tmp_path):
    """SIGTERM is sent as soon as there is a run."""
    spec, expected, _ = whole["flow"]
    ended = command(
        tmp_path, "train", spec, "--out", "run", "--save-every", EVERY, until=tmp_path / "run" / "resume" / "last.ckpt"
    )
    assert ended.status == 143, ended.printed
    assert ended.printed.splitlines()[-1] == "interrupted; resume with: invflow train --resume run"
    assert command(tmp_path, "train", "--resume", "run").status == 0
    require_equal(tmp_path / "run", expected)


class Killed(BaseException):
    """The process ends here."""


def at_write(patch, position):
    """Let the process end before a file of this position, from 0, is replaced; return the list of written names."""
    replace, written = Path.replace, []

    def end(temporary, target):
        if len(written) == position:
            raise Killed
        written.append(target.name)
        return replace(temporary, target)

    patch.setattr(Path, "replace", end)
    return written


def test_between_any_two_writes(tmp_path, monkeypatch):
    spec = flow()
    training = {**spec.expanded["training"], "epochs": 2, "batch_size": 50, "evaluate_every": 1}
    spec = spec.replace(training=training)
    with monkeypatch.context() as patch:
        writes = at_write(patch, -1)
        runs.train(spec, tmp_path / "whole", save_every=1, progress=False)
    begin = writes.index("run.json") + 1
    assert writes.count("last.ckpt") == 4, "two epochs, and the first of the two steps of each"
    assert begin < len(writes) - 8
    for position in range(begin, len(writes)):
        run = tmp_path / str(position)
        with monkeypatch.context() as patch:
            at_write(patch, position)
            with pytest.raises(Killed):
                runs.train(spec, run, save_every=1, progress=False)
        runs.resume(run, progress=False)
        require_equal(run, tmp_path / "whole")


def test_what_the_monitor_found_is_kept(tmp_path, monkeypatch):
    """A layer whose input came back wrong is not reconstructed again after an interruption."""
    step, seen = ModelTraining.training_step, []

    def anchor(module, batch, index):
        anchors = module.model.bijection.reconstruction.anchors
        if (module.current_epoch, module.batches_done) == (0, 1):
            anchors.add("layers.2")
        if (module.current_epoch, module.batches_done) == (0, 3) and "interrupted" not in seen:
            seen.append("interrupted")
            raise KeyboardInterrupt
        seen.append(set(anchors))
        return step(module, batch, index)

    monkeypatch.setattr(ModelTraining, "training_step", anchor)
    spec = tiny(epochs=1).replace(backprop="reversible")
    with pytest.raises(KeyboardInterrupt):
        runs.train(spec, tmp_path / "run", save_every=3, progress=False)
    runs.resume(tmp_path / "run", progress=False)
    assert seen[-2:] == ["interrupted", {"layers.2"}]
