"""Bijections with one fault each, and the property that must find it."""

from . import conditions, conduct, inverses, log_dets, modules, numerics, ranges, surroundings
from .base import FAULTS, healthy

__all__ = [
    "FAULTS",
    "conditions",
    "conduct",
    "healthy",
    "inverses",
    "log_dets",
    "modules",
    "numerics",
    "ranges",
    "surroundings",
]
