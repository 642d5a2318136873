"""invflow: declarative invertible neural networks.

A JSON spec becomes a checked chain of bijections that trains, runs backwards, and proves how exactly it does.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from . import plot
    from .training.public import analyse, evaluate, fit, interpolate, lightning, open_run, round_trip, train

__version__ = version("invflow")

_OF_TRAINING = frozenset({"analyse", "evaluate", "fit", "interpolate", "lightning", "open_run", "round_trip", "train"})


def __getattr__(name: str) -> Any:
    """What needs Lightning or matplotlib is imported when it is used: `import invflow` takes little more than torch."""
    if name == "plot":
        return import_module(".plot", __name__)
    if name in _OF_TRAINING:
        return getattr(import_module(".training.public", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "analyse",
    "bijections",
    "build",
    "build_model",
    "data",
    "evaluate",
    "fit",
    "interpolate",
    "lightning",
    "load",
    "load_spec",
    "models",
    "nets",
    "numerics",
    "open_run",
    "plot",
    "register",
    "register_data",
    "register_head",
    "register_net",
    "register_part",
    "register_prior",
    "registered",
    "round_trip",
    "save",
    "to_spec",
    "train",
]
