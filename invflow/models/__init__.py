"""Models: a chain with a head on top is a classifier, a chain with a prior is a density."""

from .distribution import FlowDistribution
from .heads import ConvNetHead, Head, LinearHead
from .model import Classifier, Flow, caveat
from .priors import Prior, StandardNormal, bits_per_dimension, dequantize

__all__ = [
    "Classifier",
    "ConvNetHead",
    "Flow",
    "FlowDistribution",
    "Head",
    "LinearHead",
    "Prior",
    "StandardNormal",
    "bits_per_dimension",
    "caveat",
    "dequantize",
]
