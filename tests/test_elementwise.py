"""ActNorm's initialisation: explicit, once, and safe; elementwise maps over the whole of their domains."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow import NumericsError, Sequential, ShapeError
from invflow.bijections import ActNorm, Affine, Each, Logit, Permute, Psi, Split
from invflow.models import Flow, StandardNormal, dequantize


def test_initialising_normalises_every_channel():
    norm = ActNorm(shape=(3, 4, 5)).double()
    x = torch.randn(7, 3, 4, 5, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1) + 5
    norm.initialize(x)
    y = norm(x).movedim(1, 0).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)  # cancels 5 / 1e-3
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("batch", [1, 4])
def test_constant_channels_are_shifted_only(value, batch):
    norm = ActNorm(shape=(2,))
    x = torch.full((batch, 2), value)
    norm.initialize(x)
    assert norm(x).abs().max() <= 1e-6 * max(1.0, value)
    assert torch.equal(norm.log_scale, torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mean", "deviation"),
    [(101325.0, 500.0), (1.7e9, 1e5), (0.0, 1e-22), (0.0, 1e-37), (0.0, 1e38), (1e38, 1e36), (-1e-10, 1e-12)],
)
def test_every_feature_that_varies_is_normalised(mean, deviation, dtype):
    norm = ActNorm(shape=(1,)).to(dtype)
    x = (mean + deviation * torch.linspace(-1.5, 1.5, 200, dtype=torch.float64)[:, None]).to(dtype)
    norm.initialize(x)
    y = norm(x).detach()
    assert y.double().mean().abs() < 1e-2  # the rounding of 1.7e9 / 1e5
    assert y.double().std(correction=0) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(norm.inverse(y), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [[1e-40, -1e-40, 3e-40], [3e38, -3e38, 1e38], [1e6, 1e6, 1000000.0625], [0.1, 0.1, 0.1]])
def test_extreme_features_leave_every_number_finite(x):
    norm = ActNorm(shape=(1,))
    x = torch.tensor(x)[:, None]
    norm.initialize(x)
    y = norm(x)
    assert all(value.isfinite().all() for value in (norm.log_scale, norm.shift, y))
    assert y.abs().max() < 2
    torch.testing.assert_close(norm.inverse(y), x, rtol=1e-6, atol=0)


def test_the_largest_float64_numbers_are_normalised():
    norm = ActNorm(shape=(1,)).double()
    x = torch.tensor([[1e300], [-1e300]], dtype=torch.float64)
    norm.initialize(x)
    torch.testing.assert_close(norm(x), x / 1e300)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_leaves_the_layer_uninitialised(spoilt):
    chain = Sequential(Permute(order=[1, 0, 2]), ActNorm(shape=(3,)))
    x = torch.randn(8, 3)
    before = {name: value.clone() for name, value in chain.state_dict().items()}
    bad = x.index_fill(0, torch.tensor([5]), 0.0)
    bad[5, 0] = spoilt
    with pytest.raises(NumericsError, match=r"layer 1 of 2: actnorm .* 1 of 3 channels, first in channel 1"):
        chain.initialize(bad)
    assert all(torch.equal(value, before[name]) for name, value in chain.state_dict().items())
    chain.initialize(x)
    assert chain(x).isfinite().all()
    assert not chain.awaits_data


def test_only_the_first_initialisation_counts_also_after_loading():
    norm, loaded = ActNorm(shape=(2,)), ActNorm(shape=(2,))
    assert norm.awaits_data
    norm.initialize(torch.randn(9, 2))
    assert not norm.awaits_data
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    loaded.load_state_dict(before)
    for one in (norm, loaded):
        one.initialize(100 + torch.randn(9, 2))
        one(torch.randn(9, 2))
        assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_nothing_initialises_itself():
    norm = ActNorm(shape=(2,)).train()
    x = torch.randn(9, 2)
    assert torch.equal(norm(x), x)
    assert torch.equal(norm.inverse(x), x)
    assert norm.awaits_data


def test_no_sample_is_none_to_start_from():
    with pytest.raises(ShapeError, match="at least one sample"):
        ActNorm(shape=(2,)).initialize(torch.zeros(0, 2))


def test_a_chain_initialises_each_layer_from_what_reaches_it():
    chain = Sequential(Psi(2), ActNorm(shape=(4, 3, 3)), Sequential(Split(), Each(ActNorm(shape=(2, 3, 3)))))
    x = 3 + 2 * torch.randn(50, 1, 6, 6)
    chain.initialize(x)
    assert not chain.awaits_data
    states = chain.trace(x)
    assert states[2].mean((0, 2, 3)).abs().max() < 1e-5
    assert (states[2].var((0, 2, 3), correction=0) - 1).abs().max() < 1e-4


def test_initialising_runs_no_further_than_it_must(monkeypatch):
    chain = Sequential(ActNorm(shape=(3,)), Permute(order=[2, 0, 1]))
    monkeypatch.setattr(Permute, "forward", lambda *_: pytest.fail("ran a layer for nothing"))
    chain.initialize(torch.randn(5, 3))


def test_training_initialises(tmp_path):
    from invflow.training import run as runs
    from tests.test_training import tiny

    spec = tiny(epochs=1)
    layers = spec.document["layers"]
    run = runs.train(
        spec.replace(layers=[layers[0], {"type": "actnorm"}, *layers[1:]]), tmp_path / "run", progress=False
    )
    assert not run.load().bijection.awaits_data
    assert isinstance(invflow.load(tmp_path / "run").bijection[1], ActNorm)


EPS = torch.finfo(torch.float32).eps


def sizes():
    """1,000 numbers of every exponent of float32, as float64."""
    mantissas = 1 + torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2.0 ** torch.arange(-149, 128, dtype=torch.float64)[:, None] * mantissas).flatten()


def roundings(layer, call, x):
    """The largest error of what a call returns in float32, in units of eps max(1, |value|)."""
    found = getattr(layer, call)(x)
    right = getattr(layer.double(), call)(x.double())
    layer.float()
    worst = 0.0
    for a, b in zip(found, right, strict=True):
        in_range = b.abs() < torch.finfo(torch.float32).max
        worst = max(worst, float(((a.double() - b).abs() / b.abs().clamp(min=1))[in_range].max()) / EPS)
    return worst


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.05, 0.25])
def test_a_logit_in_float32_is_that_of_float64_over_its_domain(alpha):
    layer = Logit(alpha)
    margin = alpha / (1 - 2 * alpha)
    numbers = torch.cat([sizes(), *(end + sign * sizes() for end in (0, 1) for sign in (1, -1))])
    edges = torch.cat([-margin + sizes(), 1 + margin - sizes()])
    x = torch.cat([torch.tensor([0.0, 1.0]), numbers.float(), edges.float()])[:, None]
    x = x[(x.double() > -margin) & (x.double() < 1 + margin)].reshape(-1, 1)
    assert roundings(layer, "forward_and_log_det", x) <= 4
    torch.testing.assert_close(layer(x), layer.forward_and_log_det(x)[0], rtol=0, atol=0)
    y = torch.cat([sizes(), -sizes()]).float()[:, None]
    assert roundings(layer, "inverse_and_log_det", y) <= 4
    assert layer.forward_and_log_det(layer.inverse(y))[1].isfinite().all()  # every sample has a density


@pytest.mark.parametrize("layer", [Affine((1,)), ActNorm((1,))])
def test_scales_in_float32_are_those_of_float64(layer):
    with torch.no_grad():
        layer.log_scale.fill_(0.37)
        layer.shift.fill_(-0.21)
        x = torch.cat([torch.zeros(1, dtype=torch.float64), sizes(), -sizes()]).float()[:, None]
        assert roundings(layer, "forward_and_log_det", x) <= 4
        assert roundings(layer, "inverse_and_log_det", x) <= 4


@pytest.mark.parametrize("outside", [-0.2, 1.5, 1.0625, -1e30, math.inf, -math.inf])
@pytest.mark.parametrize("front", [[], [Psi(2)]])
def test_outside_its_domain_a_density_is_zero_and_its_gradients_are_finite(outside, front):
    shape = (4, 1, 1) if front else (1, 2, 2)
    flow = Flow(Sequential(*front, Logit(), ActNorm(shape)), StandardNormal(shape))
    x = torch.full((3, 1, 2, 2), 0.5)
    x[1, 0, 1, 0] = outside
    x[2] = math.nan
    found = flow.log_prob(x)
    assert found[0].isfinite()
    assert found[1] == -math.inf
    assert found[2].isnan()
    assert flow.bijection(x)[1].isnan().any()  # there is no such state
    flow.log_prob(x[:2]).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in flow.parameters())


def test_dequantised_digits_lie_in_the_domain_of_a_wider_logit():
    from invflow.spec.training import Data
    from invflow.training.data import load_data

    data = load_data(Data(name="digits"))
    pixels = dequantize(data.train.values, data.levels)
    assert 1 < pixels.max() <= data.high
    assert Logit(0.06).forward_and_log_det(pixels)[1].isfinite().all()


@pytest.mark.parametrize(("fields", "fits"), [({}, False), ({"alpha": 0.055}, False), ({"alpha": 0.06}, True)])
def test_training_refuses_data_that_have_no_density(fields, fits):
    from invflow.spec.training import Data
    from invflow.training.data import load_data
    from invflow.training.tasks import task_of

    spec = invflow.load_spec(
        {
            "input": {"shape": [1, 8, 8]},
            "layers": [{"type": "logit", **fields}],
            "prior": {"type": "standard_normal"},
            "training": {"data": {"name": "digits"}},
        }
    )
    task = task_of(invflow.build_model(spec), load_data(Data(name="digits")))
    if fits:
        task.check_range(spec)
    else:
        with pytest.raises(invflow.SpecError, match=r"layers: dequantised pixels of digits lie in \[0, 1.0625\]"):
            task.check_range(spec)
