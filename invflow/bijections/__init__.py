"""The bijections, one family a file."""

from .actnorm import ActNorm, Affine
from .affine_coupling import AffineCoupling, GinCoupling
from .coupling import AdditiveCoupling
from .each import Each
from .elementwise import Logit
from .factor_out import FactorOut
from .inverse import Inverse
from .linear import Linear1x1
from .permute import Permute
from .psi import Psi
from .residual import Residual
from .routing import Exchange, On, Parallel
from .split import Merge, Split

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Each",
    "Exchange",
    "FactorOut",
    "GinCoupling",
    "Inverse",
    "Linear1x1",
    "Logit",
    "Merge",
    "On",
    "Parallel",
    "Permute",
    "Psi",
    "Residual",
    "Split",
]
