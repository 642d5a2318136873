"""Every tolerance of the tests, with its reason."""

from __future__ import annotations

import torch

ONE_LAYER = 16
"""Roundings a single closed-form layer may add up: a few additions there and back."""

ONE_CHAIN = 4096
"""The same for a chain of up to 12 layers, whose conditioners hand errors on with gains above 1: 9e-13 in float64."""


def round_trip_error(original, returned, met) -> float:
    """max |x' - x| / max(1, the largest magnitude met in any state), in units of the dtype's eps."""
    from invflow.state import leaves

    pairs = list(zip(leaves(original), leaves(returned), strict=True))
    eps = torch.finfo(pairs[0][0].dtype).eps
    largest = max((leaf.abs().max().item() for state in met for leaf in leaves(state) if leaf.numel()), default=0.0)
    worst = max(((b - a).abs().max().item() for a, b in pairs if a.numel()), default=0.0)
    return worst / max(1.0, largest) / eps
