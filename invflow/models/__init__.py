"""What stands on top of a chain."""

from .classifier import Classifier
from .heads import ConvNetHead, LinearHead

__all__ = ["Classifier", "ConvNetHead", "LinearHead"]
