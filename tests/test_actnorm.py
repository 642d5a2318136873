"""ActNorm, affine and standardize: scales and shifts from data, explicit, once, and safe."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow import NumericsError, Sequential, ShapeError
from invflow.bijections import (
    ActNorm,
    Affine,
    Each,
    Permute,
    Psi,
    Sigmoid,
    Softplus,
    Split,
    Standardize,
    Tanh,
)

EPS = torch.finfo(torch.float32).eps
INTERVALS = [Sigmoid(), Tanh(), Softplus()]
ENDS = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0), "positive": (0.0, math.inf)}
VECTOR = {torch.float64: 1e-12, torch.float32: 2e-6}  # the acceptance of the issue, relative to max(1, |value|)


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


class TestStandardize:
    def test_given_constants(self):
        layer = Standardize(mean=[5.0, -1.0], std=[2.0, 0.25], shape=(2, 3, 4))
        x = torch.randn(7, 2, 3, 4)
        y, log_det = layer.forward_and_log_det(x)
        mean, std = (torch.tensor(values)[:, None, None] for values in ([5.0, -1.0], [2.0, 0.25]))
        torch.testing.assert_close(y, (x - mean) / std)
        torch.testing.assert_close(log_det, torch.full((7,), -12 * math.log(2.0 * 0.25)))
        assert not layer.awaits_data
        layer.initialize(100 * x)
        assert torch.equal(layer(x), y)

    def test_data_set_what_they_set_in_actnorm(self):
        x = torch.randn(50, 3, 4) * torch.tensor([1e-3, 0.0, 1e3])[:, None] + 5
        norm, layer = ActNorm((3, 4)), Standardize(shape=(3, 4))
        assert layer.awaits_data
        assert torch.equal(layer(x), x)
        for one in (norm, layer):
            one.initialize(x)
        assert not layer.awaits_data
        assert torch.equal(layer(x), norm(x))

    def test_nothing_is_learned_and_everything_is_saved(self, tmp_path):
        chain = invflow.build({"input": {"shape": [2]}, "layers": [{"type": "standardize"}, {"type": "affine"}]})
        assert list(chain[0].parameters()) == []
        x = torch.randn(50, 2) * 3 + 1
        chain.initialize(x)
        invflow.save(chain, tmp_path / "saved")
        loaded = invflow.load(tmp_path / "saved")
        assert not loaded.awaits_data
        assert torch.equal(loaded(x), chain(x))

    def test_an_average_with_buffers_that_began_before_is_refused(self):
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        for use_buffers in (False, True):
            chain = Sequential(Standardize(shape=(2,)), Affine((2,)))
            average = AveragedModel(chain, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
            x = torch.randn(50, 2) * 3 + 1
            average.update_parameters(chain)
            chain.initialize(x)
            average.update_parameters(chain)
            average.update_parameters(chain)
            if use_buffers:
                with pytest.raises(invflow.InvflowError, match="standardize is a copy made before initialize"):
                    average(x)
            else:  # buffers are copied
                assert torch.equal(average(x), chain(x))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"mean": [1.0, 2.0]}, "layers.0: standardize expects both a mean and a std, or neither, got a mean alone"),
            ({"std": [1.0, 2.0]}, "layers.0: standardize expects .*, got a std alone"),
            ({"mean": [1.0], "std": [1.0, 2.0]}, "layers.0: standardize expects a mean for each of 2 channels, got 1"),
            ({"mean": [1.0, 2.0], "std": [1.0]}, "layers.0: standardize expects a std for each of 2 channels, got 1"),
            ({"mean": [1.0, 2.0], "std": [1.0, 0.0]}, "layers.0.std.1: input should be greater than 0"),
        ],
    )
    def test_constants_that_do_not_fit_are_refused_at_their_place(self, fields, message):
        with pytest.raises(invflow.SpecError, match=message):
            invflow.build({"input": {"shape": [2]}, "layers": [{"type": "standardize", **fields}]})

    def test_messages_name_the_layer(self):
        with pytest.raises(NumericsError, match="standardize expects finite numbers"):
            Standardize(shape=(1,)).initialize(torch.tensor([[math.inf]]))
        with pytest.raises(ShapeError, match="standardize expects a batch of at least one sample"):
            Standardize(shape=(1,)).initialize(torch.zeros(0, 1))


def test_actnorm_is_the_same_function_as_that_of_normflows():
    flows = pytest.importorskip("normflows.flows")
    for shape in ((3,), (3, 4, 5)):
        theirs, ours = flows.ActNorm((3,) + (1,) * (len(shape) - 1)).double(), ActNorm(shape).double()
        x = torch.randn(9, *shape, dtype=torch.float64) * 3 + 1
        theirs(x)  # initializes it
        with torch.no_grad():
            theirs.s += torch.randn_like(theirs.s)
            ours.log_scale.copy_(theirs.s.flatten())
            ours.shift.copy_(theirs.t.flatten())
        for there, here in ((theirs.forward, "forward"), (theirs.inverse, "inverse")):
            expected, their_log_det = there(x)
            found, log_det = getattr(ours, f"{here}_and_log_det")(x)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(log_det, their_log_det.expand(9), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_no_log_scale_makes_zeros_no_numbers(far, dtype):
    """A step of an optimiser can take a log-scale anywhere; exp(89) is infinite in float32."""
    layer = Affine(shape=(2,)).to(dtype)
    torch.nn.init.constant_(layer.log_scale, far)
    x = torch.tensor([[0.0, 1.0]], dtype=dtype)
    for y, log_det in (layer.forward_and_log_det(x), layer.inverse_and_log_det(x)):
        assert y.isfinite().all()
        assert log_det.isfinite().all()
