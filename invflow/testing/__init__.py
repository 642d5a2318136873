"""Proof for anybody's bijection: `check_bijection`, and Hypothesis strategies drawn from the registry."""

from .checker import check_bijection
from .foreign import Foreign, from_callables
from .report import BijectionError, Finding, Report
from .strategies import Case, cases, chain_cases, states

__all__ = [
    "BijectionError",
    "Case",
    "Finding",
    "Foreign",
    "Report",
    "cases",
    "chain_cases",
    "check_bijection",
    "from_callables",
    "states",
]
