"""Bijections with one fault each, and the property that must find it."""

from . import conduct, inverses, log_dets, modules, numerics
from .base import FAULTS, healthy

__all__ = ["FAULTS", "conduct", "healthy", "inverses", "log_dets", "modules", "numerics"]
