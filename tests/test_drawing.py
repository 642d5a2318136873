"""Pictures of a model while it is trained, and of a flow for each class."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow.diagnostics import pictures, plane
from invflow.errors import SpecError
from invflow.training import run as runs
from invflow.training.data import load_data
from invflow.training.density import DRAWN_POINTS, IN_A_ROW, Density
from invflow.training.run import task_of
from tests.test_density_training import images, points, residual_images
from tests.test_schedules import stop_at
from tests.test_training import tiny


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """Of a density: 200 along each axis take seconds."""
    monkeypatch.setattr(plane, "SIDE", 20)


@pytest.fixture
def no_files(monkeypatch):
    """The names of the pictures, which are not written."""
    names = []
    monkeypatch.setattr(pictures, "write_figure", lambda _, path: names.append(path.name))
    return names


def drawn_in(run):
    """The pictures of a run folder, by their names."""
    return {path.name: path.read_bytes() for path in (run.folder / "pictures").iterdir()}


@pytest.mark.parametrize("make", [points, images, residual_images, tiny])
def test_pictures_change_no_weight(tmp_path, no_files, make):
    """Of layers whose norms are found by iterations from the last ones too, in epochs without an evaluation."""
    options = {"epochs": 3, "evaluate_every": 3}
    without = runs.train(make(**options), tmp_path / "without", progress=False)
    run = runs.train(make(**options, draw_every=1), tmp_path / "with", progress=False)
    torch.testing.assert_close(run.load().state_dict(), without.load().state_dict(), rtol=0, atol=0)
    assert run.metrics == without.metrics
    kind = "density" if make is points else "samples"
    assert no_files == [f"{kind}-000{epoch}.png" for epoch in (1, 2, 3)]


def test_every_few_epochs_and_of_an_interrupted_run_too(tmp_path, monkeypatch):
    """A picture is that of its epoch, whenever that ended: the latent points are the same."""
    spec = points(epochs=5, draw_every=2)
    whole = runs.train(spec, tmp_path / "whole", progress=False)
    expected = drawn_in(whole)
    assert list(expected) == ["density-0002.png", "density-0004.png"]
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            runs.train(spec, tmp_path / "run", progress=False)
    left = tmp_path / "run" / "pictures" / ".density-0004.png.0123abcd"
    left.write_text("of a training that was killed")
    assert drawn_in(runs.resume(tmp_path / "run", progress=False)) == expected
    short = runs.train(points(epochs=2, draw_every=2), tmp_path / "short", progress=False)
    assert drawn_in(short)["density-0002.png"] == expected["density-0002.png"]


def test_averages_are_drawn_in_the_place_of_weights(tmp_path, monkeypatch, no_files):
    seen = []
    figures = Density.figures

    def watched(task):
        seen.append({name: weight.clone() for name, weight in task.model.state_dict().items()})
        return figures(task)

    monkeypatch.setattr(Density, "figures", watched)
    spec = points(average={"decay": 0.9}, epochs=2, draw_every=2)
    run = runs.train(spec, tmp_path / "run", progress=False)
    assert no_files == ["density-0002.png"]
    torch.testing.assert_close(seen, [run.load().state_dict()], rtol=0, atol=0)


def test_a_model_of_other_precision_is_drawn(tmp_path, no_files):
    flow = invflow.build_model(points()).double()
    data = torch.randn(60, 2, dtype=torch.float64)
    invflow.fit(flow, data, tmp_path / "run", epochs=1, draw_every=1, progress=False)
    assert no_files == ["density-0001.png"]


def test_what_cannot_be_drawn_is_refused(tmp_path):
    spec = points().replace(input={"shape": [3]}, layers=[{"type": "affine"}], training=None)
    said = r"training\.draw_every: images and points of the plane can be drawn, given has samples of shape \(3,\)"
    with pytest.raises(SpecError, match=said):
        invflow.fit(spec, torch.randn(50, 3), tmp_path / "run", draw_every=1, progress=False)
    assert not (tmp_path / "run").exists()


def conditional(make, classes):
    """The task of training a flow whose context is the class."""
    spec = make(data={**make().expanded["training"]["data"], "context": "labels"})
    spec = spec.replace(input={**spec.expanded["input"], "context_shape": [classes]})
    torch.manual_seed(0)
    task = task_of(invflow.build_model(spec).eval(), load_data(spec.training.data))
    task.model.bijection.initialize(task.inputs(task.data.train.first(50).values), task.data.train.first(50).context)
    return task


def test_images_have_a_row_for_each_class(monkeypatch):
    task = conditional(images, 10)

    def draw(_, count, context):
        assert count == len(context)
        return (context.argmax(1) / 10).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    monkeypatch.setattr(Density, "draw", draw)
    figure = task.figures()["samples"]
    shown = [float(axis.images[0].get_array().max()) for axis in figure.axes]
    assert shown == pytest.approx([k / 10 for k in range(10) for _ in range(IN_A_ROW)], abs=1e-6)
    names = [axis.get_ylabel() for axis in figure.axes]
    assert names == [str(k) if column == 0 else "" for k in range(10) for column in range(IN_A_ROW)]


def test_of_many_classes_the_first_are_drawn(monkeypatch):
    monkeypatch.setattr("invflow.training.density.DRAWN_CLASSES", 3)
    figure = conditional(images, 10).figures()["samples"]
    assert len(figure.axes) == 3 * IN_A_ROW
    assert figure.get_suptitle().split("\n")[0].endswith("for each of the first 3 of 10 classes")


def test_points_have_a_row_of_panels_for_each_class():
    task = conditional(points, 2)
    some, figure = task.data.test.first(DRAWN_POINTS), task.figures()["density"]
    panels = [axis for axis in figure.axes if axis.get_xlabel() != "nats" and axis.get_title()]
    assert len(panels) == 9
    drawn = task.draw(DRAWN_POINTS, some.context)
    of_drawn = some.labels.repeat(DRAWN_POINTS)[:DRAWN_POINTS]
    with torch.no_grad():
        grid = plane.grid(*plane.window(some.values))
        for k, (data, samples, density) in enumerate(zip(*[iter(panels[3:])] * 3, strict=True)):
            for axis, shown in ((data, some.values[some.labels == k]), (samples, drawn[of_drawn == k])):
                torch.testing.assert_close(torch.tensor(axis.collections[0].get_offsets().data), shown.double())
            expected = task.model.log_prob(grid, torch.eye(2)[[k]]).double().view(plane.SIDE, -1)
            found = torch.tensor(density.images[0].get_array().data)
            # Corners of the region that matplotlib keeps in double precision: float32 rounds them.
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
            assert data.get_ylabel() == f"class {task.data.class_names[k]}\nx₂"
            assert data.get_xlim() == panels[0].get_xlim()


def test_a_context_that_is_no_class_has_no_rows():
    task = conditional(points, 2)
    assert task.rows_of_classes() is not None
    halves = task.data.changed(Halved)
    assert task_of(task.model, halves).rows_of_classes() is None


class Halved(invflow.samples.Changed):
    """Half of each context."""

    def change(self, batch):
        return batch._replace(context=batch.context / 2)
