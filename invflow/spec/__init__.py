"""The spec language: documents, their expansion and validation, building, and checkpoints."""

from .build import build, build_model
from .checkpoint import load, save
from .document import Spec, load_spec
from .dump import to_spec
from .limits import Limits

__all__ = ["Limits", "Spec", "build", "build_model", "load", "load_spec", "save", "to_spec"]
