"""What one process trains, several train too, up to roundings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import invflow

from . import trainings

SAME = 1e-8
"""Of a weight after 20 steps in float64, as promised; what differs is the order of sums."""
METRICS = 1e-6
"""An accuracy is a mean in float32."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the trainings of a single process."""
    place = tmp_path_factory.mktemp("alone")
    for name in trainings.SPECS:
        trainings.train(name, place / name)
    return place


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tmp_path_factory):
    """The folder of those of several."""
    place = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", trainings.__name__, str(place), str(request.param)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 0, ended.stderr
    return place


def weights(folder):
    return {name: weight.double() for name, weight in invflow.load(folder).state_dict().items()}


def apart(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    assert all(weight.dtype == torch.float64 for weight in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("name", trainings.SPECS)
def test_weights_and_metrics_are_those_of_one_process(alone, together, name):
    if not (together / name).exists():
        pytest.skip("two processes do this one")
    assert apart(alone / name, together / name) < SAME
    here, there = (invflow.open_run(place / name) for place in (alone, together))
    for one, other in zip(here.metrics, there.metrics, strict=True):
        assert one == pytest.approx(other, abs=METRICS)
    assert here.record["steps_done"] == there.record["steps_done"] == trainings.STEPS
    assert there.record["hardware"]["devices"] in {2, 4}


@pytest.mark.parametrize("name", trainings.SHARDED)
def test_sharded_weights_are_those_of_one_process(alone, together, name):
    if not (together / f"{name}-sharded").exists():
        pytest.skip("two processes shard")
    assert apart(alone / name, together / f"{name}-sharded") < SAME


def test_parts_of_a_batch_are_the_whole_batch(alone):
    assert apart(alone / "images", alone / "parts") < 1e-10
