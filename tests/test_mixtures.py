"""Mixtures of logistic distributions: their values, and inverses that are accurate in the tails too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import invflow
from invflow.bijections import Merge, MixtureCoupling, Split
from invflow.bijections.mixture import WIDEST, Mixture

DTYPES = [torch.float32, torch.float64]
PUBLISHED = {torch.float64: 1e-12, torch.float32: 2e-6}
"""What the published values of a mixture are to be met to."""

ROUNDINGS = 16
"""Of an inverse, in units of eps: of a dozen operations. The inverse itself stops at 1 in units of max(1, |y|)."""

WEIGHTS, MEANS, LOG_SCALES = [0.2, -0.5, 1], [-1, 0.5, 2], [-0.3, 0.1, -1]
# x, y and log(dy/dx), computed with 50 digits
VALUES = [
    (-6, -7.2843589095191486, 0.10216676727506073),
    (-1, -1.6448092764588315, -0.20234769950073254),
    (0, -1.0057647577020934, -0.72470938934354578),
    (1.5, -0.092232215274572049, 0.18662534042189875),
    (6, 6.9618870410189026, -0.071062671805939011),
]


def mixture(numbers):
    """The mixture that a coupling makes of logits, means and raw log-scales, (3, components, ...)."""
    weights, means, scales = numbers
    return Mixture(weights.log_softmax(0), means, WIDEST * torch.tanh(scales / WIDEST))


def random_mixtures(count, scale, dtype, components=4, seed=0):
    """Mixtures with parameters of this scale, and a number for each one that is well in the tails of some."""
    generator = torch.Generator().manual_seed(seed)
    numbers = scale * torch.randn(3, components, count, generator=generator, dtype=torch.float64)
    x = 3 * scale * torch.randn(count, generator=generator, dtype=torch.float64)
    return mixture(numbers.to(dtype)), x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_has_the_published_values(dtype):
    weights, means, log_scales = (torch.tensor(one, dtype=dtype)[:, None] for one in (WEIGHTS, MEANS, LOG_SCALES))
    published = Mixture(weights.log_softmax(0), means, log_scales)
    x, y, log_slope = torch.tensor(VALUES, dtype=torch.float64).T
    for found, expected in zip(published.logit(x.to(dtype)), (y, log_slope), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=PUBLISHED[dtype], atol=PUBLISHED[dtype])
    for found, expected in zip(published.quantile(y.to(dtype)), (x, log_slope), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=PUBLISHED[dtype], atol=PUBLISHED[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 5, 10])
@pytest.mark.parametrize("components", [1, 4])
def test_its_inverse_is_accurate_to_rounding_whatever_the_slopes(dtype, scale, components):
    mixed, x = random_mixtures(20_000, scale, dtype, components)
    y, log_slope = mixed.logit(x)
    back, log_slope_there = mixed.quantile(y)
    again, _ = mixed.logit(back)
    assert all(one.isfinite().all() for one in (y, log_slope, back, log_slope_there, again))
    unit = torch.finfo(dtype).eps * y.abs().clamp(min=1)
    assert float(((again - y).abs() / unit).max()) <= ROUNDINGS
    # The lesser slope of both: between distant components it changes a hundredfold where y is the same number.
    slope = torch.minimum(log_slope, log_slope_there).exp()
    assert float(((back - x).abs() * slope / unit).max()) <= ROUNDINGS
    # For any y, where an x between two numbers is rounded to one of them.
    x, log_slope = mixed.quantile(y := x)
    again, _ = mixed.logit(x)
    unit = torch.finfo(dtype).eps * torch.maximum(y.abs().clamp(min=1), x.abs() * log_slope.exp())
    assert float(((again - y).abs() / unit).max()) <= ROUNDINGS


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tails_keep_their_digits(dtype):
    mixed, _ = random_mixtures(100, 1, dtype)
    for value in (50.0, 1e4, 1e6, -50.0, -1e4, -1e6):  # where F or 1 - F is far below the least number
        y = torch.full((100,), value, dtype=dtype)
        x, log_slope = mixed.quantile(y)
        again, _ = mixed.logit(x)
        assert float((again - y).abs().max()) <= ROUNDINGS * torch.finfo(dtype).eps * abs(value)
        widest = mixed.log_scales.amax(0)
        if abs(value) > 1e3:  # only the widest component is left
            torch.testing.assert_close(log_slope, -widest, rtol=0, atol=1e-5)


def test_one_component_is_an_affine_map():
    torch.manual_seed(0)
    coupling = MixtureCoupling(nn.Linear(2, 3 * 5), components=1).double()
    a, b = torch.randn(7, 2, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    r, t, _, mean, scale = coupling.net(a).chunk(5, dim=1)
    log_slope = 2 * torch.tanh(r / 2) - WIDEST * torch.tanh(scale / WIDEST)
    (u, v), log_det = coupling.forward_and_log_det((a, b))
    torch.testing.assert_close(u, log_slope.exp() * (b - mean) + t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, log_slope.sum(1), rtol=1e-12, atol=1e-12)
    assert torch.equal(v, a)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_no_weights_make_it_nan(scale):
    generator = torch.Generator().manual_seed(0)
    numbers = scale * torch.randn(14, 2000, generator=generator)
    numbers[8:, :500] = numbers[8:, :500].sign() * scale
    numbers[5:8] = numbers[5:8].clamp(-1e4, 1e4)  # the means are shifts, and unbounded
    numbers[1] = 0
    coupling = MixtureCoupling(nn.Identity(), components=4)
    b = torch.randn(1, 2000, generator=generator)
    for call in (coupling._transform, coupling._untransform):
        given = [b.clone().requires_grad_(), numbers.reshape(1, -1).clone().requires_grad_()]
        y, log_slope = call(*given)
        assert y.isfinite().all()
        assert log_slope.isfinite().all()
    y, log_slope = coupling._transform(*given)
    for slope in torch.autograd.grad((y.sum(), log_slope.sum()), given):
        assert slope.isfinite().all()


def test_gradients_are_right_to_the_second_order_in_both_directions():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    x = 3 * torch.randn(4, generator=generator, dtype=torch.float64)
    for name in ("logit", "quantile"):
        given = (x.requires_grad_(), numbers)
        assert gradcheck(lambda x, numbers, name=name: getattr(mixture(numbers), name)(x), given)
        assert gradgradcheck(lambda x, numbers, name=name: getattr(mixture(numbers), name)(x), given, fast_mode=True)


def test_a_net_of_zeros_makes_it_the_identity():
    net = nn.Linear(2, 3 * 26).double()
    for weight in net.parameters():
        nn.init.zeros_(weight)
    a, b = torch.randn(7, 2, dtype=torch.float64), 100 * torch.randn(7, 3, dtype=torch.float64)
    (u, v), log_det = MixtureCoupling(net).forward_and_log_det((a, b))
    torch.testing.assert_close(u, b, rtol=1e-14, atol=1e-14)
    assert log_det.abs().max() <= 1e-14
    assert torch.equal(v, a)


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_constant_memory_training_gives_the_same_gradients(way):
    torch.manual_seed(0)
    layers = [
        MixtureCoupling(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2 * 11)), components=3) for _ in range(3)
    ]
    found = {}
    for policy in ("stored", "reversible"):
        chain = invflow.Sequential(Split(), *copy.deepcopy(layers), Merge(), backprop=policy).double()
        x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, log_det = getattr(chain, f"{way}_and_log_det")(x)
        found[policy] = torch.autograd.grad((y.square().sum(), log_det.sum()), [x, *chain.parameters()])
    for stored, reversible in zip(*found.values(), strict=True):
        torch.testing.assert_close(reversible, stored, rtol=1e-8, atol=1e-8)


def test_it_trains_as_a_flow():
    torch.manual_seed(0)
    half = {"type": "mixture_coupling", "components": 3, "net": {"type": "mlp", "hidden": [16]}}
    spec = {
        "input": {"shape": [2]},
        "layers": [{"type": "split"}, half, half, {"type": "merge"}],
        "prior": {"type": "standard_normal"},
    }
    flow = invflow.build_model(spec)
    x = torch.randn(256, 2).sign() * 2 + 0.3 * torch.randn(256, 2)  # four clusters
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        (loss := -flow.log_prob(x).mean()).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 2.6  # a normal distribution has 2 log(2.02 sqrt(2 pi e)), 4.2; the clusters have 1.8
    assert torch.isfinite(flow.sample(100)).all()


def test_the_slope_far_out_is_that_of_autodiff():
    """Of numbers near 1e6 the shares of the components have all of their digits, and so have gradients."""
    far = torch.tensor([-3e6, -1e6, 1e6, 3e6], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    value, log_slope = Mixture(zeros.log_softmax(0), zeros, zeros).logit(far)
    (slope,) = torch.autograd.grad(value.sum(), far)
    torch.testing.assert_close(slope, torch.ones_like(slope), rtol=4e-16, atol=0)
    torch.testing.assert_close(log_slope, torch.zeros_like(slope), rtol=0, atol=4e-16)
