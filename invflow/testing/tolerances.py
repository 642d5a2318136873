"""Every tolerance of the properties, with its reason."""

from __future__ import annotations

import torch

ROUND_TRIP_ROUNDINGS = 16
"""Roundings that one closed-form layer may add up there and back: sums over a few dozen channels, and two triangular
solves. Times the layers of a chain, and eps: 3.6e-15 for one layer, 4.3e-14 for twelve, well within the 1e-12 promised
in float64. Registered layers use up to 4."""

SAME_ROUNDINGS = 16
"""Roundings between two ways to compute the same numbers once: another batch size or memory layout lets the libraries
sum in another order."""

LOG_DET = 1e-10
"""Relative to max(1, |log-det|), in float64: LU of the dense Jacobian loses its condition number times a few eps, which
stays below for condition numbers up to `LOG_DET_CONDITION`; beyond it the tolerance grows in proportion."""

LOG_DET_CONDITION = 1e4

GRADIENT = 1e-6
"""Central differences of step 1e-5 in float64: truncation of the order of the square of the step and rounding of eps
over the step are both about 1e-10, times third derivatives and function values up to 1e3."""

AUTOCAST_ROUNDINGS = 2
"""In units of bfloat16's eps: a conditioner that runs in bfloat16 may turn a last float32 bit of its input into a last
bfloat16 bit of its output, once a layer."""

EXACT = 0.0
"""The same bits: nothing was computed anew, or the same computation was done twice."""

JUDGED = 0.01
"""No round trip that is off by more passes, however ill-conditioned: a hundredth of the state is no rounding."""


def eps(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number."""
    return torch.finfo(dtype).eps
