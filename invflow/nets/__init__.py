"""Conditioners: the functions inside couplings and residual blocks, which need no inverse."""

from .contract import Conditioned, Lipschitz, Stack, takes_context
from .lipschitz import LipschitzConv, LipschitzMLP
from .plain import MLP, Conv
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
