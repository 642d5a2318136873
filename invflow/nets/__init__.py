"""Conditioners: the functions inside couplings and residual blocks, which nobody needs to invert."""

from .conv import Conv
from .lipschitz import LipschitzConv, LipschitzMLP
from .mlp import MLP
from .spectral import SpectralConv2d, SpectralLinear

__all__ = ["MLP", "Conv", "LipschitzConv", "LipschitzMLP", "SpectralConv2d", "SpectralLinear"]
