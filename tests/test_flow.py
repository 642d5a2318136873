"""Flows: a density that integrates to one, and samples that have it."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow.models import Flow, StandardNormal

PAIR = {
    "input": {"shape": [2, 2]},
    "layers": [
        {"type": "split"},
        {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [5]}},
        {"type": "additive_coupling", "net": {"type": "mlp"}},
    ],
    "prior": {"type": "standard_normal"},
}


def test_log_prob_is_the_normal_density_of_the_latent():
    flow = invflow.build_model(PAIR).double()
    assert isinstance(flow, Flow)
    x = torch.randn(7, 2, 2, dtype=torch.float64)
    z = torch.cat([part.flatten(1) for part in flow.bijection(x)], dim=1)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum(1)  # additive couplings keep the volume
    torch.testing.assert_close(flow.log_prob(x), expected)
    torch.testing.assert_close(flow(x), expected)


def test_the_density_integrates_to_one():
    spec = {**PAIR, "input": {"shape": [2]}}
    flow = invflow.build_model(spec).double()
    side = torch.linspace(-9, 9, 401, dtype=torch.float64)
    points = torch.cartesian_prod(side, side)
    mass = flow.log_prob(points).exp().sum() * (side[1] - side[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-6)  # smooth and far from the border: the grid sum converges fast


def test_samples_run_forward_to_the_prior():
    flow = invflow.build_model(PAIR).double()
    torch.manual_seed(0)
    x = flow.sample(4000)
    assert x.shape == (4000, 2, 2)
    assert x.dtype == torch.float64
    z = torch.cat([part.flatten(1) for part in flow.bijection(x)], dim=1)
    assert z.mean(0).abs().max() < 4 / math.sqrt(4000)  # four standard errors
    assert (z.var(0) - 1).abs().max() < 4 * math.sqrt(2 / 4000)


def test_flows_save_load_and_dump(tmp_path):
    flow = invflow.build_model(PAIR)
    invflow.save(flow, tmp_path)
    again = invflow.load(tmp_path)
    assert isinstance(again, Flow)
    x = torch.randn(3, 2, 2)
    assert torch.equal(flow.log_prob(x), again.log_prob(x))
    assert invflow.to_spec(again)["prior"] == {"type": "standard_normal"}
    assert invflow.load_spec(invflow.to_spec(again)).hash == invflow.load_spec(PAIR).hash


def test_tuple_states():
    prior = StandardNormal(shape=((2,), (1, 3)))
    a, b = prior.sample(5)
    assert (a.shape, b.shape) == ((5, 2), (5, 1, 3))
    assert prior.log_prob((a, b)).shape == (5,)
    torch.manual_seed(0)
    warm = prior.sample(5)
    torch.manual_seed(0)
    cold = prior.sample(5, temperature=0.25)
    assert all(torch.equal(0.25 * p, q) for p, q in zip(warm, cold, strict=True))


def test_a_loaded_flow_samples_in_its_dtype(tmp_path):
    invflow.save(invflow.build_model(PAIR).double(), tmp_path)
    assert invflow.load(tmp_path).sample(3).dtype == torch.float64


def test_what_could_not_be_loaded_again_replaces_nothing(tmp_path):
    invflow.save(invflow.build_model(PAIR), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    chain = invflow.Sequential(invflow.bijections.Psi(2))
    with pytest.raises(invflow.SpecError, match="that 2 divides, got 5 x 5"):
        invflow.save(chain, tmp_path, input_shape=(1, 5, 5))
    net = invflow.nets.MLP((1,), (1,), context_shape=(2,))
    coupled = invflow.Sequential(invflow.bijections.Split(), invflow.bijections.AdditiveCoupling(net))
    with pytest.raises(invflow.CheckpointError, match="is expected to have shape"):
        invflow.save(coupled, tmp_path, input_shape=(2,))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_link_to_an_endless_file_is_refused(tmp_path):
    invflow.save(invflow.build_model(PAIR), tmp_path)
    (weights,) = tmp_path.glob("weights-*")
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(invflow.CheckpointError, match="not a regular file"):
        invflow.load(tmp_path)


@pytest.mark.parametrize(
    "top",
    [
        {"prior": {"type": "standard_normal"}},
        {"head": {"type": "linear", "classes": 3}},
        {"head": {"type": "convnet", "classes": 3, "hidden": [2]}},
    ],
)
def test_models_refuse_states_of_another_shape_by_name(top):
    model = invflow.build_model({"input": {"shape": [1, 8, 8]}, "layers": [{"type": "psi", "block_size": 2}], **top})
    assert model(torch.rand(2, 1, 8, 8)).shape[0] == 2
    name = next(iter(top.values()))["type"]
    by_hand = type(model)(invflow.Sequential(*model.bijection), *list(model.children())[1:])  # it knows no shape
    for shape in [(2, 1, 16, 16), (2, 4, 8, 8)]:
        with pytest.raises(invflow.ShapeError, match=r"the chain expects .* \(1, 8, 8\), got shape"):
            model(torch.rand(shape))
        with pytest.raises(invflow.ShapeError, match=rf"the {name} .* expects .* \(4, 4, 4\), got shape"):
            by_hand(torch.rand(shape))
