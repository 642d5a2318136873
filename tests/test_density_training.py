"""Training of flows: bits per dimension in closed form, resumed runs, samples, pictures of densities."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import invflow
from invflow.diagnostics import plane
from invflow.errors import DataError, DivergedError, UnfinishedWarning
from invflow.models import Flow, bits_per_dimension, dequantize
from invflow.spec.training import Augmentation, Data
from invflow.training import run as runs
from invflow.training.compare import compare
from invflow.training.data import load_data
from invflow.training.illustrate import illustrate
from invflow.training.module import ModelTraining
from invflow.training.public import evaluate
from invflow.training.run import task_of
from invflow.training.run_folder import Run
from tests.test_training import tiny

STANDARD_ERRORS = 4
"""The error of a mean of draws is larger once in 16,000 times; the seeds are fixed."""

COUPLING = {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [8], "activation": "silu"}}


def points(**training):
    """A flow of points that trains quickly."""
    options = {"data": {"name": "moons", "train_size": 96, "test_size": 50}, "batch_size": 32, "epochs": 4, **training}
    return invflow.load_spec(
        {
            "name": "points",
            "input": {"shape": [2]},
            "layers": [{"type": "actnorm"}, {"type": "split"}, COUPLING, COUPLING, {"type": "merge"}],
            "prior": {"type": "standard_normal"},
            "training": options,
        }
    )


def images(**training):
    """A flow of digits that trains quickly."""
    options = {"data": {"name": "digits", "train_size": 64, "test_size": 40}, "batch_size": 16, "epochs": 3, **training}
    net = {"type": "conv", "hidden": [4]}
    return invflow.load_spec(
        {
            "name": "images",
            "input": {"shape": [1, 8, 8]},
            "layers": [
                {"type": "psi", "block_size": 2},
                {"type": "actnorm"},
                {"type": "linear_1x1"},
                {"type": "split"},
                {"type": "affine_coupling", "net": net},
                {"type": "affine_coupling", "net": net},
                {"type": "merge"},
            ],
            "prior": {"type": "standard_normal"},
            "training": options,
        }
    )


def residual_images(**training):
    """An i-ResNet of the digits whose log-determinants are estimated with random probes and numbers of terms."""
    spec = images(**training)
    block = {"type": "residual", "coefficient": 0.5, "net": {"type": "lipschitz_conv", "hidden": [3]}}
    layers = [
        {"type": "psi", "block_size": 2},
        {"type": "actnorm"},
        {**block, "log_det": {"type": "roulette"}},
        {**block, "log_det": {"type": "power_series"}},
    ]
    return spec.replace(layers=layers)


class TestBitsPerDimension:
    @pytest.mark.parametrize("levels", [2, 16, 256])
    @pytest.mark.parametrize("dimensions", [1, 784])
    def test_a_uniform_density_takes_all_bits(self, levels, dimensions):
        assert bits_per_dimension(torch.zeros(3), dimensions, levels).tolist() == [math.log2(levels)] * 3

    @pytest.mark.parametrize("levels", [4, 16])
    def test_a_density_that_is_constant_on_cells_gives_their_probability(self, levels):
        probability = torch.softmax(torch.arange(levels, dtype=torch.float64) / 3, 0)
        log_density = torch.log(probability * levels)  # spread over a cell of width 1 / levels
        torch.testing.assert_close(bits_per_dimension(log_density, 1, levels), -torch.log2(probability))

    def test_the_bound_is_the_mean_over_the_cell(self):
        """For a standard normal, the mean of log p over [a, b] is -log(2 pi)/2 - (b^3 - a^3) / (6 (b - a))."""
        levels, draws = 4, 20_000
        pixels = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        x = dequantize(pixels.expand(draws, -1), levels, generator)
        log_prob = -0.5 * (x.square() + math.log(2 * math.pi))
        a, b = pixels, pixels + 1 / levels
        expected = -0.5 * math.log(2 * math.pi) - (b**3 - a**3) / (6 * (b - a))
        error = (log_prob.mean(0) - expected).abs()
        assert (error < STANDARD_ERRORS * log_prob.std(0) / math.sqrt(draws)).all()
        normal = torch.distributions.Normal(0.0, 1.0)
        exact = -torch.log2(normal.cdf(b) - normal.cdf(a))
        bound = bits_per_dimension(expected, 1, levels)
        assert (bound >= exact).all(), "Jensen's inequality holds the other way round"
        assert (bound - exact).max() < 1e-2  # the density varies little within a cell

    @given(levels=st.sampled_from([2, 16, 256]), seed=st.integers(0, 2**32))
    def test_dequantised_pixels_stay_in_their_cell(self, levels, seed):
        generator = torch.Generator().manual_seed(seed)
        k = torch.randint(levels, (50,), generator=generator)
        x = dequantize(k.double() / levels, levels, generator)
        assert torch.equal((x * levels).floor().long(), k)
        assert len(x.unique()) == 50

    def test_pixels_off_the_grid_go_to_the_nearest_level(self):
        x = dequantize(torch.tensor([0.2501, 0.2499], dtype=torch.float64), 4)
        assert (x * 4).floor().tolist() == [1, 1]


class TestPoints:
    @pytest.mark.parametrize("name", ["moons", "circles", "checkerboard"])
    def test_points_are_the_same_each_time_and_test_points_are_others(self, name):
        first, second = (load_data(Data(name=name, train_size=100, test_size=50)) for _ in range(2))
        assert first.shape == (2,)
        assert not first.holds_images
        assert (len(first.train), len(first.test)) == (100, 50)
        assert torch.equal(first.train.all().values, second.train.all().values)
        assert not torch.isin(first.test.all().values, first.train.all().values).any()

    def test_noise_is_what_the_spec_says(self):
        def radii(noise):
            data = load_data(Data(name="circles", noise=noise, train_size=1000)).train
            outer = data.all().values[data.labels == 0]
            return outer.norm(dim=1)

        assert (radii(0.0) - 1).abs().max() < 1e-6
        # 500 radii about a circle: the radial part of the noise, within 4 standard errors of a standard deviation.
        assert radii(0.05).std().item() == pytest.approx(0.05, rel=STANDARD_ERRORS / math.sqrt(2 * 500))

    def test_a_checkerboard_has_dark_squares_only(self):
        x = load_data(Data(name="checkerboard")).train.all().values
        assert -2 <= x.min() < x.max() < 2
        cells = x.floor().long()
        assert ((cells.sum(1) % 2) == 0).all()
        assert len(cells.unique(dim=0)) == 8

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "mnist", "noise": 0.1}, "MNIST.* got an unexpected keyword argument 'noise'"),
            ({"name": "checkerboard", "noise": 0.1}, "Checkerboard.* got an unexpected keyword argument 'noise'"),
            ({"name": "moons", "augmentation": Augmentation()}, "augmentation changes images, but moons has points"),
        ],
    )
    def test_options_of_other_data_are_refused(self, options, message):
        with pytest.raises(DataError, match=message):
            load_data(Data(**options))

    def test_a_spec_cannot_ask_for_points_without_end(self):
        with pytest.raises(DataError, match="moons has at most 1000000 points, the spec asks for 100000000"):
            load_data(Data(name="moons", test_size=10**8))

    def test_test_images_can_be_fewer(self):
        assert len(load_data(Data(test_size=10)).test) == 10
        with pytest.raises(DataError, match="digits has 449 test samples, the spec asks for 1000"):
            load_data(Data(test_size=1000))


class TestRuns:
    @pytest.mark.parametrize("make", [points, images, residual_images])
    def test_a_run_of_a_flow(self, tmp_path, make):
        run = runs.train(make(), tmp_path / "run", progress=False)
        assert run.record["status"] == "finished"
        model = run.load()
        assert isinstance(model, Flow)
        assert not model.bijection.awaits_data
        found = evaluate(run)
        assert found.scores == evaluate(run).scores, "an evaluation draws the same noise each time"
        for name, value in found.scores.items():
            assert value == pytest.approx(run.metrics[-1][name], rel=1e-5)  # float32 means
            assert name == next(iter(found.scores)) or f"best_{name}" not in run.record
        score = next(iter(found.scores))
        assert run.record[f"best_{score}"] <= run.record[score]
        rows = [row[score] for row in run.metrics]
        assert run.record[f"best_{score}"] == pytest.approx(min(rows), rel=1e-5)
        assert rows[-1] < rows[0], "it learns nothing"
        for (dtype, _), trip in found.round_trips.items():
            assert trip.relative <= 64 * torch.finfo(getattr(torch, dtype)).eps  # two couplings: a few roundings

    def test_bits_and_nats_agree(self, tmp_path):
        found = evaluate(runs.train(images(epochs=1), tmp_path / "run", progress=False))
        assert found.test_bits_per_dim == pytest.approx(found.test_nll / (64 * math.log(2)) + 4)  # pixels k / 16

    def test_the_evaluation_is_the_density_of_the_pixels(self, tmp_path):
        """Without the code that evaluates: another draw of the noise differs by less than 0.03 nats per pixel."""
        run = runs.train(images(), tmp_path / "run", progress=False)
        model, pixels = run.load().eval(), load_data(run.training.data).test.all().values
        with torch.no_grad():
            nll = -model.log_prob((pixels * 16 + torch.rand_like(pixels)) / 16).mean()
        assert evaluate(run).test_nll == pytest.approx(nll.item(), abs=0.03 * 64)

    @pytest.mark.parametrize("make", [points, images, residual_images])
    @pytest.mark.parametrize("epoch", [0, 1])
    def test_an_interrupted_flow_ends_as_if_it_had_not_been(self, tmp_path, monkeypatch, make, epoch):
        spec = make(schedule={"type": "one_cycle"}, clip_gradient=5.0)
        whole = runs.train(spec, tmp_path / "whole", progress=False)
        step = ModelTraining.training_step

        def interrupt(module, batch, index):
            if module.current_epoch == epoch and index == 1:
                raise KeyboardInterrupt
            return step(module, batch, index)

        with monkeypatch.context() as patch:
            patch.setattr(ModelTraining, "training_step", interrupt)
            with pytest.raises(KeyboardInterrupt):
                runs.train(spec, tmp_path / "run", progress=False)
        run = runs.resume(tmp_path / "run", progress=False)
        expected, found = whole.load().state_dict(), run.load().state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert evaluate(run).scores == evaluate(whole).scores

    def test_gradients_are_clipped(self, tmp_path):
        """Plain gradient descent moves by lr times the gradient, so that the bound limits the norm of the step."""
        options = {"optimizer": {"type": "sgd", "lr": 1.0}, "epochs": 1, "batch_size": 96}
        runs.train(points(**options, clip_gradient=1e-3), tmp_path / "run", progress=False)
        torch.manual_seed(0)
        before = invflow.build_model(points())
        before.bijection.initialize(load_data(points().training.data).train.all().values)
        after = invflow.load(tmp_path / "run")
        moved = torch.cat([(b - a).flatten() for a, b in zip(before.parameters(), after.parameters(), strict=True)])
        assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)  # differences of float32 weights

    @pytest.mark.parametrize("make", [points, tiny])
    def test_divergence_is_one_line_and_keeps_what_was_finite(self, tmp_path, make):
        spec = make(optimizer={"type": "sgd", "lr": 1e30}, schedule={"type": "one_cycle", "start_factor": 1e30})
        with pytest.raises(DivergedError, match=r"run: training diverged in epoch \d+, step \d+: .*clip_gradient") as e:
            runs.train(spec, tmp_path / "run", progress=False)
        assert "\n" not in str(e.value)
        run = Run.open(tmp_path / "run")
        assert run.record["status"] == "diverged"
        with pytest.warns(UnfinishedWarning, match=r"run: training diverged in .* the weights are those after 0 of"):
            model = run.load()
        assert all(weight.isfinite().all() for weight in model.state_dict().values())
        with pytest.raises(DivergedError, match="it would diverge again"):
            runs.resume(tmp_path / "run", progress=False)

    def test_a_classifier_of_points(self, tmp_path):
        document = {**points().document, "prior": None, "head": {"type": "linear", "classes": 2}}
        run = runs.train(invflow.load_spec(document), tmp_path / "run", progress=False)
        found, pictures = illustrate(run)
        assert found.test_accuracy > 0.5
        assert sorted(path.rsplit("/")[-1] for path in pictures) == ["curves.png", "decisions.png"]

    def test_what_belongs_to_classifiers_is_refused(self, tmp_path):
        with pytest.raises(invflow.SpecError, match=r"training\.label_smoothing: .* a flow learns without labels"):
            runs.train(points(label_smoothing=0.1), tmp_path / "run")
        with pytest.raises(invflow.SpecError, match="a model needs a head or a prior"):
            runs.train(points().replace(prior=None), tmp_path / "run")
        with pytest.raises(invflow.SpecError, match=r"moons has points of shape \(2,\), the spec expects \(3,\)"):
            runs.train(points().replace(input={"shape": [3]}), tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestCompare:
    def test_flows_are_compared_by_their_likelihood(self, tmp_path):
        specs = [("a", points(epochs=1)), ("b", points(epochs=2))]
        found = compare(specs, 2, tmp_path, announce=lambda line: None, progress=False)
        assert found.score.name == "nll"
        for row in found.rows:
            document = row.as_json()
            assert len(document["test_nll"]) == len(document["seconds"]) == 2
            assert document["round_trip_error"] < 1e-6

    def test_classifiers_and_flows_are_not_compared(self, tmp_path):
        message = "compare expects models with the same score: a has accuracy, b has negative log-likelihood"
        with pytest.raises(invflow.InvflowError, match=message):
            compare([("a", tiny()), ("b", points())], 1, tmp_path / "none", announce=lambda line: None)
        assert not (tmp_path / "none").exists()

    def test_one_that_diverges_does_not_cost_the_others(self, tmp_path):
        hot = points(optimizer={"type": "sgd", "lr": 1e30})
        lines = []
        found = compare([("hot", hot), ("b", points())], 1, tmp_path, announce=lines.append, progress=False)
        assert math.isnan(found.rows[0].scores["test_nll"][0])
        assert math.isfinite(found.rows[1].scores["test_nll"][0])
        assert any("training diverged" in line for line in lines)


class TestPictures:
    def test_a_density_picture_counts_mass_and_what_is_outside(self):
        flow = invflow.build_model({"input": {"shape": [2]}, "layers": [], "prior": {"type": "standard_normal"}})
        corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0]])  # with margins, [-1.3, 1.3]^2
        data, samples, density, _ = plane.density(flow, corners, torch.tensor([[0.0, 0.0], [5.0, 0.0]])).axes
        inside = math.erf(1.3 / math.sqrt(2)) ** 2
        assert density.get_title() == f"log-density, {100 * inside:.1f} % of its mass in this region"
        assert samples.get_title() == "2 samples, 1 of them outside"
        values = density.images[0].get_array()
        # The grid of 200 points has none at the origin: half a step away the density is lower by 1e-4.
        assert values.max() == pytest.approx(-math.log(2 * math.pi), abs=1e-3)
        assert data.get_xlim() == density.get_xlim() == pytest.approx((-1.3, 1.3))

    def test_the_density_lies_where_its_points_are(self):
        """The picture of a narrow flow about (3, -1) has its peak there, without reflection."""
        flow = invflow.build_model(
            {"input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"}}
        )
        with torch.no_grad():
            flow.bijection[0].log_scale.fill_(math.log(10.0))
            flow.bijection[0].shift.copy_(torch.tensor([-30.0, 10.0]))
        figure = plane.density(flow, torch.tensor([[0.0, -2.0], [4.0, 2.0]]), flow.sample(10).detach())
        image = figure.axes[2].images[0]
        row, column = divmod(int(image.get_array().argmax()), plane.SIDE)
        left, right, bottom, _ = image.get_extent()
        step = (right - left) / (plane.SIDE - 1)
        assert left + column * step == pytest.approx(3, abs=step)
        assert bottom + row * step == pytest.approx(-1, abs=step)
        assert image.origin == "lower"

    def test_decisions_count_what_is_wrong(self):
        classifier = torch.nn.Linear(2, 2)
        with torch.no_grad():
            classifier.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
            classifier.bias.zero_()
        x = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [2.0, 1.0]])
        figure = plane.decisions(classifier, x, torch.tensor([0, 1, 0]))
        assert "1 of 3 test points" in figure.axes[0].get_title()
        places = figure.axes[0].images[0].get_array()
        assert places[0, 0] == 0
        assert places[0, -1] == 1

    def test_points_of_space_are_no_plane(self):
        with pytest.raises(invflow.InvflowError, match=r"points \(n, 2\), at least one, got \(5, 3\)"):
            plane.decisions(torch.nn.Linear(3, 2), torch.zeros(5, 3), torch.zeros(5, dtype=torch.long))


def test_temperature_scales_the_latent():
    flow = invflow.build_model(points()).eval()
    task = task_of(flow, load_data(points().training.data))
    assert torch.equal(task.draw(50), task.draw(50, temperature=1.0))
    assert not torch.equal(task.draw(50), task.draw(50, seed=1))
    with torch.no_grad():
        z, cold = flow.bijection(task.draw(50)), flow.bijection(task.draw(50, temperature=0.5))
    torch.testing.assert_close(cold, 0.5 * z)
    mode = flow.bijection.inverse(torch.zeros(1, 2))
    torch.testing.assert_close(task.draw(3, temperature=0.0), mode.expand(3, -1))


def test_the_documents_of_runs_are_plain(tmp_path):
    runs.train(points(epochs=1), tmp_path / "run", progress=False)
    json.loads((tmp_path / "run" / "run.json").read_text(), parse_constant=pytest.fail)
