"""Training without keeping activations: backward reconstructs or recomputes them."""

from .chain import POLICIES, Backprop, plan, run_chain
from .monitor import MONITORS, Monitor, Reconstruction, tolerance
from .retrace import Replay, Retraced, Retraces

__all__ = [
    "MONITORS",
    "POLICIES",
    "Backprop",
    "Monitor",
    "Reconstruction",
    "Replay",
    "Retraced",
    "Retraces",
    "plan",
    "run_chain",
    "tolerance",
]
