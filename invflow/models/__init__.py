"""Models: a chain with a head on top is a classifier, a chain with a prior is a density."""

from .context_net import ContextNet
from .dequantization import Dequantizer, bits_per_dimension, dequantize
from .distribution import FlowDistribution
from .heads import BayesHead, ConvNetHead, Head, LinearHead, StackHead
from .hybrid import Hybrid
from .mixture_priors import DiscretizedLogistic, GaussianMixture
from .model import Classifier, Flow, caveat
from .priors import Logistic, Normal, Prior, StandardNormal, StudentT, Uniform

__all__ = [
    "BayesHead",
    "Classifier",
    "ContextNet",
    "ConvNetHead",
    "Dequantizer",
    "DiscretizedLogistic",
    "Flow",
    "FlowDistribution",
    "GaussianMixture",
    "Head",
    "Hybrid",
    "LinearHead",
    "Logistic",
    "Normal",
    "Prior",
    "StackHead",
    "StandardNormal",
    "StudentT",
    "Uniform",
    "bits_per_dimension",
    "caveat",
    "dequantize",
]
