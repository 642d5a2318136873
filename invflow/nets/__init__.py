"""Conditioners: the functions inside couplings and residual blocks, which need no inverse."""

from . import activations, attention, blocks, layers, norms, pooling
from .causal import CausalTransformer
from .contract import Conditioned, Lipschitz, Stepwise, takes_context
from .deep import DenseNet, ResNet, Transformer
from .embedding import Embedding
from .lipschitz import LipschitzConv, LipschitzMLP
from .masked import MaskedMLP
from .plain import MLP, Conv
from .spectral import SpectralConv, SpectralLinear
from .stack import Stack

__all__ = [
    "MLP",
    "CausalTransformer",
    "Conditioned",
    "Conv",
    "DenseNet",
    "Embedding",
    "Lipschitz",
    "LipschitzConv",
    "LipschitzMLP",
    "MaskedMLP",
    "ResNet",
    "SpectralConv",
    "SpectralLinear",
    "Stack",
    "Stepwise",
    "Transformer",
    "activations",
    "attention",
    "blocks",
    "layers",
    "norms",
    "pooling",
    "takes_context",
]
