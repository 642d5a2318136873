"""Every tolerance of the properties, with its reason."""

from __future__ import annotations

import torch

ROUND_TRIP_ROUNDINGS = 16
"""Roundings that one closed-form layer may add up in a round trip: sums over a few dozen channels, and two triangular
solves. The tolerance is this times the number of layers times eps: 3.6e-15 for one layer and 4.3e-14 for twelve in
float64, well within the promised 1e-12. Registered layers use up to 4."""

SAME_ROUNDINGS = 16
"""Roundings between two computations of the same numbers: with another batch size or memory layout, the libraries may
sum in another order."""

DOMAIN_ROUNDINGS = 4
"""Roundings between an elementwise map in float32 and in float64, relative to max(1, |value|): of the distances from
both ends of its domain, their quotient and its logarithm. `Logit` uses up to 2."""

LOG_DET = 1e-10
"""Relative to max(1, |log-det|), in float64: LU of the dense Jacobian loses its condition number times a few eps, which
is less for condition numbers up to `LOG_DET_CONDITION`; beyond it the tolerance grows in proportion."""

LOG_DET_CONDITION = 1e4

GRADIENT = 1e-6
"""Central differences of step 1e-5 in float64: their truncation error, of the order of the step squared, and their
rounding error, eps over the step, are both about 1e-10, times third derivatives and function values up to 1e3."""

AUTOCAST_ROUNDINGS = 2
"""In units of bfloat16's eps: a conditioner that runs in bfloat16 may turn a difference in the last bit of its float32
input into one in the last bit of its bfloat16 output, once per layer."""

HALF_ROUNDINGS = 16
"""In float16 and bfloat16, in units of the dtype's eps or, if that is more, of what changing the inputs and weights by
their roundings makes."""

LARGEST_IN_HALF = 1e4
"""Larger results are not compared, because float16 ends at 65504."""

EXACT = 0.0
"""The same bits: nothing was recomputed, or the same computation was done twice."""

JUDGED = 0.01
"""A round trip with a larger error fails, however ill-conditioned: a hundredth of the state is not a rounding."""


def eps(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number."""
    return torch.finfo(dtype).eps
