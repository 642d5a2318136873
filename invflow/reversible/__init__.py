"""Training without keeping activations: chains that compute them again while going backwards."""

from .chain import Part, plan, run_chain
from .examine import reconstruction_errors
from .monitor import MONITORS, Monitor, Reconstruction, tolerance
from .step import POLICIES, Backprop, Step

__all__ = [
    "MONITORS",
    "POLICIES",
    "Backprop",
    "Monitor",
    "Part",
    "Reconstruction",
    "Step",
    "plan",
    "reconstruction_errors",
    "run_chain",
    "tolerance",
]
