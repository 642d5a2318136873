"""Every registered prior: a distribution whose samples follow its density, and a part of a model."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily
from torch.distributions import Normal as TorchNormal

import invflow
from invflow import Flow, InvflowError, Sequential, ShapeError, registry
from invflow.registry import priors
from invflow.spec.schema import json_schema
from invflow.state import flatten, shape_of, unflatten

BY = {"by": "context"}
CASES = {
    "standard_normal": [{}],
    "normal": [{}],
    "logistic": [{}],
    "uniform": [{}, {"low": -1.5, "high": 2.0}],
    "student_t": [{}, {"df": 2.5}],
    "gaussian_mixture": [{}, {"components": 3, "spread": 2.0, "learn_scales": False}, BY],
    "discretized_logistic": [
        {"levels": 2},
        {"levels": 17, "components": 1},
        {"levels": 16, "components": 3, "bounds": [0, 0.9375]},
    ],
}
EVERY = [(tag, fields) for tag, cases in CASES.items() for fields in cases]
UNITS = [f"{tag} {fields}" for tag, fields in EVERY]
CLASSES = 3

FALSE_ALARM = 1e-4
"""The probability with which a test of samples fails though they are right; the seeds are fixed."""
INTEGRAL = 1e-9
"""Of the trapezoidal rule, which converges exponentially for these; tails beyond its ends have less."""
SUM = 1e-12
"""Of up to 10^5 probabilities in float64."""

every_prior = pytest.mark.parametrize(("tag", "fields"), EVERY, ids=UNITS)


def made(tag, fields, shape, seed=0):
    """A prior in float64 whose parameters are not those of the beginning."""
    torch.manual_seed(seed)
    given = {"context_shape": (CLASSES,)} if fields == BY else {}
    prior = priors.find(tag)(**fields, shape=shape, **given).double()
    with torch.no_grad():
        for weight in prior.parameters():
            weight.add_(0.4 * torch.randn_like(weight))
    return prior


def context_of(prior, rows=1):
    one_hot = torch.eye(CLASSES, dtype=torch.float64)[torch.arange(1, rows + 1) % CLASSES]
    return (one_hot,) if prior.takes_context else ()


def log_prob(prior, z):
    return prior.log_prob(z, *context_of(prior))


def sample(prior, count, temperature=1.0):
    return prior.sample(count, temperature, *context_of(prior))


def nodes(tag, fields):
    """Points of the line with weights, so that a weighted sum is an integral, or a sum over the grid."""
    if tag == "discretized_logistic":
        levels = fields["levels"]
        low, high = fields.get("bounds", (-45, 45))
        reach = 1 if "bounds" in fields else 3  # scales up to 3: the tails have less than exp(-135 / 3)
        points = torch.arange(round(reach * low * levels), round(reach * high * levels) + 1).double() / levels
        return points, torch.ones_like(points)
    if tag == "uniform":
        low, high = fields.get("low", 0.0), fields.get("high", 1.0)
        width = (high - low) / 200
        points = low - 50.5 * width + width * torch.arange(302).double()  # the ends lie between two points
        return points, torch.full_like(points, width)
    t = torch.linspace(-14, 14, 561, dtype=torch.float64)
    return t.sinh(), t.cosh() * (t[1] - t[0])


def test_every_prior_is_tested():
    assert set(CASES) == {tag for tag in priors.registered() if "." not in tag}


@every_prior
class TestDistribution:
    def test_its_mass_is_1(self, tag, fields):
        points, weights = nodes(tag, fields)
        tolerance = SUM if tag == "discretized_logistic" else INTEGRAL
        for seed in range(2):
            found = (log_prob(made(tag, fields, (1,), seed), points[:, None]).exp() * weights).sum()
            assert found.item() == pytest.approx(1, abs=tolerance)
            plane = torch.cartesian_prod(points, points)
            if len(plane) < 4e5:
                found = log_prob(made(tag, fields, (2,), seed), plane).exp() * torch.cartesian_prod(
                    weights, weights
                ).prod(1)
                assert found.sum().item() == pytest.approx(1, abs=tolerance)

    def test_its_samples_follow_it(self, tag, fields):
        """A chi-square test on boxes of the plane, whose ends lie half-way between two nodes."""
        points, weights = nodes(tag, fields)
        prior, count = made(tag, fields, (2,)), 20_000
        torch.manual_seed(1)
        with torch.no_grad():
            drawn = sample(prior, count)
            assert drawn.shape == (count, 2)
            ends = (points[1:] + points[:-1]) / 2
            quantiles = drawn.quantile(torch.linspace(0.1, 0.9, 6, dtype=torch.float64), dim=0).T.contiguous()
            cuts = [ends[torch.searchsorted(ends, axis).clamp(max=len(ends) - 1)].unique() for axis in quantiles]

            def boxes(of):
                i, j = (torch.bucketize(of[:, axis].contiguous(), cuts[axis]) for axis in (0, 1))
                return i * (len(cuts[1]) + 1) + j

            number = (len(cuts[0]) + 1) * (len(cuts[1]) + 1)
            masses = torch.zeros(number).double()
            for x, weight in zip(points, weights, strict=True):
                column = torch.stack([x.expand_as(points), points], dim=1)
                masses.index_add_(0, boxes(column), log_prob(prior, column).exp() * weight * weights)
        counts = torch.bincount(boxes(drawn), minlength=number)
        kept = masses * count > 5
        rest = (counts[~kept].sum(), masses[~kept].sum())
        observed = np.append(counts[kept].numpy(), rest[0]) if rest[1] * count > 5 else counts[kept].numpy()
        expected = np.append(masses[kept].numpy(), rest[1])[: len(observed)]
        assert len(observed) > 10
        found = scipy.stats.chisquare(observed, expected / expected.sum() * observed.sum())
        assert found.pvalue > FALSE_ALARM

    def test_a_temperature_multiplies_the_distance_from_the_centre(self, tag, fields):
        prior = made(tag, fields, (2,))
        if tag == "uniform":
            for temperature in (0.0, 0.5, 2.0):
                with pytest.raises(InvflowError, match=r"the uniform prior expects a temperature of 1, got"):
                    prior.sample(2, temperature)
            return

        def drawn(temperature):
            torch.manual_seed(2)
            return sample(prior, 50, temperature).detach()

        centre = drawn(0.0)
        means = getattr(prior, "means", torch.zeros(1, 2))
        assert len(centre.unique(dim=0)) <= len(means) ** 2, "one for each choice of components"
        if tag == "discretized_logistic":
            if "bounds" not in fields:  # three numbers, each rounded to the grid
                off = (drawn(0.25) - centre) - 0.25 * (drawn(1.0) - centre)
                assert off.abs().max() <= 1.5 / prior.levels
        else:
            torch.testing.assert_close(drawn(0.25) - centre, 0.25 * (drawn(1.0) - centre))

    def test_its_gradients_are_finite(self, tag, fields):
        prior = made(tag, fields, (3,))
        far = torch.tensor([[0.0, 0.0, 0.0], [40.0, -40.0, 0.25], [1e4, 0.5, -1e4]], dtype=torch.float64)
        z = torch.cat([sample(prior, 20).detach(), far]).requires_grad_()
        found = log_prob(prior, z)
        assert not found.isnan().any()
        found[found.isfinite()].sum().backward()
        for tensor in (z, *prior.parameters()):
            assert tensor.grad.isfinite().all()
        names, inside = [f"prior.{name}" for name, _ in prior.named_parameters()], z[:4].detach()

        def of_weights(*weights):
            return torch.func.functional_call(_LogProb(prior), dict(zip(names, weights, strict=True)), inside)

        if names:
            torch.autograd.gradcheck(of_weights, [weight.detach().requires_grad_() for weight in prior.parameters()])

    def test_samples_are_differentiable_as_it_says(self, tag, fields):
        prior = made(tag, fields, (3,))
        drawn, weights = sample(prior, 5), [*prior.parameters()]
        if prior.reparametrized and weights:
            drawn.sum().backward()
            assert all(weight.grad.abs().sum() > 0 for weight in weights)
        given = Flow(Sequential(), prior).distribution(*context_of(prior))
        assert given.has_rsample == prior.reparametrized
        if not prior.reparametrized:
            with pytest.raises(NotImplementedError, match="expects a prior that is reparametrized"):
                given.rsample()
        assert given.sample((4,)).shape == (4, *given.batch_shape, 3)

    def test_it_is_0_and_never_nan_far_away(self, tag, fields):
        for dtype in (torch.float32, torch.float64):
            prior = made(tag, fields, (1,)).to(dtype)
            far = torch.tensor([math.inf, -math.inf, 1e30, -1e30], dtype=dtype)[:, None]
            found = log_prob(prior, far)
            assert not found.isnan().any()
            assert (found[:2] == -math.inf).all()
            assert (found < -30).all()

    def test_small_states_have_accurate_densities_in_float32(self, tag, fields):
        prior = made(tag, fields, (3,))
        z = sample(prior, 200).detach().float()
        wide = log_prob(prior, z.double()) if tag != "discretized_logistic" else log_prob(prior, sample_on(prior, z))
        found = log_prob(copy.deepcopy(prior).float(), z)
        torch.testing.assert_close(found, wide.float(), rtol=2e-5, atol=2e-5)  # eps of float32 times 100


def sample_on(prior, z):
    return (z.double() * prior.levels).round() / prior.levels


class _LogProb(torch.nn.Module):
    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, z):
        return log_prob(self.prior, z)


@every_prior
class TestModules:
    def test_tuples_are_flattened(self, tag, fields):
        shape = ((2,), (1, 3))
        prior, flat = made(tag, fields, shape), made(tag, fields, (5,))
        flat.load_state_dict(prior.state_dict())
        z = sample(prior, 7)
        assert shape_of(z) == shape
        torch.testing.assert_close(log_prob(prior, z), log_prob(flat, flatten(z)))
        torch.testing.assert_close(log_prob(prior, unflatten(flatten(z), shape)), log_prob(prior, z))
        with pytest.raises(
            ShapeError, match=rf"the {tag} prior expects a batch of states of shape .*, got shape \(5,\)"
        ):
            log_prob(prior, flatten(z))

    def test_dtype_and_device_follow_the_module(self, tag, fields):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            prior = made(tag, fields, (3,)).to(dtype)
            z = sample(prior, 4)
            assert z.dtype == dtype
            assert z.isfinite().all()
            assert log_prob(prior, z).isfinite().all()
        there = made(tag, fields, (3,)).to("meta")
        assert there.sample(4, 1.0, *(one.to("meta") for one in context_of(there))).is_meta
        with pytest.raises(ShapeError, match=r"expects floating-point states, got torch\.int64"):
            log_prob(made(tag, fields, (3,)), torch.zeros(2, 3, dtype=torch.int64))

    def test_copies_pickles_and_loads(self, tag, fields):
        prior = made(tag, fields, (3,))
        z = sample(prior, 4)
        for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
            assert torch.equal(log_prob(other, z), log_prob(prior, z))
        other = made(tag, fields, (3,), seed=5)
        assert [*other.state_dict()] == [*prior.state_dict()]
        other.load_state_dict(prior.state_dict())
        assert torch.equal(log_prob(other, z), log_prob(prior, z))

    def test_is_built_on_the_meta_device(self, tag, fields):
        prior = made(tag, fields, (3,))
        with torch.device("meta"):
            empty = Flow(Sequential(), made(tag, fields, (3,)))
        assert all(tensor.is_meta for tensor in empty.state_dict().values())
        empty.load_state_dict({f"prior.{name}": weight for name, weight in prior.state_dict().items()}, assign=True)
        z = sample(prior, 4)
        assert torch.equal(log_prob(empty.prior.double(), z), log_prob(prior, z))

    def test_compiles_in_one_graph_and_maps_over_samples(self, tag, fields):
        prior = made(tag, fields, (3,))
        flow, rows = Flow(Sequential(), prior), context_of(prior)
        z = sample(prior, 4).detach()
        torch._dynamo.reset()
        compiled = torch.compile(flow.log_prob, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(z, *rows), flow.log_prob(z, *rows))
        gradients = torch.func.vmap(torch.func.grad(lambda one: flow.log_prob(one[None], *rows)[0]))(z)
        (expected,) = torch.autograd.grad(flow.log_prob(z.requires_grad_(), *rows).sum(), z)
        torch.testing.assert_close(gradients, expected)

    def test_draws_no_samples_if_none_are_wanted(self, tag, fields):
        prior = made(tag, fields, (3,))
        rows = context_of(prior)
        x, log_prob = Flow(Sequential(), prior).sample_with_log_prob(0, *rows)
        assert x.shape == (0, *([1] if rows else []), 3)
        assert log_prob.shape == x.shape[:-1]

    def test_is_a_part_of_a_spec(self, tag, fields, tmp_path):
        context = {"context_shape": [CLASSES]} if fields == BY else {}
        document = {
            "input": {"shape": [3, 2, 2], **context},
            "layers": [{"type": "actnorm"}],
            "prior": {"type": tag, **fields},
        }
        flow = invflow.build_model(document)
        written = invflow.to_spec(flow)
        assert written["prior"] == document["prior"]
        assert invflow.load_spec(written).hash == invflow.load_spec(document).hash
        invflow.save(flow, tmp_path)
        rows = [one.float() for one in context_of(flow.prior)]
        torch.manual_seed(0)
        x = flow.sample(5, *rows).reshape(5, 3, 2, 2).detach()
        assert torch.equal(invflow.load(tmp_path).log_prob(x, *rows), flow.log_prob(x, *rows))
        entry = json_schema()["$defs"][f"prior.{tag}"]
        assert set(entry["properties"]) == {"type", "note", "context", *registry.priors.fields(type(flow.prior)).fields}


# ------------------------------------------------------------------------------------------------ One by one

SCIPY = {
    "standard_normal": lambda prior: scipy.stats.norm(),
    "normal": lambda prior: scipy.stats.norm(prior.mean.detach().numpy(), prior.log_scale.detach().exp().numpy()),
    "logistic": lambda prior: scipy.stats.logistic(),
    "uniform": lambda prior: scipy.stats.uniform(prior.low, prior.high - prior.low),
    "student_t": lambda prior: scipy.stats.t(prior.df),
}


@pytest.mark.parametrize(("tag", "fields"), [one for one in EVERY if one[0] in SCIPY])
def test_densities_are_those_of_scipy(tag, fields):
    prior = made(tag, fields, (3,))
    z = torch.cat([torch.linspace(-60, 60, 90).double().reshape(30, 3), sample(prior, 30).detach()])
    expected = SCIPY[tag](prior).logpdf(z.numpy()).sum(1)
    torch.testing.assert_close(log_prob(prior, z).detach(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    # And each number is drawn from its own distribution: the test of Kolmogorov and Smirnov, for each of three.
    torch.manual_seed(0)
    drawn = sample(prior, 5000).detach().numpy()
    for i in range(3):

        def cdf(x, i=i):
            wide = np.repeat(np.asarray(x)[:, None], 3, axis=1)
            return SCIPY[tag](prior).cdf(wide)[:, i]

        assert scipy.stats.kstest(drawn[:, i], cdf).pvalue > FALSE_ALARM


def test_a_gaussian_mixture_is_that_of_torch():
    prior = made("gaussian_mixture", {"components": 3}, (2,))
    components = Independent(TorchNormal(prior.means, prior.log_scales.exp()), 1)
    expected = MixtureSameFamily(Categorical(logits=prior.logits), components)
    z = torch.randn(50, 2, dtype=torch.float64) * 5
    torch.testing.assert_close(prior.log_prob(z), expected.log_prob(z), rtol=1e-12, atol=1e-12)
