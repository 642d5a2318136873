"""Training without keeping activations: chains that compute them again while going backwards."""

from .chain import POLICIES, Backprop, Part, plan, run_chain
from .monitor import MONITORS, Monitor, Reconstruction, tolerance
from .retrace import Replay, Retraced, Retraces

__all__ = [
    "MONITORS",
    "POLICIES",
    "Backprop",
    "Monitor",
    "Part",
    "Reconstruction",
    "Replay",
    "Retraced",
    "Retraces",
    "plan",
    "run_chain",
    "tolerance",
]
