"""Conditional training: the density of each of two moons, given the class."""

from __future__ import annotations

import json

import pytest
import torch

import invflow
from invflow.cli import main
from invflow.errors import DataError
from invflow.samples import DataSet, InMemory
from invflow.training.run import task_of

SPEC = "specs/conditional_moons.json"
EPOCHS = 30
SIDE = 300
KERNEL_WIDTH = 0.2
"""Twice the noise of the moons."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return invflow.train(SPEC, tmp_path_factory.mktemp("conditional") / "run", epochs=EPOCHS, progress=False)


def test_each_density_integrates_to_one(run):
    x, y = torch.linspace(-2.5, 3.5, SIDE), torch.linspace(-2.0, 2.5, SIDE)
    cell = float((x[1] - x[0]) * (y[1] - y[0]))
    points = torch.cartesian_prod(x, y)
    for row in torch.eye(2):
        with torch.no_grad():
            mass = float(run.model.log_prob(points, row[None]).exp().sum()) * cell
        assert mass == pytest.approx(1, abs=0.01)


def test_a_class_tells_something_of_the_points(run, tmp_path):
    """An unconditional model of the same layers, trained as long, is worse by about log(2), which a class is worth."""
    document = {**invflow.load_spec(SPEC).document, "input": {"shape": [2]}}
    document["training"] = {**document["training"], "data": {"name": "moons"}}
    without = invflow.train(document, tmp_path / "run", epochs=EPOCHS, progress=False)
    assert invflow.evaluate(run).test_nll < invflow.evaluate(without).test_nll - 0.5


@pytest.mark.parametrize(("words", "center", "above"), [("upper", (0.0, 0.0), True), ("1", (1.0, 0.5), False)])
def test_the_command_line_draws_each_moon(run, capsys, words, center, above):
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(run.folder), "--context", words, "--count", "200", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    offset = torch.tensor(found["samples"]) - torch.tensor(center)
    on_the_circle = (offset.norm(dim=1) - 1).abs() < 0.4  # four standard deviations of the noise
    on_its_side = offset[:, 1] > -0.5 if above else offset[:, 1] < 0.5
    assert (on_the_circle & on_its_side).float().mean() > 0.9
    assert found["context"] == [[1.0, 0.0] if above else [0.0, 1.0]] * 200
    with torch.no_grad():
        again = run.model.log_prob(torch.tensor(found["samples"]), torch.tensor(found["context"]))
    torch.testing.assert_close(again, torch.tensor(found["log_prob"]), atol=1e-4, rtol=1e-4)  # float32, other batches


def test_without_a_context_those_of_the_test_data_are_taken(run, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(run.folder), "--count", "5", "--json"])
    rows = json.loads(capsys.readouterr().out)["context"]
    assert sorted(map(tuple, rows)) != [(1.0, 0.0)] * 5


@pytest.mark.parametrize("words", ["2", "left", "1,0,0", ""])
def test_another_context_is_refused_in_one_line(run, capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(run.folder), "--context", words])
    assert ended.value.code == 2
    expected = f"invflow: --context expects a class (upper, lower) or 2 numbers with commas, got {words!r}\n"
    assert capsys.readouterr().err == expected


def test_a_model_with_a_context_that_the_data_have_not_is_refused(tmp_path):
    document = invflow.load_spec(SPEC).document
    for data, message in (
        ({"name": "moons"}, "context_shape: moons gives no context to train with; name one in training.data"),
        (
            {"name": "rings", "context": "labels"},
            r"gives a context of shape \[4\], but the input has the context_shape",
        ),
    ):
        spec = {**document, "training": {"data": data}}
        with pytest.raises(invflow.SpecError, match=message):
            invflow.train(spec, tmp_path / "run", progress=False)
    with pytest.raises(DataError, match=r'moons has no context .*; there is "labels"'):
        invflow.train({**document, "training": {"data": {"name": "moons", "context": "age"}}}, tmp_path / "run")


@pytest.mark.parametrize(("words", "place"), [("1", 0), ("2", 1), ("0", 0), ("3", 2)])
def test_a_class_by_its_name_before_its_number(words, place):
    """Labels 1, 2, 3 of a table are names, of which "1" is the first class, although its number is 0."""
    document = {"input": {"shape": [2], "context_shape": [3]}, "layers": [], "prior": {"type": "standard_normal"}}
    samples = InMemory(torch.zeros(3, 2), torch.arange(3), torch.eye(3))
    task = task_of(invflow.build_model(document), DataSet("some", samples, samples, class_names=("1", "2", "3")))
    assert torch.equal(task.rows_of_context([words]), torch.eye(3)[[place]])


def p_value(a, b, permutations=199):
    """That of the maximum mean discrepancy of two samples of points, by permutations of where a point belongs."""
    together = torch.cat([a, b])
    kernel = (-torch.cdist(together, together).square() / (2 * KERNEL_WIDTH**2)).exp()
    signs = torch.cat([torch.full((len(a),), 1 / len(a)), torch.full((len(b),), -1 / len(b))])

    def discrepancy(of):
        return of @ kernel @ of

    generator = torch.Generator().manual_seed(0)
    others = [discrepancy(signs[torch.randperm(len(signs), generator=generator)]) for _ in range(permutations)]
    return (1 + sum(bool(other >= discrepancy(signs)) for other in others)) / (1 + permutations)


def test_samples_are_those_of_the_data(run):
    """A two-sample test does not tell 500 of them from test points of the same classes; samples too wide, it does."""
    some = run.data().test.first(500)
    with torch.no_grad():
        torch.manual_seed(0)
        drawn, wide = (run.model.sample(1, some.context, temperature=t)[0] for t in (1.0, 1.6))
    assert p_value(drawn, some.values) > 0.01
    assert p_value(wide, some.values) < 0.01
