"""Runs in other numerics: trained, frozen, evaluated, resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import invflow
from invflow import NumericsError
from invflow.cli import main
from invflow.errors import RunError
from invflow.numerics import Exact
from invflow.spec import load_spec
from invflow.training import run as runs
from invflow.training.frozen import freeze_run
from invflow.training.run_folder import Run

SPEC = {
    "name": "small",
    "input": {"shape": [1, 8, 8]},
    "layers": [
        {"type": "psi", "block_size": 2},
        {"type": "split"},
        {"type": "repeat", "times": 2, "layers": [
            {"type": "additive_coupling", "net": {"type": "conv", "hidden": [8], "norm": "batch"}}
        ]},
        {"type": "merge"},
    ],
    "head": {"type": "linear", "classes": 10},
    "training": {"data": {"name": "digits"}, "epochs": 3, "optimizer": {"type": "adam", "lr": 0.005}},
}  # fmt: skip
POINTS = 0.02
"""A few of the 449 test digits are close to the border between two classes."""


@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    return runs.train(load_spec(SPEC), tmp_path_factory.mktemp("runs") / "float", progress=False)


def test_a_frozen_run_is_exact_and_as_good(float_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["freeze", str(float_run.folder), "--out", str(tmp_path / "exact"), "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["bit_equal"].values()) == {found["images"]} == {449}
    assert len(found["bit_equal"]) == 8
    assert abs(found["accuracy_after"] - found["accuracy_before"]) < POINTS
    frozen = Run.open(tmp_path / "exact")
    assert frozen.load().bijection.exactness == "exact"
    assert frozen.record["test_accuracy"] == found["accuracy_after"]
    assert frozen.spec.training == float_run.spec.training
    with pytest.raises(SystemExit) as ended:
        main(["check", str(tmp_path / "exact"), "--json"])
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exactness"] == "exact"
    assert set(report["round_trip_error"].values()) == {0.0}


@pytest.mark.parametrize("mode", ["grid", "snap"])
def test_other_numerics(float_run, tmp_path, capsys, mode):
    with pytest.raises(SystemExit) as ended:
        main(["freeze", str(float_run.folder), "--mode", mode, "--frac-bits", "8", "--out", str(tmp_path / mode)])
    assert ended.value.code == 0
    assert "449 of 449 test images come back bit-equal: batches of 64, the same both ways" in capsys.readouterr().out
    assert invflow.load(tmp_path / mode).bijection.numerics.model_dump()["frac_bits"] == 8


def test_mistakes_get_one_line(float_run, tmp_path, capsys):
    for arguments, message in [
        (["--mode", "gird"], "invflow: freeze: input tag 'gird' found using 'mode' does not match"),
        (["--frac-bits", "99"], "invflow: freeze: input should be less than or equal to 52, got 99"),
        (["--out", str(float_run.folder)], "exists already"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["freeze", str(float_run.folder), *arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert message in error
        assert error.count("\n") == 1
    frozen, _ = freeze_run(float_run, tmp_path / "one", Exact(mode="exact"))
    with pytest.raises(NumericsError, match="not exact yet"):
        freeze_run(frozen, tmp_path / "two", Exact(mode="exact"))
    assert not (tmp_path / "two").exists()


def test_an_exact_spec_trains_in_float_and_is_frozen(float_run, tmp_path):
    run = runs.train(load_spec({**SPEC, "numerics": {"mode": "exact"}}), tmp_path / "run", progress=False)
    assert run.spec.hash == load_spec({**SPEC, "numerics": {"mode": "exact"}}).hash
    opened = Run.open(run.folder)
    assert opened.record["status"] == "finished"
    assert opened.load().bijection.exactness == "exact"
    real = invflow.load(run.folder / "float")
    for a, b in zip(real.parameters(), float_run.load().parameters(), strict=True):
        assert torch.equal(a, b)
    # An interruption after the exact model was written: the resumed run ends in the same model.
    before = opened.load().state_dict()
    opened.update(status="training")
    again = runs.resume(run.folder, progress=False).load()
    assert again.bijection.exactness == "exact"
    assert all(torch.equal(a, b) for a, b in zip(before.values(), again.state_dict().values(), strict=True))


def test_a_grid_spec_trains_on_its_grid(tmp_path):
    run = runs.train(load_spec({**SPEC, "numerics": {"mode": "grid"}}), tmp_path / "run", progress=False)
    model = run.load()
    assert model.bijection.exactness == "grid"
    _, found = freeze_run(run, tmp_path / "exact", Exact(mode="exact"))
    assert set(found.bit_equal.values()) == {found.images}
    assert abs(found.accuracy_after - found.accuracy_before) < POINTS


def test_a_walk_in_feature_space_stays_on_the_grid(float_run, tmp_path):
    frozen, _ = freeze_run(float_run, tmp_path / "exact", Exact(mode="exact"))
    with pytest.raises(SystemExit) as ended:
        main(["interpolate", str(frozen.folder), "--pairs", "1", "--steps", "3", "--out", str(tmp_path / "walk")])
    assert ended.value.code == 0
    assert any(Path(tmp_path / "walk").iterdir())


def test_a_folder_that_holds_something_is_left_alone(float_run, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        freeze_run(float_run, tmp_path, Exact(mode="exact"))
