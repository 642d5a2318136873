"""Flows from both ends: samples for each row of a context, their densities, and flows as torch's distributions."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.distributions import Distribution, MultivariateNormal, constraints

import invflow
from invflow import Flow, Inverse, InvflowError, Sequential, ShapeError
from invflow.bijections import Affine, Logit, Sigmoid, Softplus, Split, Tanh
from invflow.models import StandardNormal

COUPLING = {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [8], "activation": "tanh"}}
PAIR = [{"type": "split"}, COUPLING, COUPLING, {"type": "merge"}]
MODELS = {
    "vectors": {"input": {"shape": [3]}, "layers": PAIR},
    "conditional": {"input": {"shape": [3], "context_shape": [2]}, "layers": PAIR},
    "images": {
        "input": {"shape": [2, 4, 4], "context_shape": [2]},
        "layers": [{"type": "psi", "block_size": 2}, *PAIR],
    },
    "reversible": {"input": {"shape": [3], "context_shape": [2]}, "layers": PAIR, "backprop": "reversible"},
    "tuples": {"input": {"shape": [[2], [3]], "context_shape": [2]}, "layers": [COUPLING]},
}
ROUNDING = 1e-10
"""Of log-densities of a few dozen numbers in float64, by two paths through a dozen layers: eps times 10^5."""
STANDARD_ERRORS = 4.0
"""The error of a mean of draws is larger once in 16,000 times; the seeds are fixed."""


def made(name):
    torch.manual_seed(1)
    return invflow.build_model({**MODELS[name], "prior": {"type": "standard_normal"}}).double().eval()


def rows_for(flow, count=4):
    shape = flow.bijection.declared_context_shape
    return None if shape is None else torch.randn(count, *shape, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", MODELS)
class TestSamples:
    def test_have_a_dimension_for_the_rows_of_a_context(self, name):
        flow = made(name)
        context = rows_for(flow)
        drawn = flow.sample(6, context)
        leading = (6,) if context is None else (6, 4)
        for leaf, shape in zip(invflow.state.leaves(drawn), invflow.state.leaf_shapes(flow.shape), strict=True):
            assert leaf.shape == (*leading, *shape)
        for count, rows in ((0, 4), (1, 1), (3, 0)):
            few = None if context is None else context[:rows]
            found, log_prob = flow.sample_with_log_prob(count, few)
            shape = (count,) if context is None else (count, rows)
            assert log_prob.shape == shape
            assert all(leaf.shape[: len(shape)] == shape for leaf in invflow.state.leaves(found))

    def test_belong_to_their_rows(self, name):
        """The densities of one pass backwards are those of `log_prob`, given each sample's own row."""
        flow = made(name)
        context = rows_for(flow)
        x, log_prob = flow.sample_with_log_prob(6, context)
        if context is None:
            close(flow.log_prob(x), log_prob)
            return
        for row in range(4):
            own = invflow.state.map_state(lambda leaf, row=row: leaf[:, row], x)
            close(flow.log_prob(own, context[row : row + 1]), log_prob[:, row])
            other = flow.log_prob(own, context[row - 1][None])
            assert (other - log_prob[:, row]).abs().min() > 1e6 * ROUNDING, "another row would not be noticed"

    def test_are_the_same_with_and_without_densities(self, name):
        flow = made(name)
        context = rows_for(flow)
        torch.manual_seed(2)
        alone = flow.sample(6, context, temperature=0.5)
        torch.manual_seed(2)
        x, log_prob = flow.sample_with_log_prob(6, context, temperature=0.5)
        for a, b in zip(invflow.state.leaves(alone), invflow.state.leaves(x), strict=True):
            close(a, b)
        flat = invflow.state.map_state(lambda leaf: leaf if context is None else leaf.flatten(0, 1), x)
        each = None if context is None else context.repeat(6, 1)
        close(flow.log_prob(flat, each), log_prob.flatten())  # the density is that at temperature 1

    def test_are_differentiable(self, name):
        flow = made(name)
        context = rows_for(flow)
        if context is not None:
            context.requires_grad_()
        x, log_prob = flow.sample_with_log_prob(6, context)
        (sum(leaf.square().sum() for leaf in invflow.state.leaves(x)) + log_prob.sum()).backward()
        tensors = [*flow.parameters(), *([] if context is None else [context])]
        assert all(tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0 for tensor in tensors)


def test_a_temperature_is_at_least_0():
    for temperature in (-1.0, math.nan):
        with pytest.raises(InvflowError, match="expects a temperature of at least 0, got"):
            made("vectors").sample(2, temperature=temperature)


def test_no_density_is_infinite_where_the_chain_returns_nothing():
    """The chain's outputs are numbers in (0, 1); the others, which the prior draws too, are no images."""
    flow = Flow(Sequential(Sigmoid()), StandardNormal((1,))).double()
    torch.manual_seed(0)
    x, log_prob = flow.sample_with_log_prob(200)
    z = flow.bijection(x)
    inside = log_prob.isfinite()
    assert 0 < inside.sum() < 200
    close(flow.log_prob(x[inside]), log_prob[inside])
    assert (log_prob[~inside] == -math.inf).all()
    assert ((z > 0) & (z < 1)).all()


class TestReverseKL:
    """Training on the flow's own samples reaches a Gaussian target, of which everything is known."""

    def target(self):
        mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
        return MultivariateNormal(mean, torch.diag(torch.tensor([0.25, 4.0], dtype=torch.float64)))

    def test_gradients_are_those_of_the_divergence(self):
        """KL(N(m, s^2) | N(mu, sigma^2)) = log(sigma/s) + (s^2 + (m - mu)^2) / (2 sigma^2) - 1/2 for each number."""
        flow = Flow(Sequential(Affine((2,))), StandardNormal((2,))).double()
        target, layer = self.target(), flow.bijection[0]
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in layer.parameters():
                weight.copy_(torch.tensor([0.3, -0.4]).reshape(weight.shape))
        # z = exp(l) x + t, so that x is normal with mean -t exp(-l) and scale exp(-l).
        log_scale, shift = layer.log_scale, layer.shift
        scale, mean = (-log_scale).exp(), -shift * (-log_scale).exp()
        sigma = target.stddev
        kl = (sigma / scale).log() + (scale**2 + (mean - target.mean) ** 2) / (2 * sigma**2) - 0.5
        exact = torch.autograd.grad(kl.sum(), [log_scale, shift])
        draws = 4000
        for sample in (
            flow.sample_with_log_prob,
            lambda n: ((x := flow.distribution().rsample((n,))), flow.log_prob(x)),
        ):
            each = []
            for _ in range(20):
                x, log_prob = sample(draws // 20)
                estimate = torch.autograd.grad((log_prob - target.log_prob(x)).mean(), [log_scale, shift])
                each.append(torch.cat([one.flatten() for one in estimate]))
            found = torch.stack(each)
            error = (found.mean(0) - torch.cat([one.flatten() for one in exact])).abs()
            assert (error < STANDARD_ERRORS * found.std(0) / math.sqrt(20) + ROUNDING).all()

    def test_the_optimum_is_reached(self):
        flow = Flow(Sequential(Affine((2,))), StandardNormal((2,))).double()
        target, layer, draws = self.target(), flow.bijection[0], 10_000
        optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def divergence():
            optimizer.zero_grad()
            torch.manual_seed(0)  # the same draws in each step
            x, log_prob = flow.sample_with_log_prob(draws)
            loss = (log_prob - target.log_prob(x)).mean()
            loss.backward()
            return loss

        optimizer.step(divergence)
        with torch.no_grad():
            # The best one for these draws has their mean and variance, whose standard errors are known.
            scale, mean = (-layer.log_scale).exp().flatten(), (-layer.shift * (-layer.log_scale).exp()).flatten()
            assert ((scale / target.stddev).log().abs() < STANDARD_ERRORS / math.sqrt(2 * draws)).all()
            assert ((mean - target.mean).abs() / target.stddev < STANDARD_ERRORS / math.sqrt(draws)).all()


class TestDistribution:
    def test_is_one_of_torch(self):
        flow = made("conditional")
        context = rows_for(flow)
        given, alone = flow.distribution(context), made("vectors").distribution()
        for found, batch in ((given, (4,)), (alone, ())):
            assert isinstance(found, Distribution)
            assert found.has_rsample
            assert (found.batch_shape, found.event_shape) == (batch, (3,))
            assert found.support.event_dim == 1
            for sample_shape in ((), (5,), (2, 3), (0,)):
                for draw in (found.sample, found.rsample):
                    x = draw(sample_shape)
                    assert x.shape == (*sample_shape, *batch, 3)
                    assert x.requires_grad == (draw == found.rsample)
                    if x.numel():  # torch's own checks do not take an empty tensor
                        assert found.log_prob(x).shape == (*sample_shape, *batch)
            assert repr(found).startswith("FlowDistribution(")

    def test_densities_broadcast_against_the_context(self):
        flow = made("conditional")
        context = rows_for(flow)
        given = flow.distribution(context)
        x = torch.randn(7, 1, 3, dtype=torch.float64)
        found = given.log_prob(x)
        assert found.shape == (7, 4)
        for row in range(4):
            close(found[:, row], flow.log_prob(x[:, 0], context[row : row + 1]))
        close(given.log_prob(x[0, 0]), found[0])
        close(flow.distribution(context[:1]).log_prob(x), found[:, :1])

    def test_gradients_reach_weights_and_context(self):
        flow = made("conditional")
        context = rows_for(flow).requires_grad_()
        flow.distribution(context).log_prob(torch.zeros(5, 1, 3, dtype=torch.float64)).sum().backward()
        assert all(tensor.grad.abs().sum() > 0 for tensor in (*flow.parameters(), context))

    @pytest.mark.parametrize("name", ["vectors", "conditional"])
    def test_expands(self, name):
        flow = made(name)
        found = flow.distribution(rows_for(flow), validate_args=False)
        wider = found.expand((5, *found.batch_shape)).expand((2, 5, *found.batch_shape))
        assert wider.batch_shape == (2, 5, *found.batch_shape)
        assert wider._validate_args is False
        x = wider.sample((6,))
        assert x.shape == (6, *wider.batch_shape, 3)
        close(wider.log_prob(x), found.log_prob(x))
        close(wider.log_prob(x[0]), found.log_prob(x[0]))
        assert len(x.flatten(0, -2).unique(dim=0)) == x.flatten(0, -2).shape[0], "all samples are draws of their own"
        for batch in ((1, *wider.batch_shape[1:]), (3, *wider.batch_shape[1:])):
            with pytest.raises(ShapeError, match=r"does not expand to|expects shapes that broadcast"):
                wider.expand(batch)

    def test_expands_rows_of_different_contexts(self):
        flow = made("conditional")
        wider = flow.distribution(rows_for(flow)).expand((5, 4))
        torch.manual_seed(0)
        a = wider.sample()
        torch.manual_seed(0)
        b = flow.sample(1, wider.context.reshape(-1, 2))[0].reshape(5, 4, 3)
        close(a, b.detach())

    def test_checks_its_arguments_as_torch_does(self):
        flow = made("conditional")
        context = rows_for(flow)
        for value in (torch.zeros(4, 2), torch.zeros(5, 3), torch.full((3,), math.nan)):
            with pytest.raises(ValueError, match=r"must match event_shape|not broadcastable|within the support"):
                flow.distribution(context, validate_args=True).log_prob(value.double())
        with pytest.raises(ValueError, match="Expected parameter context"):
            flow.distribution(context * math.nan, validate_args=True)
        unchecked = flow.distribution(context * math.nan, validate_args=False)
        assert unchecked.log_prob(torch.zeros(3).double()).isnan().all()
        with pytest.raises(ShapeError, match="expects shapes that broadcast"):
            unchecked.log_prob(torch.zeros(5, 3).double())

    def test_has_the_support_of_its_chain(self):
        outside = torch.tensor([0.5, -2.0])
        for layer in (Inverse(Tanh()), Inverse(Softplus()), Logit(), Affine((2,))):
            flow = Flow(Sequential(layer), StandardNormal((2,)))
            found = flow.distribution(validate_args=True)  # other packages change torch's default
            torch.manual_seed(0)
            assert found.log_prob(found.sample((50,))).isfinite().all()
            if layer.domain in ("positive", "symmetric"):
                with pytest.raises(ValueError, match="within the support"):
                    found.log_prob(outside)
            elif layer.domain == "unit":
                assert found.log_prob(outside) == -math.inf
            if layer.domain != "reals":
                assert flow.distribution(validate_args=False).log_prob(outside) == -math.inf
        assert found.support.base_constraint is constraints.real

    def test_of_tuples_is_refused(self):
        flow = made("tuples")
        with pytest.raises(ShapeError, match=r"expects a flow over one tensor, got .* \(\(2,\), \(3,\)\)"):
            flow.distribution(rows_for(flow))
        by_hand = Flow(Sequential(Inverse(Split())), StandardNormal((3,)))
        with pytest.raises(ShapeError, match="expects a flow over one tensor"):
            by_hand.distribution()

    def test_finds_the_shape_of_a_chain_made_by_hand(self):
        flow = Flow(Sequential(Split()), StandardNormal(((1,), (2,))))
        assert flow.shape == (3,)
        assert flow.distribution(torch.zeros(2, 5)).sample((4,)).shape == (4, 2, 3)

    def test_copies_and_pickles(self):
        flow = made("conditional")
        given = flow.distribution(rows_for(flow))
        x = given.sample()
        for other in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
            assert torch.equal(other.log_prob(x), given.log_prob(x))

    def test_samples_are_distributed_as_the_density_says(self):
        """The mean of log p over samples of p is minus the entropy, which the grid of the plane gives too."""
        torch.manual_seed(0)
        flow = invflow.build_model(
            {"input": {"shape": [2], "context_shape": [2]}, "layers": PAIR, "prior": {"type": "standard_normal"}}
        ).double()
        context = torch.eye(2, dtype=torch.float64)
        with torch.no_grad():
            given = flow.distribution(context)
            log_prob = given.log_prob(given.sample((4000,)))
            side = torch.linspace(-12, 12, 401, dtype=torch.float64)
            on_grid = given.log_prob(torch.cartesian_prod(side, side)[:, None])
            cell = (side[1] - side[0]) ** 2
            torch.testing.assert_close(on_grid.exp().sum(0) * cell, torch.ones(2).double(), rtol=0, atol=1e-6)
            negentropy = (on_grid.exp() * on_grid).sum(0) * cell
        assert ((log_prob.mean(0) - negentropy).abs() < STANDARD_ERRORS * log_prob.std(0) / math.sqrt(4000)).all()


def test_a_prior_is_a_prior():
    with pytest.raises(InvflowError, match=r"expects a prior that is an invflow.models.Prior, got Linear"):
        Flow(Sequential(), torch.nn.Linear(1, 1))
