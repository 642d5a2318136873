"""Training without keeping activations: chains that compute them again while going backwards."""

from .chain import run_chain
from .monitor import MONITORS, Monitor, Reconstruction
from .step import POLICIES, Backprop, Step

__all__ = ["MONITORS", "POLICIES", "Backprop", "Monitor", "Reconstruction", "Step", "run_chain"]
