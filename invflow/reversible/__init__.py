"""Training without keeping activations: chains that compute them again while going backwards."""

from .chain import POLICIES, Backprop, run_chain

__all__ = ["POLICIES", "Backprop", "run_chain"]
