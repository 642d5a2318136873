"""The promises that every bijection keeps, one function each: a property that is defined here is checked."""

from types import ModuleType

from . import conduct, mathematics, pytorch
from .base import Broken, Property


def _defined_in(module: ModuleType) -> tuple[Property, ...]:
    return tuple(value for value in vars(module).values() if isinstance(value, Property))


MATHEMATICS = _defined_in(mathematics)
"""What makes a map a bijection with the right log-determinant."""

CONDUCT = _defined_in(conduct)
"""How a bijection behaves towards its caller."""

PYTORCH = _defined_in(pytorch)
"""What PyTorch does with modules."""

PROPERTIES = MATHEMATICS + CONDUCT + PYTORCH

__all__ = ["CONDUCT", "MATHEMATICS", "PROPERTIES", "PYTORCH", "Broken", "Property"]
