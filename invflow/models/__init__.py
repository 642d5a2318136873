"""What stands on top of a chain: heads make a classifier of it, priors a density."""

from .classifier import Classifier
from .dequantization import bits_per_dimension, dequantize
from .flow import Flow
from .heads import ConvNetHead, Head, LinearHead
from .priors import Prior, StandardNormal

__all__ = [
    "Classifier",
    "ConvNetHead",
    "Flow",
    "Head",
    "LinearHead",
    "Prior",
    "StandardNormal",
    "bits_per_dimension",
    "dequantize",
]
