"""The bijections, one family a file."""

from .actnorm import ActNorm, Standardize
from .affine import Affine
from .affine_coupling import AffineCoupling, GinCoupling
from .autoregressive import Autoregressive, SplineAutoregressive
from .continuous import Continuous
from .conv_exponential import ConvExponential
from .coupling import AdditiveCoupling
from .each import Each
from .elementwise import LeakyRelu, Scale, SinhArcsinh
from .factor_out import FactorOut
from .haar import Haar
from .injections import Duplicate, Pad
from .intervals import Logit, Sigmoid, Softplus, Tanh
from .inverse import Inverse
from .joint import Joint
from .linear import Linear1x1
from .mixture import MixtureCoupling
from .orthogonal import Householder, Rotation
from .permute import Permute
from .psi import Psi
from .reshape import Flatten, Reshape, Transpose
from .residual import Residual
from .routing import Exchange, On, Parallel
from .spline import Spline, SplineCoupling
from .split import Merge, Split
from .stripes import Checkerboard, Stripes
from .transformer_autoregressive import TransformerAutoregressive

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Autoregressive",
    "Checkerboard",
    "Continuous",
    "ConvExponential",
    "Duplicate",
    "Each",
    "Exchange",
    "FactorOut",
    "Flatten",
    "GinCoupling",
    "Haar",
    "Householder",
    "Inverse",
    "Joint",
    "LeakyRelu",
    "Linear1x1",
    "Logit",
    "Merge",
    "MixtureCoupling",
    "On",
    "Pad",
    "Parallel",
    "Permute",
    "Psi",
    "Reshape",
    "Residual",
    "Rotation",
    "Scale",
    "Sigmoid",
    "SinhArcsinh",
    "Softplus",
    "Spline",
    "SplineAutoregressive",
    "SplineCoupling",
    "Split",
    "Standardize",
    "Stripes",
    "Tanh",
    "TransformerAutoregressive",
    "Transpose",
]
