"""The bijections, one family a file."""

from .coupling import AdditiveCoupling
from .each import Each
from .inverse import Inverse
from .permute import Permute
from .psi import Psi
from .split import Merge, Split

__all__ = ["AdditiveCoupling", "Each", "Inverse", "Merge", "Permute", "Psi", "Split"]
