"""Inference of a simulator's parameters by a conditional flow: its posterior is calibrated, and the known one."""

from __future__ import annotations

import functools

import pytest
import scipy.stats
import torch
from torch.distributions import MultivariateNormal

import invflow

SIMULATIONS = 1000
DRAWS = 99  # of the posterior, so that a rank is one of 100 numbers
BINS = 20
FALSE_ALARM = 1e-4
"""The probability with which the test of one rank fails though the posterior is the true one; the seeds are fixed."""

MIXING = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]])
NOISE = 0.5
NET = {"type": "mlp", "hidden": [32], "activation": "tanh"}
SPEC = {
    "input": {"shape": [2], "context_shape": [3]},
    "layers": [
        {"type": "split"},
        {"type": "affine_coupling", "net": NET},
        {"type": "affine_coupling", "net": NET},
        {"type": "spline_coupling", "bound": 4, "net": {**NET, "zero_last": True}},
        {"type": "spline_coupling", "bound": 4, "net": {**NET, "zero_last": True}},
        {"type": "merge"},
    ],
    "prior": {"type": "standard_normal"},
}


def simulate(count):
    """Parameters from N(0, 1), and results that are linear in them, with noise."""
    theta = torch.randn(count, 2)
    return theta, theta @ MIXING + NOISE * torch.randn(count, 3)


def known(x):
    """The posterior: normal, of precision 1 + A A^T / noise^2."""
    covariance = torch.linalg.inv(torch.eye(2) + MIXING @ MIXING.T / NOISE**2)
    return MultivariateNormal(x @ MIXING.T @ covariance / NOISE**2, covariance)


@functools.cache
@torch.enable_grad()
def estimated():
    torch.manual_seed(0)
    flow = invflow.build_model(SPEC)
    steps = 800
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (-flow(*simulate(512)).mean()).backward()
        optimizer.step()
        schedule.step()
    return flow.eval()


def p_values(posterior, theta, draws):
    """Of chi-square tests that ranks are uniform: of both parameters, and of their density given the result."""
    ranks = [*(draws < theta).sum(0).T, (posterior.log_prob(draws) < posterior.log_prob(theta)).sum(0)]
    counts = [torch.bincount(rank * BINS // (DRAWS + 1), minlength=BINS).numpy() for rank in ranks]
    return [scipy.stats.chisquare(each).pvalue for each in counts]


@torch.no_grad()
def test_ranks_of_the_truth_are_uniform():
    """Talts and others, Validating Bayesian Inference Algorithms with Simulation-Based Calibration, 2018."""
    flow = estimated()
    torch.manual_seed(1)
    theta, x = simulate(SIMULATIONS)
    posterior = flow.distribution(x)
    assert min(p_values(posterior, theta, posterior.sample((DRAWS,)))) > FALSE_ALARM
    assert min(p_values(known(x), theta, known(x).sample((DRAWS,)))) > FALSE_ALARM, "the test itself is right"


@pytest.mark.parametrize("temperature", [0.75, 1.35])
@torch.no_grad()
def test_ranks_show_a_posterior_that_is_too_sure_or_too_unsure(temperature):
    flow = estimated()
    torch.manual_seed(1)
    theta, x = simulate(SIMULATIONS)
    draws = flow.sample(DRAWS, x, temperature=temperature)
    assert max(p_values(flow.distribution(x), theta, draws)) < FALSE_ALARM


@torch.no_grad()
def test_the_posterior_is_the_known_one():
    """The mean of log p - log q over simulations is the mean divergence of the estimate."""
    torch.manual_seed(2)
    theta, x = simulate(20_000)
    divergence = known(x).log_prob(theta) - estimated().distribution(x).log_prob(theta)
    error = 4 * divergence.std() / len(theta) ** 0.5  # four standard errors: once in 16,000 times
    assert -error < divergence.mean() < 0.01 + error
