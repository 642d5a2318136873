"""Learned linear maps across the channels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .._torch import Constants
from ..context import Context
from ..errors import InvflowError, NumericsError
from ..numerics.backend import own_precision
from ..registry import register
from ..state import Shape
from .channels import PerPosition, spread
from .permute import require_order

_SMALLEST_DIAGONAL = 1e-3
"""Of U in the parametrisation "lu", as in nflows: far from 0, where a softplus is after a step too large."""


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """A matrix times the channels of x, at every position."""
    if x.dim() == 2:
        return x @ matrix.mT
    columns = torch.bmm(matrix.expand(x.shape[0], *matrix.shape), x.flatten(2))
    return columns.reshape(x.shape[0], matrix.shape[0], *x.shape[2:])


@register("linear_1x1")
class Linear1x1(Constants, PerPosition):
    """``y = W x + b`` across the channels at every position: an invertible 1x1 convolution.

    Use it between couplings of a density, where a learned mixture of channels serves better than a fixed order.

    The log-determinant is ``log |det W|`` times the number of positions. W is one of

    - "plu": ``P L (U + diag(sign * exp(log_diagonal)))`` with a fixed permutation P, unit lower triangular L and
      strictly upper triangular U, which stays invertible while it is learned: ``log |det W|`` is
      ``sum(log_diagonal)``, and the inverse solves two triangular systems. It starts as a rotation, with ``P = 1`` and
      positive signs; weights of earlier versions bring others.
    - "lu": ``L (U + diag(softplus(diagonal) + 0.001))``, which starts as the identity and follows a `permute`, as in
      neural spline flows.
    - "plain": a matrix of free weights, which starts as a rotation. A determinant in float64 takes time, and nothing
      keeps the weights from becoming singular: then the inverse is refused.

    References: Kingma, Dhariwal: Glow, 2018, https://arxiv.org/abs/1807.03039; Durkan et al.: Neural Spline Flows,
    2019, https://arxiv.org/abs/1906.04032

    Args:
        shape: the incoming shape, channels first.
        bias: whether b is learned, from 0; without it there is none.
        parametrization: what W is made of: "plu", "lu" or "plain".

    Raises:
        NumericsError: `inverse` of a plain matrix that is singular.

    Examples:
        >>> Linear1x1(shape=(3, 4, 4))(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    examples = [
        ({}, (3,)),
        ({}, (2, 3, 2)),
        ({}, (1, 2, 2)),
        ({"bias": True}, (3, 4)),
        ({"parametrization": "lu", "bias": True}, (3, 2, 2)),
        ({"parametrization": "plain"}, (3,)),
        ({"parametrization": "plain", "bias": True}, (2, 2, 1, 2)),
    ]

    constants: tuple[str, ...] = ("sign", "order")
    bias: nn.Parameter | None
    order: Tensor
    sign: Tensor

    def __init__(
        self, shape: Shape, bias: bool = False, parametrization: Literal["plu", "lu", "plain"] = "plu"
    ) -> None:
        super().__init__(shape)
        size = self.channels
        self.parametrization = parametrization
        if parametrization == "lu":
            # L without its unit diagonal below the diagonal of U: as many numbers as W has.
            self.factors = nn.Parameter(torch.eye(size) * math.log(math.expm1(1 - _SMALLEST_DIAGONAL)))
        else:
            rotation, _ = torch.linalg.qr(torch.randn(size, size))
        if parametrization == "plain":
            self.weight = nn.Parameter(rotation.contiguous())
        elif parametrization == "plu":
            _, lower, upper = torch.linalg.lu(rotation)
            diagonal = upper.diagonal()
            self.lower = nn.Parameter(lower.tril(-1).contiguous())
            # Columns of other signs: still a rotation.
            self.upper = nn.Parameter((upper.triu(1) * diagonal.sign()).contiguous())
            self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.register_parameter("bias", nn.Parameter(torch.zeros(size)) if bias else None)
        # Constants cannot depend on the random weights: the processes of a parallel training share weights alone.
        self.constants = ("sign", "order") if parametrization == "plu" else ()
        self._is_plain = True  # the order is that of the channels, and every sign is 1
        for name in self.constants:  # (P x)[i] = x[order[i]]
            setattr(self, name, self.made(name))

    def made(self, name: str) -> Tensor:
        return torch.ones(self.channels) if name == "sign" else torch.arange(self.channels)

    def prove(self) -> None:
        """Raises InvflowError if the order is no permutation, or a sign is neither 1 nor -1."""
        if not self.constants:
            return
        require_order(self.tag, self.order)
        if not self.sign.is_meta and not bool((self.sign.abs() == 1).all()):
            raise InvflowError(f"{self.tag} expects signs of 1 and -1, got {self.sign.tolist()}")
        if self.sign.is_meta or self.order.is_meta:
            return
        self._is_plain = torch.equal(self.order, torch.arange(self.channels, device=self.order.device))
        self._is_plain &= bool((self.sign == 1).all())

    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        self.require(x)
        with own_precision(x):
            y = times(self._matrix(), x)
        return y if self.bias is None else y + spread(self.bias, x)

    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        self.require(y)
        shifted = y if self.bias is None else y - spread(self.bias, y)
        # Every position of every sample is a column; the solvers do not support half precision.
        columns = single(shifted.movedim(1, 0).flatten(1))
        if self.parametrization == "plain":
            columns = self._solved(columns)
        else:
            if not self._is_plain:
                columns = columns.index_select(0, self.order.argsort())
            lower, upper = single(self._lower()), single(self._upper())
            columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
            columns = torch.linalg.solve_triangular(upper, columns, upper=True)
        return columns.to(y.dtype).reshape(shifted.movedim(1, 0).shape).movedim(0, 1)

    def log_abs_det(self) -> Tensor:
        """``log |det W|``."""
        if self.parametrization == "plu":
            return self.log_diagonal.sum()
        if self.parametrization == "lu":
            return self._diagonal().log().sum()
        return torch.linalg.slogdet(self.weight.double()).logabsdet  # type: ignore[no-any-return]

    @property
    def building_cost(self) -> int:
        """Two factorisations."""
        return self.channels**3

    @torch.no_grad()
    def lipschitz_bounds(self) -> tuple[float, float]:
        """The largest singular value of W, and 1 over the smallest."""
        values = torch.linalg.svdvals(single(self._matrix()))
        return float(values[0]), float(1 / values[-1])

    def _matrix(self) -> Tensor:
        """W."""
        if self.parametrization == "plain":
            return self.weight
        upper = self._upper()
        product = torch.addmm(upper, self._lower().tril(-1), upper)  # the unit diagonal of L is not stored
        return product if self._is_plain else product.index_select(0, self.order)

    def _diagonal(self) -> Tensor:
        """The absolute values of the diagonal of U."""
        if self.parametrization == "plu":
            return self.log_diagonal.exp()
        return functional.softplus(self.factors.diagonal()) + _SMALLEST_DIAGONAL

    def _lower(self) -> Tensor:
        """A matrix that has L below its diagonal."""
        return self.factors if self.parametrization == "lu" else self.lower

    def _upper(self) -> Tensor:
        """U with its diagonal."""
        diagonal = self._diagonal()
        strict = self.factors if self.parametrization == "lu" else self.upper
        return strict.triu(1) + torch.diag(diagonal if self._is_plain else self.sign * diagonal)

    def _solved(self, columns: Tensor) -> Tensor:
        try:
            return torch.linalg.solve(single(self.weight), columns)  # type: ignore[no-any-return]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise NumericsError(
                "the inverse of linear_1x1 expects a matrix that is not singular, got one that is, in the "
                'parametrization "plain"; "plu" and "lu" never are'
            ) from None


def single(x: Tensor) -> Tensor:
    """In float32 if it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
