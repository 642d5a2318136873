"""Priors that are mixtures: probabilities on a grid, and normal distributions by class."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch.distributions import Normal as TorchNormal

import invflow
from invflow import Flow, InvflowError, Sequential, ShapeError
from invflow.bijections import Affine
from invflow.models import GaussianMixture, StandardNormal
from invflow.state import leaves
from invflow.training.data import load_data
from invflow.training.density import bits_of
from invflow.training.run import task_of
from tests.test_priors import BY, CASES, CLASSES, SUM, made


class TestDiscretizedLogistic:
    def masses(self, prior, x):
        """The log-probabilities of one number, with 80 digits."""
        mpmath.mp.dps = 80
        levels, ends = prior.levels, prior.ends
        weights = [mpmath.mpf(w) for w in prior.logits[:, 0].softmax(0).tolist()]
        means, log_scales = prior.means[:, 0].tolist(), prior.log_scales[:, 0].tolist()
        found = []
        for index in (round(float(value) * levels) for value in x):
            total = mpmath.mpf(0)
            for weight, mean, log_scale in zip(weights, means, log_scales, strict=True):
                low, high = (
                    ((index + half) / mpmath.mpf(levels) - mean) / mpmath.exp(log_scale)
                    for half in (mpmath.mpf(-0.5), mpmath.mpf(0.5))
                )
                low = -mpmath.inf if ends is not None and index == ends[0] else low
                high = mpmath.inf if ends is not None and index == ends[1] else high
                if low > 0:  # by symmetry, so that two numbers near 1 are not subtracted
                    low, high = -high, -low
                total += weight * (1 / (1 + mpmath.exp(-high)) - 1 / (1 + mpmath.exp(-low)))
            found.append(float(mpmath.log(total)))
        return torch.tensor(found, dtype=torch.float64)

    @pytest.mark.parametrize("bounds", [None, [0, 0.9375]])
    @pytest.mark.parametrize("log_scale", [-12.0, -4.0, 0.0, 12.0])
    def test_tails_and_tiny_scales_keep_their_digits(self, log_scale, bounds):
        prior = made("discretized_logistic", {"levels": 16, "components": 2, "bounds": bounds}, (1,))
        with torch.no_grad():
            prior.log_scales.fill_(log_scale)
        x = torch.arange(16).double() / 16
        if bounds is None:
            x = torch.cat([x, torch.tensor([-50.0, 50.0], dtype=torch.float64)])
        found = prior.log_prob(x[:, None]).detach()
        torch.testing.assert_close(found, self.masses(prior, x), rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("log_scale", [-300.0, -30.0, 300.0])
    def test_extreme_scales_give_numbers(self, log_scale):
        prior = made("discretized_logistic", {"levels": 16}, (1,)).float()
        with torch.no_grad():
            prior.log_scales.fill_(log_scale)
        z = (torch.arange(-8, 8) / 16)[:, None]
        found = prior.log_prob(z)
        assert found.isfinite().all()
        found.sum().backward()
        assert all(weight.grad.isfinite().all() for weight in prior.parameters())
        assert prior.sample(10).isfinite().all()

    @pytest.mark.parametrize("levels", [10, 16, 17, 255, 256])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_samples_and_data_are_on_the_grid(self, levels, dtype):
        prior = made("discretized_logistic", {"levels": levels}, (4,)).to(dtype)
        z = prior.sample(500)
        assert torch.equal(z, (z * levels).round() / levels)
        assert prior.log_prob(z).isfinite().all()
        pixels = (torch.arange(4 * levels) / levels).to(dtype).reshape(-1, 4)
        assert prior.log_prob((torch.arange(4 * levels).to(dtype) / levels).reshape(-1, 4)).isfinite().all()
        between = pixels + 0.3 / levels
        assert (prior.log_prob(between) == -math.inf).all()

    def test_bounds_are_kept(self):
        prior = made("discretized_logistic", {"levels": 16, "bounds": [-0.25, 0.5]}, (3,))
        with torch.no_grad():
            prior.log_scales.fill_(2.0)
        z = prior.sample(500)
        assert (z.min(), z.max()) == (-0.25, 0.5)
        assert prior.log_prob(torch.tensor([[0.0, 0.5625, 0.0]]).double()) == -math.inf
        single = made("discretized_logistic", {"levels": 16, "bounds": [0.5, 0.5]}, (3,))
        assert single.log_prob(torch.full((1, 3), 0.5).double()).abs().item() < SUM
        for bounds in ([0, 0.97], [0.5, 0.25]):
            with pytest.raises(InvflowError, match="expects bounds that are multiples of 1/16, the first not above"):
                made("discretized_logistic", {"levels": 16, "bounds": bounds}, (3,))

    def test_bits_per_dimension_are_those_of_the_pixels(self):
        """Pixels are not dequantised under a prior of probabilities, so that bits are exact and not bounded."""
        prior = {"type": "discretized_logistic", "levels": 16, "bounds": [0, 1]}
        spec = invflow.load_spec(
            {
                "input": {"shape": [1, 8, 8]},
                "layers": [{"type": "psi", "block_size": 2}],
                "prior": prior,
                "training": {"data": {"name": "digits", "train_size": 50, "test_size": 40}},
            }
        )
        flow, data = invflow.build_model(spec), load_data(spec.training.data)
        found = task_of(flow, data).evaluate()
        x = data.test.first(40).values
        exact = -flow.log_prob(x).double().mean() / (64 * math.log(2))
        assert found.test_bits_per_dim == pytest.approx(exact.item(), rel=1e-6)
        assert 0 < found.test_bits_per_dim < math.log2(17) + 2
        continuous = Flow(flow.bijection, StandardNormal((4, 4, 4)))
        assert bits_of(continuous, data, torch.zeros(())) == 4  # 16 levels: the volume of a cell counts

    def test_a_chain_on_the_grid_keeps_the_probabilities(self):
        """A bijection of the grid moves probabilities about: they still sum to 1, and samples are data."""
        coupling = {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [8], "activation": "tanh"}}
        torch.manual_seed(0)
        flow = invflow.build_model(
            {
                "input": {"shape": [2]},
                "layers": [{"type": "split"}, coupling, coupling, {"type": "merge"}],
                "numerics": {"mode": "grid", "frac_bits": 2},
                "prior": {"type": "discretized_logistic", "levels": 4, "components": 2},
            }
        ).double()
        with torch.no_grad():
            for weight in flow.bijection.parameters():
                weight.mul_(2)
            side = torch.arange(-160, 161).double() / 4
            grid = torch.cartesian_prod(side, side)
            total = flow.log_prob(grid).exp().sum().item()
            assert total == pytest.approx(1, abs=1e-9)  # scales of 1: the tails beyond 40 have less
            assert (flow.bijection(grid) != grid).any()
            x, log_prob = flow.sample_with_log_prob(200)
            assert torch.equal(x, (x * 4).round() / 4)
            assert torch.equal(flow.log_prob(x), log_prob)

    def spec(self, **top):
        prior = {"type": "discretized_logistic", "levels": 16, "components": 2, "bounds": [0, 1]}
        data = {"name": "digits", "train_size": 100, "test_size": 40}
        return invflow.load_spec(
            {
                "input": {"shape": [1, 8, 8]},
                "layers": [{"type": "psi", "block_size": 2}],
                "prior": prior,
                "training": {"data": data, "epochs": 15, "optimizer": {"type": "adam", "lr": 0.05}},
                **top,
            }
        )

    def test_it_is_trained_on_pixels(self, tmp_path):
        run = invflow.train(self.spec(), tmp_path / "run", progress=False)
        first, *_, last = [row["train_bits_per_dim"] for row in run.metrics]
        assert last < first - 0.5
        drawn = task_of(run.load(), load_data(self.spec().training.data)).draw(20)
        assert torch.equal(drawn, (drawn * 16).round() / 16)

    def test_data_that_do_not_fit_are_refused(self, tmp_path):
        prior = self.spec().expanded["prior"]
        for wrong in ({"levels": 8}, {"bounds": [0, 0.9375]}, {"bounds": [0.0625, 1]}):
            with pytest.raises(invflow.SpecError, match=r"prior: digits has pixels from 0 to 1\.0 in steps of 1/16"):
                invflow.train(self.spec(prior=prior | wrong), tmp_path / "run", progress=False)
        training = {"data": {"name": "moons"}}
        points = self.spec(input={"shape": [2]}, layers=[], training=training)
        with pytest.raises(invflow.SpecError, match="prior: a prior on a grid is for images, and moons has"):
            invflow.train(points, tmp_path / "run", progress=False)


class TestByContext:
    def flow(self, **fields):
        document = {
            "input": {"shape": [2], "context_shape": [CLASSES]},
            "layers": [{"type": "affine"}],
            "prior": {"type": "gaussian_mixture", **BY, "spread": 3.0, **fields},
        }
        torch.manual_seed(0)
        return invflow.build_model(document).double()

    def test_a_class_is_a_normal_distribution(self):
        flow = self.flow()
        x = torch.randn(5, 2, dtype=torch.float64)
        for c in range(CLASSES):
            row = torch.eye(CLASSES, dtype=torch.float64)[c : c + 1]
            expected = TorchNormal(flow.prior.means[c], flow.prior.log_scales[c].exp()).log_prob(x).sum(1)
            torch.testing.assert_close(flow.log_prob(x, row), expected)
            torch.testing.assert_close(flow.log_prob(x, row.expand(5, -1)), expected)
            torch.testing.assert_close(flow.prior.component_log_prob(x)[:, c], expected)

    def test_samples_are_those_of_their_rows(self):
        flow = self.flow()
        context = torch.eye(CLASSES, dtype=torch.float64)
        x, found = flow.sample_with_log_prob(4000, context)
        means = flow.prior.means
        assert (x.mean(0) - means).abs().max() < 4 / math.sqrt(4000)  # four standard errors
        each = torch.stack([flow.log_prob(x[:, c], context[c : c + 1]) for c in range(CLASSES)], dim=1)
        torch.testing.assert_close(found, each, rtol=1e-10, atol=1e-10)
        assert flow.distribution(context).rsample((5,)).requires_grad

    def test_a_run_draws_each_class_beside_its_data(self, tmp_path):
        """The chain does not see the class: the prior alone separates the two moons."""
        spec = invflow.load_spec(
            {
                "input": {"shape": [2], "context_shape": [2]},
                "layers": [{"type": "affine"}],
                "prior": {"type": "gaussian_mixture", **BY},
                "training": {
                    "data": {"name": "moons", "train_size": 400, "test_size": 100, "context": "labels"},
                    "epochs": 20,
                    "optimizer": {"type": "adam", "lr": 0.05},
                },
            }
        )
        run = invflow.train(spec, tmp_path / "run", progress=False)
        task = task_of(run.load(), load_data(spec.training.data))
        rows = torch.eye(2)
        drawn = task.draw(2001, rows)
        assert drawn.shape == (2001, 2)
        test = task.data.test.first(100)
        for c in range(2):
            own = test.values[test.labels == c].mean(0)
            assert (drawn[c::2].mean(0) - own).abs().max() < 0.3  # the moons' centres are (0, 0.5) and (1, 0)
        assert "5 samples" in invflow.plot.density(run, test.values, 5, context=rows[:1]).axes[1].get_title()

    def test_bayes_rule_is_linear_with_scales_of_1(self):
        """log p(z | c) - log p(z | d) = z . (mean_c - mean_d) - (|mean_c|^2 - |mean_d|^2) / 2."""
        prior = self.flow(learn_scales=False).prior
        assert [name for name, _ in prior.named_parameters()] == ["means"]
        z = torch.randn(7, 2, dtype=torch.float64)
        linear = z @ prior.means.T - prior.means.square().sum(1) / 2
        found = prior.component_log_prob(z)
        torch.testing.assert_close(found.log_softmax(1), linear.log_softmax(1))

    def test_gradients_reach_the_means_of_the_class_alone(self):
        flow = self.flow()
        context = torch.eye(CLASSES, dtype=torch.float64)[[1]].requires_grad_()
        flow.log_prob(torch.ones(1, 2, dtype=torch.float64), context).sum().backward()
        assert (flow.prior.means.grad.abs().sum(1) > 0).tolist() == [False, True, False]
        assert (context.grad != 0).any()

    @pytest.mark.parametrize("given", [{}, {"context_shape": (2, 2)}, {"context_shape": (3,), "components": 4}])
    def test_other_contexts_are_refused(self, given):
        with pytest.raises(ShapeError, match="prior by context expects one"):
            GaussianMixture(**BY, shape=(2,), **given)
        prior = GaussianMixture(**BY, shape=(2,), context_shape=(3,))
        for context in (None, torch.zeros(1, 4)):
            with pytest.raises(ShapeError, match=r"expects a context \(3,\), got"):
                prior.log_prob(torch.zeros(1, 2), context)

    def test_the_spec_says_where(self):
        document = {"input": {"shape": [2]}, "layers": [], "prior": {"type": "gaussian_mixture", **BY}}
        with pytest.raises(
            invflow.SpecError, match=r"prior: the gaussian_mixture prior by context expects one \(features,\)"
        ):
            invflow.build_model(document)


def test_learned_priors_are_trained():
    """Maximum likelihood moves a normal prior to the mean and the standard deviation of the data."""
    torch.manual_seed(0)
    x = 3 * torch.randn(500, 2, dtype=torch.float64) - 1
    flow = Flow(Sequential(), made("normal", {}, (2,)))
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -flow.log_prob(x).mean()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(flow.prior.mean.detach(), x.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.prior.log_scale.detach().exp(), x.std(0, correction=0), rtol=1e-4, atol=1e-4)


def test_a_mixture_separates_its_components():
    """Components with different means do not stay equal: two clusters are found."""
    torch.manual_seed(1)
    x = torch.cat([torch.randn(300, 2) + 5, torch.randn(300, 2) - 5]).double()
    flow = Flow(Sequential(Affine((2,))), made("gaussian_mixture", {"components": 2}, (2,))).double()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (-flow.log_prob(x).mean()).backward()
        optimizer.step()
    truth = -(math.log(2) + math.log(2 * math.pi) + 1)  # the entropy of the mixture of two far apart, in two dimensions
    assert flow.log_prob(x).mean().item() == pytest.approx(truth, abs=0.1)


def test_uniform_ends_are_in_order():
    with pytest.raises(InvflowError, match=r"the uniform prior expects low below high, got 1\.0 and 1\.0"):
        made("uniform", {"low": 1.0, "high": 1.0}, (2,))


def test_open_ends_are_never_drawn(monkeypatch):
    """`torch.rand` draws 0 once in 10^7, where a logit is infinite."""
    monkeypatch.setattr(torch, "rand", torch.zeros)
    for tag in ("logistic", "uniform", "discretized_logistic"):
        for dtype in (torch.float64, torch.float32, torch.float16):
            z = made(tag, CASES[tag][0], (2,)).to(dtype).sample(3)
            assert all(leaf.isfinite().all() for leaf in leaves(z))
    assert (made("uniform", {}, (2,)).sample(3) > 0).all()
