"""What is measured of walks between images."""

from __future__ import annotations

import json
import math

import pytest
import torch
from sklearn.datasets import load_digits

import invflow
from invflow.cli import main
from invflow.diagnostics.walks import Judge, measure, random_pairs
from tests.test_training import tiny


@pytest.fixture(scope="module")
def digits():
    """Handwritten digits of two halves, each (images, labels)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    return (images[:900], labels[:900]), (images[900:], labels[900:])


@pytest.fixture(scope="module")
def judge(digits):
    return Judge(*digits[0])


def test_pairs_are_of_different_classes_and_drawn_by_the_seed():
    labels = torch.arange(100) % 3
    pairs = random_pairs(labels, 40, seed=1)
    assert pairs.shape == (40, 2)
    assert (labels[pairs[:, 0]] != labels[pairs[:, 1]]).all()
    assert torch.equal(pairs, random_pairs(labels, 40, seed=1))
    assert not torch.equal(pairs, random_pairs(labels, 40, seed=2))


class TestMeasure:
    """Of images half-way of which the answer is known."""

    @pytest.fixture
    def of(self, digits, judge):
        images, labels = digits[1]
        pairs = random_pairs(labels, 100, seed=0)
        ends = images[pairs[:, 0]], images[pairs[:, 1]]
        return lambda half_way: measure(judge, half_way(*ends), ends, labels[pairs], images, labels)

    def test_cross_fades_close_no_gap(self, of):
        found = of(lambda a, b: (a + b) / 2)
        assert (found.pairs, found.out_of_range, found.distance, found.gap_closed) == (100, 0, 0, 0)

    def test_ends_are_named_as_often_as_the_judge_is_right(self, of):
        found = of(lambda a, _: a)
        assert found.judge_accuracy > 0.9
        assert found.named == pytest.approx(found.judge_accuracy, abs=0.1)
        assert found.gap_closed == pytest.approx(1, abs=0.2)
        assert found.distance > 0.05

    def test_pixels_out_of_range_are_counted_and_clipped_for_the_judge(self, of):
        found, clean = of(lambda a, _: torch.where(a == 1, 7.0, a)), of(lambda a, _: a)
        assert 0 < found.out_of_range < 0.5
        assert (found.named, found.gap_closed) == (clean.named, clean.gap_closed)

    def test_no_pairs_are_refused(self, of):
        with pytest.raises(invflow.InvflowError, match="no pair"):
            of(lambda a, _: a[:0])

    def test_lines_fit_a_terminal(self, of):
        found = of(lambda a, b: (a + b) / 2)
        assert all(len(line) <= 80 for line in found.lines())
        assert any("0 % closed" in line for line in found.lines())
        found.__dict__["gap_closed"] = math.nan
        assert any("none to close" in line for line in found.lines())


def called(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_verbs_measure_walks(tmp_path, capsys):
    """A training with midpoints ends with the figures, which interpolate repeats."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny(epochs=1, midpoints={}).document))
    run = tmp_path / "run"
    lines = called(capsys, "train", path, "--out", run).splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("half-way between "))
    again = called(capsys, "interpolate", run, "--measure").splitlines()
    assert again[:6] == lines[start : start + 6]
    found = json.loads(called(capsys, "interpolate", run, "--measure", "--json"))
    assert 0 <= found["walks"]["named"] <= 1
    assert json.loads(called(capsys, "interpolate", run, "--json"))["walks"] is None
