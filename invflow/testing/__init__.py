"""Proof for anybody's bijection: `check_bijection`, and Hypothesis strategies drawn from the registry."""

from .checker import check_bijection
from .report import BijectionError, Finding, Report
from .strategies import Case, cases, chain_cases, states

__all__ = [
    "BijectionError",
    "Case",
    "Finding",
    "Report",
    "cases",
    "chain_cases",
    "check_bijection",
    "states",
]
