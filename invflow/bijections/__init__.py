"""The bijections, one family a file."""

from .actnorm import ActNorm, Affine
from .affine_coupling import AffineCoupling, GinCoupling
from .coupling import AdditiveCoupling
from .each import Each
from .elementwise import Logit
from .factor_out import FactorOut
from .injections import Duplicate, Pad
from .inverse import Inverse
from .linear import Linear1x1
from .permute import Permute
from .psi import Psi
from .reshape import Flatten, Reshape, Transpose
from .residual import Residual
from .routing import Exchange, On, Parallel
from .split import Merge, Split
from .stripes import Checkerboard, Stripes

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Checkerboard",
    "Duplicate",
    "Each",
    "Exchange",
    "FactorOut",
    "Flatten",
    "GinCoupling",
    "Inverse",
    "Linear1x1",
    "Logit",
    "Merge",
    "On",
    "Pad",
    "Parallel",
    "Permute",
    "Psi",
    "Reshape",
    "Residual",
    "Split",
    "Stripes",
    "Transpose",
]
