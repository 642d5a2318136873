"""The check of any bijection, `check_bijection`, and Hypothesis strategies for all registered types."""

from .checker import check_bijection
from .foreign import Foreign, from_callables
from .report import BijectionError, Finding, Report
from .strategies import Case, cases, chain_cases, conditions, states
from .suite import check_case, property_tests
from .trial import Setting

__all__ = [
    "BijectionError",
    "Case",
    "Finding",
    "Foreign",
    "Report",
    "Setting",
    "cases",
    "chain_cases",
    "check_bijection",
    "check_case",
    "conditions",
    "from_callables",
    "property_tests",
    "states",
]
