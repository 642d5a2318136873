"""Fixed-point solvers: accuracy, number of evaluations, and reports."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invflow.solvers import solve

DIMENSIONS = 128
CLUSTERED_EVALUATIONS = 20
"""If few directions are near the limit, at a tolerance of 1e-6."""
MORE_THAN_PICARD = 2
TOLERANCE = 1e-6


def rotation(seed, size=DIMENSIONS):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def symmetric(values, seed=0):
    q = rotation(seed)
    return (q * values) @ q.T


def few_near(c):
    values = torch.full((DIMENSIONS,), 0.2, dtype=torch.float64)
    values[:5] = c
    return values


def harmonic(c):
    k = torch.arange(1, DIMENSIONS // 2 + 1, dtype=torch.float64)
    return c * torch.cat([1 / k, -1 / k])


CLUSTERED = {
    "harmonic spectrum": lambda c: (symmetric(harmonic(c)), torch.nn.Identity()),
    "tanh, few at the limit": lambda c: (symmetric(few_near(c)), torch.tanh),
}
ELSEWHERE = {
    "rotation": lambda c: (c * rotation(1), torch.nn.Identity()),
    "tanh of a rotation": lambda c: (c * rotation(1), torch.tanh),
    "modulus of a rotation": lambda c: (c * rotation(1), torch.abs),
    "relu of a rotation": lambda c: (c * rotation(1), torch.relu),
    "sorting": lambda c: (c * rotation(1), lambda x: x.sort(dim=1).values),
    "uniform spectrum": lambda c: (symmetric(torch.linspace(-c, c, DIMENSIONS).double()), torch.nn.Identity()),
    "tanh, few singular values at the limit": lambda c: (rotation(1) @ symmetric(few_near(c)), torch.tanh),
    "tanh, few at minus the limit": lambda c: (-symmetric(few_near(c)), torch.tanh),
    "multiple of the identity": lambda c: (-c * torch.eye(DIMENSIONS).double(), torch.nn.Identity()),
}


def problem(made, batch=8, dtype=torch.float64):
    """The fixed-point map of ``y = x + activation(A x)``, y, and the exact x, known by construction."""
    matrix, activation = made
    x = torch.randn(batch, DIMENSIONS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = (x + activation(x @ matrix.T)).to(dtype)
    matrix = matrix.to(dtype)
    return (lambda x, rows: y[rows] - activation(x @ matrix.T)), y, x


@pytest.mark.parametrize("c", [0.9, 0.97])
@pytest.mark.parametrize("name", CLUSTERED)
def test_anderson_needs_few_evaluations_where_few_directions_are_near_the_limit(name, c):
    step, y, x = problem(CLUSTERED[name](c))
    solution = solve(step, y, contraction=c, tolerance=TOLERANCE)
    assert int(solution.convergence.evaluations.max()) <= CLUSTERED_EVALUATIONS
    assert not solution.convergence.failed
    assert float(((solution.x - x).norm(dim=1) / x.norm(dim=1)).max()) <= TOLERANCE


@pytest.mark.parametrize("c", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_anderson_never_takes_more_than_picard_and_two(name, c):
    step, y, x = problem(ELSEWHERE[name](c))
    picard, anderson = (
        solve(step, y, contraction=c, tolerance=TOLERANCE, method=method) for method in ("picard", "anderson")
    )
    assert int((anderson.convergence.evaluations - picard.convergence.evaluations).max()) <= MORE_THAN_PICARD
    for solution in (picard, anderson):
        assert not solution.convergence.failed
        unit = torch.maximum(x.norm(dim=1), y.norm(dim=1))
        assert float(((solution.x - x).norm(dim=1) / unit).max()) <= TOLERANCE


@pytest.mark.parametrize("c", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["picard", "anderson"])
@pytest.mark.parametrize("name", [*CLUSTERED, *ELSEWHERE])
def test_without_a_tolerance_it_is_exact_or_names_the_samples(name, method, dtype, c):
    step, y, _ = problem({**CLUSTERED, **ELSEWHERE}[name](c), dtype=dtype)
    report = (solution := solve(step, y, contraction=c, method=method)).convergence
    # The fixed point for the same rounded numbers, found in float64.
    exact_step, exact_y, _ = problem({**CLUSTERED, **ELSEWHERE}[name](c))
    exact = solve(lambda x, rows: exact_step(x, rows) - exact_y[rows] + y[rows].double(), y.double(), contraction=c).x
    error = (solution.x.double() - exact).norm(dim=1) / exact.norm(dim=1)
    limit = 1e-6 if dtype == torch.float32 else 1e-12
    wrong = (error > limit).nonzero().flatten().tolist()
    assert set(wrong) <= set(report.failed)
    if dtype == torch.float64:
        assert not report.failed


@given(seed=st.integers(0, 999), c=st.sampled_from([0.5, 0.9, 0.97]), tolerance=st.sampled_from([1e-2, 1e-5, 1e-8]))
def test_the_error_is_within_the_tolerance(seed, c, tolerance):
    matrix = c * rotation(seed, 6)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = x + torch.tanh(x @ matrix.T)
    solution = solve(lambda x, rows: y[rows] - torch.tanh(x @ matrix.T), y, contraction=c, tolerance=tolerance)
    unit = torch.maximum(x.norm(dim=1), y.norm(dim=1))
    assert not solution.convergence.failed
    assert float(((solution.x - x).norm(dim=1) / unit).max()) <= tolerance
    assert float(solution.convergence.contraction.max()) <= c * (1 + 1e-9)


def test_the_report_says_what_was_done():
    calls = []

    def step(x, rows):
        calls.append(rows.tolist())
        return torch.tensor([[0.0], [0.5], [0.9]])[rows] * x + 1

    report = solve(step, torch.zeros(3, 1), contraction=0.9, method="picard").convergence
    assert calls[0] == [0, 1, 2]
    assert calls[-1] == [2]  # finished samples are not evaluated again
    assert report.evaluations.tolist() == [sum(i in rows for rows in calls) for i in range(3)]
    assert report.contraction.tolist() == pytest.approx([0, 0.5, 0.9], abs=1e-3)
    assert "3 samples" in str(report)
    assert f"{len(report.failed)} not converged" in str(report)


def test_a_sample_that_is_not_a_number_disturbs_and_delays_nobody():
    evaluations = []

    def step(x, rows):
        evaluations.append(len(rows))
        return y[rows] - 0.9 * torch.sin(x)

    y = torch.randn(4, 6, dtype=torch.float64)
    clean = solve(step, y, contraction=0.9)
    count = len(evaluations)
    evaluations.clear()
    y = y.clone()
    y[1] = math.nan
    spoilt = solve(step, y, contraction=0.9)
    assert len(evaluations) <= count
    assert spoilt.convergence.failed == [1]
    assert spoilt.convergence.evaluations[1] == 1
    kept = [0, 2, 3]
    assert torch.equal(clean.x[kept], spoilt.x[kept])


def test_what_is_no_contraction_ends_and_says_so():
    solution = solve(lambda x, rows: 1 - 2 * x, torch.ones(2, 3), contraction=0.9, max_evaluations=50)
    picard = solve(lambda x, rows: 1 - 2 * x, torch.ones(2, 3), contraction=0.9, max_evaluations=50, method="picard")
    assert picard.convergence.failed == [0, 1]
    assert picard.convergence.evaluations.max() <= 50
    assert float(picard.convergence.contraction.max()) == pytest.approx(2.0)
    assert solution.x.shape == (2, 3)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 2, 3)])
def test_any_shape(shape):
    solution = solve(lambda x, rows: x / 2, torch.ones(shape), contraction=0.5)
    assert solution.x.shape == shape
    assert not solution.convergence.failed
