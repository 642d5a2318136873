"""Property tests for bijections: Hypothesis strategies drawn from the registry."""

from .strategies import Case, cases, chain_cases, states

__all__ = ["Case", "cases", "chain_cases", "states"]
