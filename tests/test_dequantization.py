"""Dequantisation: the noise between the levels of pixels, uniform or drawn by a flow that sees the pixels."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow.errors import DataError, SpecError
from invflow.models import Dequantizer
from invflow.samples import Batch, DataSet, InMemory
from invflow.training.density import bits_of
from invflow.training.run import task_of

LEVELS = 4
NOISE = {
    "type": "sequential",
    "layers": [
        {"type": "split"},
        {"type": "affine_coupling", "net": {"type": "conv", "hidden": [8]}},
        {"type": "affine_coupling", "net": {"type": "conv", "hidden": [8]}},
        {"type": "merge"},
        {"type": "affine"},
    ],
}


def spec(**top_level):
    return {
        "input": {"shape": [2, 2, 2]},
        "layers": [{"type": "affine"}],
        "prior": {"type": "standard_normal"},
        "dequantization": NOISE,
        **top_level,
    }


def images(count, seed=0):
    drawn = torch.randint(LEVELS, (count, 2, 2, 2), generator=torch.Generator().manual_seed(seed))
    return drawn.double() / LEVELS


class TestDequantizer:
    def test_the_noise_lies_within_the_cell(self):
        model = invflow.build_model(spec()).double()
        pixels = images(50)
        x, log_q = model.dequantizer(pixels, LEVELS)
        assert log_q.shape == (50,)
        assert torch.equal((x * LEVELS).floor() / LEVELS, pixels)
        assert x.std() > 0

    def test_log_q_is_the_density_of_the_noise(self):
        """By the change of variables from the normal noise, differentiated automatically."""
        chain = invflow.build_model(spec()).double().dequantizer.bijection
        pixels = images(1)

        def noise_of_pixels(e):
            return chain(e.reshape(1, 2, 2, 2), pixels).sigmoid().flatten()

        torch.manual_seed(0)
        noise = torch.randn_like(pixels)  # what the dequantizer will draw
        torch.manual_seed(0)
        _, log_q = Dequantizer(chain)(pixels, LEVELS)
        jacobian = torch.autograd.functional.jacobian(noise_of_pixels, noise.flatten())
        expected = torch.distributions.Normal(0, 1).log_prob(noise).sum() - torch.linalg.slogdet(jacobian)[1]
        assert float((log_q - expected).detach()) == pytest.approx(0, abs=1e-10)

    def test_q_integrates_to_one(self):
        """The mean of 1 / q under q is the volume of the cell, 1."""
        model = invflow.build_model(spec(input={"shape": [2]}, dequantization={"type": "affine"})).double()
        torch.manual_seed(0)
        with torch.no_grad():
            _, log_q = model.dequantizer(torch.zeros(200_000, 2, dtype=torch.float64), LEVELS)
        inverse = (-log_q).exp()
        # Five standard errors.
        assert float(inverse.mean()) == pytest.approx(1, abs=5 * float(inverse.std()) / math.sqrt(len(inverse)))


def a_task(document, values=None):
    values = images(64).float() if values is None else values
    data = DataSet("some", InMemory(values), InMemory(values), levels=LEVELS)
    return task_of(invflow.build_model(document), data), values


class TestTraining:
    def test_the_bound_is_less_the_log_density_of_the_noise(self):
        document = spec(training={"data": {"name": "digits"}})
        task, values = a_task(document)
        training = task.training(task, invflow.load_spec(document).training)
        torch.manual_seed(3)
        loss, more = training.measure("train", Batch(values))
        torch.manual_seed(3)
        x, log_q = task.model.dequantizer(values, LEVELS)
        nll = -(task.model.log_prob(x) - log_q).mean()
        torch.testing.assert_close(more["nll"], nll)
        torch.testing.assert_close(loss, nll / (8 * math.log(2)) + math.log2(LEVELS))

    def test_is_tighter_than_uniform_noise(self):
        """Of a constant pixel the probability is 1, 0 bits, but a normal density of uniform noise takes a quarter bit.

        At best, that is ``log(2 pi e / 12) / 2`` nats; noise that is nearly normal within the cell takes nearly none.
        """
        torch.manual_seed(0)
        bits = {}
        for name, noise in {"uniform": None, "learned": {"type": "affine"}}.items():
            document = {**spec(input={"shape": [2]}), "dequantization": noise}
            task, _ = a_task({key: value for key, value in document.items() if value is not None}, torch.zeros(512, 2))
            optimizer = torch.optim.Adam(task.model.parameters(), lr=0.05)
            for _ in range(300):
                loss = bits_of(task.model, task.data, task.of_inputs(task.model, Batch(torch.zeros(512, 2))).mean())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            bits[name] = float(loss.detach())
        assert bits["uniform"] > math.log2(2 * math.pi * math.e / 12) / 2 - 0.02  # of one draw of the noise
        assert 0 < bits["learned"] < 0.1

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (spec(input={"shape": [2]}, dequantization={"type": "affine"}), "dequantization is for pixels on a grid"),
        ],
    )
    def test_data_without_levels(self, tmp_path, document, message):
        with pytest.raises(SpecError, match=message):
            invflow.fit(document, torch.randn(64, 2), tmp_path / "run", progress=False)

    def test_numbers_without_levels(self):
        with pytest.raises(DataError, match="pass levels"):
            invflow.evaluate(invflow.build_model(spec()), torch.rand(8, 2, 2, 2))

    def test_an_actnorm_is_initialised(self):
        document = spec(dequantization={"type": "actnorm"})
        task, values = a_task(document)
        assert task.awaits_data
        task.initialize(Batch(values))
        assert not task.awaits_data


class TestDocument:
    def test_of_layers_in_python(self):
        """All layers of the noise are in the document, which builds the same function."""
        parts = [invflow.bijections.Affine(shape=(2, 2, 2)), invflow.bijections.Affine(shape=(2, 2, 2))]
        flow = invflow.build_model(spec())
        made = invflow.Flow(flow.bijection, flow.prior, None, Dequantizer(invflow.Sequential(*parts)))
        again = invflow.build_model(invflow.to_spec(made))
        assert again.state_dict().keys() == made.state_dict().keys()

    def test_is_kept(self, tmp_path):
        model = invflow.build_model(spec())
        assert invflow.load_spec(invflow.to_spec(model)).hash == invflow.load_spec(spec()).hash
        assert invflow.load_spec(spec(dequantization=None)).hash != invflow.load_spec(spec()).hash
        invflow.save(model, tmp_path / "saved")
        again = invflow.load(tmp_path / "saved")
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, again.state_dict()[name])
        assert any(name.startswith("dequantizer.") for name in model.state_dict())

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (spec(prior=None), "dequantization belongs to a density: the spec needs a prior"),
            (spec(dequantization={"type": "split"}), "dequantization must map"),
            (spec(dequantization={"type": "afine"}), "did you mean 'affine'"),
            (spec(dequantization={"type": "logit"}), "expects a bijection of the reals"),
            (
                spec(dequantization={**NOISE, "layers": [], "numerics": {"mode": "snap"}}),
                "dequantization is for float numerics",
            ),
            (spec(dequantization={"type": "sequential", "layers": [{"type": "merge"}]}), "dequantization.layers.0"),
        ],
    )
    def test_what_does_not_fit(self, document, message):
        with pytest.raises(SpecError, match=message):
            invflow.build_model({name: value for name, value in document.items() if value is not None})
