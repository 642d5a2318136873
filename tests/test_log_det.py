"""Log-determinants of residual blocks: exact, within their bounds, unbiased, and with the right gradients."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import invflow
from invflow import InvflowError
from invflow.bijections import Residual
from invflow.log_det import (
    default_continuation,
    draw_probes,
    draw_terms,
    enough_terms,
    exact_log_det,
    roulette_weights,
    series_log_det,
    truncation_error,
)
from invflow.nets import LipschitzConv, LipschitzMLP

EXACT = 1e-10
STANDARD_ERRORS = 3
GRADIENT_STANDARD_ERRORS = 4
RELATIVE_STANDARD_ERROR = 0.01
"""The relative standard error of the mean over 10,000 draws."""

DRAWS = 10_000 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1_000
SIZE = 6


def block(c, estimator, **options):
    """A block whose g stretches by about the coefficient in all directions."""
    torch.manual_seed(0)
    net = LipschitzMLP((SIZE,), (SIZE,), hidden=[SIZE], activation="lipswish")
    with torch.no_grad():
        for layer in net.maps:
            layer.weight.add_(10 * torch.eye(SIZE))
    return Residual(net, c, log_det={"type": estimator, **options}, shape=(SIZE,)).double().train()


def point():
    generator = torch.Generator().manual_seed(1)
    return 2 + torch.randn(1, SIZE, generator=generator, dtype=torch.float64)


def value_and_projections(one, x, directions):
    """The log-determinant and its derivatives along fixed directions of input and parameters."""
    x = x.clone().requires_grad_()
    value = one.forward_and_log_det(x)[1]
    variables = [x, *one.parameters()]
    slopes = torch.autograd.grad(value.sum(), variables, allow_unused=True, materialize_grads=True)
    along = [sum(float((s * d).sum()) for s, d in zip(slopes, direction, strict=True)) for direction in directions]
    return [float(value.detach()), *along]


def directions_for(one, x):
    generator = torch.Generator().manual_seed(2)
    return [
        [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in (x, *one.parameters())]
        for _ in range(5)
    ]


@given(
    c=st.sampled_from([0.5, 0.9, 0.97]),
    seed=st.integers(0, 99),
    image=st.booleans(),
    activation=st.sampled_from(["elu", "lipswish", "tanh", "maxmin"]),
)
def test_the_exact_one_is_that_of_autodiff(c, seed, image, activation):
    torch.manual_seed(seed)
    shape = (2, 3, 3) if image else (5,)
    net = (LipschitzConv if image else LipschitzMLP)(shape, shape, hidden=[8], activation=activation)
    with torch.no_grad():
        for layer in net.maps:
            layer.weight.mul_(20)
    one = Residual(net, c, log_det={"type": "exact"}).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    y, log_det = one.forward_and_log_det(x)
    expected = torch.stack(
        [
            torch.linalg.slogdet(torch.func.jacrev(lambda x: one(x[None])[0])(row).reshape(2 * [row.numel()])).logabsdet
            for row in x
        ]
    )
    assert float((log_det - expected).detach().abs().max()) <= EXACT
    assert float((one.inverse_and_log_det(y)[1] + expected).detach().abs().max()) <= EXACT


@pytest.mark.parametrize("c", [0.5, 0.9])
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_roulette_and_its_gradient_are_unbiased(c, probe):
    exact, one = block(c, "exact"), block(c, "roulette", probe=probe, probes=4)
    x = point()
    directions = directions_for(one, x)
    expected = torch.tensor(value_and_projections(exact, x, directions), dtype=torch.float64)
    torch.manual_seed(3)
    draws = torch.tensor([value_and_projections(one, x, directions) for _ in range(DRAWS)], dtype=torch.float64)
    mean, error = draws.mean(0), draws.std(0) / DRAWS**0.5
    assert abs(mean[0] - expected[0]) <= STANDARD_ERRORS * error[0]
    assert error[0] * (DRAWS / 10_000) ** 0.5 <= RELATIVE_STANDARD_ERROR * abs(expected[0])
    assert ((mean - expected).abs() <= GRADIENT_STANDARD_ERRORS * error).all()


@pytest.mark.parametrize("c", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("terms", [1, 2, 5, 10, 20])
def test_the_truncated_one_lies_within_its_bound(c, terms):
    exact, one = block(c, "exact"), block(c, "power_series")
    x = point()
    # The mean over these probes is the trace itself, without random error.
    probes = SIZE**0.5 * torch.eye(SIZE, dtype=torch.float64)[:, None]
    found = series_log_det(one.branch(), x, None, probes, [1.0] * terms)
    error = float((found - exact.forward_and_log_det(x)[1]).detach().abs().max())
    assert error <= truncation_error(c, terms, SIZE)
    assert error > 1e-6 or c**terms < 0.2  # it is an approximation


@pytest.mark.parametrize("log_det", ["power_series", "roulette"])
def test_the_gradient_of_a_series_is_that_of_its_terms(log_det):
    one = block(0.9, log_det)
    x = point()
    probes = SIZE**0.5 * torch.eye(SIZE, dtype=torch.float64)[:, None]
    weights = [1.0] * 6 if log_det == "power_series" else roulette_weights(6, 2, 0.85)
    x = x.requires_grad_()
    variables = [x, *one.parameters()]
    found = torch.autograd.grad(
        series_log_det(one.branch(), x, None, probes, weights).sum(), variables, allow_unused=True
    )
    dense = torch.func.jacrev(lambda x: one.branch()(x, None).sum(0))(x)[:, 0]
    power, terms = torch.eye(SIZE, dtype=torch.float64), []
    for k, weight in enumerate(weights, start=1):
        power = power @ dense
        terms.append(-weight * (-1) ** k / k * power.trace())
    expected = torch.autograd.grad(sum(terms), variables, allow_unused=True)
    assert any(b is not None and float(b.abs().max()) > 1e-3 for b in expected)
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None or float(a.abs().max()) == 0
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_second_derivatives_of_an_estimate_are_refused():
    one, x = block(0.9, "roulette"), point().requires_grad_()
    with pytest.raises(InvflowError, match="first derivatives only"):
        torch.autograd.grad(one.forward_and_log_det(x)[1].sum(), x, create_graph=True)


def kept_bytes(one, x):
    """The number of bytes that autograd keeps between forward and backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        one.forward_and_log_det(x)[1].sum().backward()
    return sum(kept.values())


def test_gradient_memory_does_not_grow_with_the_terms():
    x = torch.randn(8, SIZE, dtype=torch.float64)
    few, many = (kept_bytes(block(0.9, "power_series", terms=terms), x) for terms in (2, 200))
    assert many <= 1.1 * few


def test_in_eval_mode_nothing_is_random_and_the_inverse_has_the_negative():
    x = torch.randn(4, 3, 5, 5)
    for log_det in ("auto", "power_series", "roulette"):
        one = Residual(log_det={"type": log_det}, shape=(3, 5, 5)).double().eval()
        state = torch.get_rng_state()
        y, log_det_forward = one.forward_and_log_det(x.double())
        _, again = one.forward_and_log_det(x.double())
        back, log_det_inverse = one.inverse_and_log_det(y)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(log_det_forward, again)
        assert float((back - x).detach().abs().max()) < 1e-12
        torch.testing.assert_close(log_det_inverse, -log_det_forward, rtol=1e-9, atol=1e-9)
        exact = exact_log_det(one.branch(), x.double(), None)
        assert float((log_det_forward - exact).detach().abs().max()) < 0.5  # 8 probes for 75 dimensions


def test_in_train_mode_draws_follow_the_global_generator():
    one, x = Residual(log_det={"type": "roulette"}, shape=(3, 5, 5)), torch.randn(4, 3, 5, 5)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(one.forward_and_log_det(x)[1].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_small_states_are_exact_and_large_ones_are_drawn():
    assert not Residual(shape=(64,)).log_det_is_estimated
    assert Residual(shape=(65,)).log_det_is_estimated


def test_the_number_of_terms_is_distributed_as_its_weights_say():
    torch.manual_seed(0)
    numbers = torch.tensor([draw_terms(2, 0.6) for _ in range(4000)])
    weights = roulette_weights(8, 2, 0.6)
    for k, weight in enumerate(weights, start=1):
        share, probability = float((numbers >= k).double().mean()), 1 / weight
        assert abs(share - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_continuations_keep_the_variance_finite():
    for c in (0.01, 0.5, 0.9, 0.97, 0.999):
        assert c**2 < default_continuation(c) < 1
        assert truncation_error(c, enough_terms(c, 0.01), 1) <= 0.01
    with pytest.raises(InvflowError, match="the variance of the log-determinant would be infinite"):
        Residual(coefficient=0.9, log_det={"type": "roulette", "continuation": 0.81}, shape=(2,))


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_probes_are_white(kind):
    probes = draw_probes(kind, (20_000, 3), torch.zeros((), dtype=torch.float64), torch.Generator().manual_seed(0))
    covariance = probes.T @ probes / len(probes)
    assert float((covariance - torch.eye(3, dtype=torch.float64)).abs().max()) <= 0.05
    assert float(probes.mean(0).abs().max()) <= 0.05


@pytest.mark.parametrize("log_det", [{"type": "exact"}, {"type": "roulette"}, {"type": "power_series"}])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_density_does_not_depend_on_the_gradient_mode(log_det, batch):
    torch.manual_seed(0)
    chain = (
        invflow.build({"input": {"shape": [3]}, "layers": [{"type": "residual", "log_det": log_det}]}).eval().double()
    )
    x = torch.randn(batch, 3, dtype=torch.float64)
    found = chain.forward_and_log_det(x)[1]
    assert (found != 0).all()
    with torch.no_grad():
        for given in (x, x.clone().requires_grad_()):
            torch.testing.assert_close(chain.forward_and_log_det(given)[1], found, rtol=1e-12, atol=1e-14)
    with torch.inference_mode():
        torch.testing.assert_close(chain(x), chain.trace(x)[-1])
        with pytest.raises(InvflowError, match="use no_grad instead of inference_mode"):
            chain.forward_and_log_det(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_exact_one_in_half_precision(dtype):
    torch.manual_seed(0)
    block = Residual(shape=(4,))
    x = torch.randn(3, 4)
    expected = block.forward_and_log_det(x)[1]
    found = block.to(dtype).forward_and_log_det(x.to(dtype))[1]
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
