"""invflow: declarative invertible neural networks.

A JSON spec becomes a checked chain of bijections that trains, runs backwards, and proves how exactly it does.
"""

from importlib.metadata import version

from . import bijections, data, models, nets, numerics
from ._torch import Constants
from .bijection import Bijection, Injection
from .bijections import Inverse
from .errors import CheckpointError, InvflowError, NumericsError, ShapeError, SpecError
from .models import Classifier, Flow
from .part import Part
from .registry import register, register_data, register_head, register_net, register_part, register_prior, registered
from .sequential import Sequential
from .spec import Limits, Spec, build, build_model, load, load_spec, save, to_spec

__version__ = version("invflow")

__all__ = [
    "Bijection",
    "CheckpointError",
    "Classifier",
    "Constants",
    "Flow",
    "Injection",
    "Inverse",
    "InvflowError",
    "Limits",
    "NumericsError",
    "Part",
    "Sequential",
    "ShapeError",
    "Spec",
    "SpecError",
    "__version__",
    "bijections",
    "build",
    "build_model",
    "data",
    "load",
    "load_spec",
    "models",
    "nets",
    "numerics",
    "register",
    "register_data",
    "register_head",
    "register_net",
    "register_part",
    "register_prior",
    "registered",
    "save",
    "to_spec",
]
