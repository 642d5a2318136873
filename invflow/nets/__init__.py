"""Conditioners: the functions inside couplings and residual blocks, which nobody needs to invert."""

from .contract import Conditioned, Lipschitz, Stack, takes_context
from .conv import Conv
from .lipschitz import LipschitzConv, LipschitzMLP
from .mlp import MLP
from .spectral import SpectralConv2d, SpectralLinear

__all__ = [
    "MLP",
    "Conditioned",
    "Conv",
    "Lipschitz",
    "LipschitzConv",
    "LipschitzMLP",
    "SpectralConv2d",
    "SpectralLinear",
    "Stack",
    "takes_context",
]
