"""Conditioners: the functions inside couplings, which nobody needs to invert."""

from .conv import Conv
from .mlp import MLP

__all__ = ["MLP", "Conv"]
