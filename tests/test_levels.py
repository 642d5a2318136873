"""Levels on a grid, whose distributions the nets of `factor_out` give, as in integer discrete flows."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow import InvflowError, Sequential, SpecError
from invflow.bijections import FactorOut
from invflow.models import DiscretizedLogistic, Flow
from invflow.numerics import Grid
from invflow.state import flatten

GRID = {"mode": "grid", "frac_bits": 2}
PRIOR = {"type": "discretized_logistic", "levels": 4, "components": 2}
COUPLING = [{"type": "split"}, {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [3]}}, {"type": "merge"}]
FACTOR_OUT = {"type": "factor_out", "net": {"type": "mlp", "hidden": [4], "activation": "tanh"}}
LEVEL = [{"type": "on", "layers": COUPLING}, FACTOR_OUT]

CANCELLED = 1e-9
"""In float64, relative: a difference of two sigmoids loses some digits."""

REFERENCE = ((0.0, -4.9328537340159151), (0.5, -7.2186128592367948), (-0.25, -5.7396396447054053))
"""log P of a number for mean 0.01, log-scale -2 and levels of 1/256: mpmath, 50 digits."""


def flow(layers=None, shape=(8,), **options):
    torch.manual_seed(0)
    layers = [{"type": "repeat", "times": 2, "layers": LEVEL}, {"type": "on", "layers": COUPLING}, *(layers or [])]
    document = {"input": {"shape": list(shape)}, "numerics": GRID, "layers": layers, "prior": PRIOR}
    return invflow.build_model({**document, **options}).double()


def numbers(count, *shape):
    return torch.randint(-8, 9, (count, *shape), generator=torch.Generator().manual_seed(1)).double() / 4


def test_values_of_a_reference():
    prior = DiscretizedLogistic(levels=256, components=1, shape=(1,)).double()
    x, expected = torch.tensor(REFERENCE, dtype=torch.float64).unsqueeze(2).unbind(1)
    found = prior.log_prob_given(x, torch.full_like(x, -2), torch.full_like(x, 0.01))
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-13, atol=0)


def test_each_level_is_logistic_given_what_goes_on_and_the_prior_has_weights_for_the_last_only():
    model = flow()
    assert model.levels == 2
    assert model.prior.means.shape == (2, 2)
    first, factor, second, other, last = model.bijection
    x = numbers(50, 8)
    z, found = model.features_and_log_prob(x)
    assert torch.equal(flatten(z), flatten(model.bijection(x)))
    done, goes_on = factor(first(x))
    _, done_2, goes_on_2 = other(second((done, goes_on)))
    *_, rest = last((done, done_2, goes_on_2))
    expected = model.prior.log_prob(rest)
    for layer, at, given in ((factor, done, goes_on), (other, done_2, goes_on_2)):
        r, t = layer.net(given).chunk(2, 1)
        upper, lower = (torch.sigmoid((at - t + side) / r.exp()) for side in (0.125, -0.125))
        expected = expected + (upper - lower).log().sum(1)
    torch.testing.assert_close(found, expected, rtol=CANCELLED, atol=0)


def test_the_probabilities_of_all_numbers_add_up_to_one():
    prior = {**PRIOR, "components": 1}
    layers = [*COUPLING, FACTOR_OUT]
    model = invflow.build_model({"input": {"shape": [2]}, "numerics": GRID, "layers": layers, "prior": prior}).double()
    side = torch.arange(-200, 201, dtype=torch.float64) / 4  # beyond 50, less than exp(-30)
    total = sum(model.log_prob(torch.cartesian_prod(some, side)).exp().sum() for some in side.split(50))
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64), rtol=1e-9, atol=0)


def test_samples_have_their_probabilities():
    layers = [*COUPLING, FACTOR_OUT]
    torch.manual_seed(0)
    model = invflow.build_model({"input": {"shape": [2]}, "numerics": GRID, "layers": layers, "prior": PRIOR}).double()
    with torch.no_grad():
        for weight in model.bijection[-1].net.parameters():
            weight.add_(0.3 * torch.randn_like(weight))  # what is done depends much on what goes on
        model.bijection[-1].net[-1].bias[0] -= 2  # in few cells
        x, log_prob = model.sample_with_log_prob(40_000)
        torch.testing.assert_close(model.log_prob(x), log_prob, rtol=1e-12, atol=0)
        kinds, counts = x.unique(dim=0, return_counts=True)
        often = counts >= 100
        chance = model.log_prob(kinds[often]).exp()
    deviation = (counts[often] / len(x) - chance) / (chance * (1 - chance) / len(x)).sqrt()
    assert often.sum() > 30
    assert deviation.square().mean() < 2  # 1 but for chance


def test_near_a_temperature_of_zero_every_sample_is_the_same():
    samples = flow(prior={**PRIOR, "components": 1}).sample(20, temperature=1e-9)
    assert torch.equal(samples, samples[:1].expand_as(samples))


@pytest.mark.parametrize("policy", ["reversible", "checkpoint"])
def test_gradients_are_those_of_stored_activations(policy):
    stored, other = flow(), flow(backprop=policy)
    other.load_state_dict(stored.state_dict())
    x = numbers(20, 8)
    for model in (stored, other):
        model.train().log_prob(x).sum().backward()
    for (name, a), b in zip(stored.named_parameters(), other.parameters(), strict=True):
        assert a.grad.any(), name
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_the_nets_see_the_context_and_a_single_row_stands_for_all():
    torch.manual_seed(0)
    spec = {"input": {"shape": [4], "context_shape": [3]}, "numerics": GRID, "layers": LEVEL, "prior": PRIOR}
    model = invflow.build_model(spec).double()
    x, rows = numbers(3, 4), torch.eye(3, dtype=torch.float64)
    one = model.log_prob(x, rows[:1])
    torch.testing.assert_close(one, model.log_prob(x, rows[:1].expand(3, 3)))
    assert not torch.equal(one, model.log_prob(x, rows[1:2]))
    drawn, log_prob = model.sample_with_log_prob(5, rows)
    assert drawn.shape == (5, 3, 4)
    torch.testing.assert_close(model.log_prob(drawn[:, 1], rows[1:2]), log_prob[:, 1], rtol=1e-12, atol=0)
    assert model.sample(4, rows[:1]).shape == (4, 1, 4)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model, x = flow().float(), numbers(4, 8).float()
    invflow.save(model, tmp_path / "saved")
    assert torch.equal(invflow.load(tmp_path / "saved").log_prob(x), model.log_prob(x))
    assert invflow.build_model(invflow.to_spec(model)).levels == 2


def test_it_is_trained(tmp_path):
    net = {"type": "densenet", "channels": 8, "blocks": 2, "zero_last": True}
    coupling = [{"type": "split"}, {"type": "additive_coupling", "net": net}, {"type": "merge"}]
    level = {"type": "on", "layers": [{"type": "psi", "block_size": 2}, {"type": "permute", "seed": 0}, *coupling]}
    document = {
        "input": {"shape": [1, 8, 8]},
        "numerics": {"mode": "grid", "frac_bits": 4},
        "layers": [level, {"type": "factor_out", "net": net}, level],
        "prior": {"type": "discretized_logistic", "levels": 16},
        "training": {
            "data": {"name": "digits", "train_size": 512, "test_size": 64},
            "steps": 24,
            "optimizer": {"type": "adam", "lr": 0.01},
        },
    }
    run = invflow.train(document, tmp_path / "run", progress=False)
    bits = [row["test_bits_per_dim"] for row in run.metrics]
    assert bits[-1] < bits[0] - 0.1
    assert run.model.levels == 1


class TestRefusals:
    def refusal(self, **options):
        with pytest.raises(SpecError) as caught:
            flow(**options)
        return str(caught.value)

    def test_a_prior_that_does_not_take_the_numbers(self):
        assert "expects a prior that takes its numbers, discretized_logistic, got standard_normal" in self.refusal(
            prior={"type": "standard_normal"}
        )

    @pytest.mark.parametrize(
        "layer",
        [
            {"type": "on", "index": 0, "layers": [{"type": "permute", "order": "reverse"}]},
            {"type": "exchange", "order": [1, 0, 2]},
            {"type": "inverse", "layer": {"type": "factor_out"}},
        ],
    )
    def test_a_layer_that_changes_a_level_after_it_is_done(self, layer):
        assert "what a factor_out with a net has taken out is for the prior" in self.refusal(layers=[layer])

    def test_a_tuple_before(self):
        document = {"input": {"shape": [8]}, "numerics": GRID, "layers": [{"type": "factor_out"}, FACTOR_OUT]}
        with pytest.raises(
            SpecError, match=r"no other layer may make a tuple before, got the shape \(\(4,\), \(4,\)\)"
        ):
            invflow.build_model({**document, "prior": PRIOR})

    def test_a_chain_of_no_known_shape(self):
        chain = Sequential(FactorOut(net=torch.nn.Linear(2, 4)), numerics=Grid(mode="grid"))
        with pytest.raises(InvflowError, match="in a chain that was built from a spec"):
            Flow(chain, DiscretizedLogistic(shape=(2,)))


@pytest.mark.parametrize("seen", [["a"], None])
def test_a_net_may_see_a_part_of_the_context(seen):
    level = [LEVEL[0], {**FACTOR_OUT, "context": seen}]
    shapes = {"a": [2], "b": [3]}
    document = {"input": {"shape": [8], "context_shape": shapes}, "numerics": GRID, "layers": level, "prior": PRIOR}
    model = invflow.build_model(document).double()
    context = {name: torch.rand(2, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    x, log_prob = model.sample_with_log_prob(3, context)
    again = model.log_prob(x.flatten(0, 1), {name: entry.repeat(3, 1) for name, entry in context.items()})
    assert torch.allclose(log_prob.flatten(), again)
    assert again.isfinite().all()
