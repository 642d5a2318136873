"""Learned linear maps across the channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._torch import Constants
from ..bijection import Bijection
from ..errors import InvflowError
from ..numerics.backend import own_precision
from ..registry import register
from ..state import Shape, TensorShape, require_channels, shape_of
from .permute import require_order


@register("linear_1x1")
class Linear1x1(Constants, Bijection):
    """``y = W x`` across the channels at every position: an invertible 1x1 convolution.

    ``W = P L (U + diag(sign * exp(log_diagonal)))`` with a fixed permutation P, unit lower triangular L and strictly
    upper triangular U, so that it stays invertible while it is learned, its log-determinant is
    ``height * width * sum(log_diagonal)``, and its inverse solves two triangular systems. It starts as a rotation,
    with ``P = 1`` and positive signs; weights of earlier versions bring others.

    Reference: Kingma, Dhariwal: Glow, 2018, https://arxiv.org/abs/1807.03039

    Args:
        shape: the incoming shape, channels first.

    Examples:
        >>> Linear1x1(shape=(3, 4, 4))(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    cheap_inverse = True
    examples = [({}, (3,)), ({}, (2, 3, 2)), ({}, (1, 2, 2))]

    constants = ("sign", "order")
    order: Tensor
    sign: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._channels = require_channels("linear_1x1", shape)[0]
        rotation, _ = torch.linalg.qr(torch.randn(self._channels, self._channels))
        _, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1) * diagonal.sign())  # columns of other signs: a rotation all the same
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        # Constants cannot depend on the random weights: the processes of a parallel training share weights alone.
        self.sign, self.order = self.made("sign"), self.made("order")  # (P x)[i] = x[order[i]]

    def made(self, name: str) -> Tensor:
        return torch.ones(self._channels) if name == "sign" else torch.arange(self._channels)

    def prove(self) -> None:
        """Raises InvflowError if the order is no permutation, or a sign is neither 1 nor -1."""
        require_order(self.tag, self.order)
        if not self.sign.is_meta and not bool((self.sign.abs() == 1).all()):
            raise InvflowError(f"{self.tag} expects signs of 1 and -1, got {self.sign.tolist()}")

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        columns = self._columns(x)
        lower, upper = self._factors()
        with own_precision(x):
            mixed = lower @ (upper @ columns)
        return self._shaped(mixed.index_select(0, self.order), x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        columns = self._columns(y).index_select(0, self.order.argsort())
        lower, upper = self._factors()
        if y.dtype in (torch.float16, torch.bfloat16):  # the solver does not support them
            lower, upper, columns = lower.float(), upper.float(), columns.float()
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        return self._shaped(torch.linalg.solve_triangular(upper, columns, upper=True).to(y.dtype), y)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self(x, context), self._log_det(x)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse(y, context), -self._log_det(y)

    def output_shape(self, shape: Shape) -> TensorShape:
        return require_channels("linear_1x1", shape, len(self.order))

    def input_shape(self, shape: Shape) -> TensorShape:
        return self.output_shape(shape)

    @property
    def building_cost(self) -> int:
        """Two factorisations."""
        return len(self.order) ** 3

    @torch.no_grad()
    def lipschitz_bounds(self) -> tuple[float, float]:
        """The largest singular value of W, and 1 over the smallest."""
        lower, upper = self._factors()
        values = torch.linalg.svdvals(lower @ upper)
        return float(values[0]), float(1 / values[-1])

    def _factors(self) -> tuple[Tensor, Tensor]:
        """L with its unit diagonal, and U with its own."""
        lower = self.lower.tril(-1) + torch.eye(len(self.order), dtype=self.lower.dtype, device=self.lower.device)
        return lower, self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())

    def _log_det(self, x: Tensor) -> Tensor:
        positions = x.shape[2:].numel()
        return (positions * self.log_diagonal.sum()).to(x.dtype).repeat(x.shape[0])

    def _columns(self, x: Tensor) -> Tensor:
        """Every position of every sample as a column, ``(channels, batch * positions)``."""
        self.output_shape(shape_of(x))
        return x.movedim(1, 0).flatten(1)

    @staticmethod
    def _shaped(columns: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_columns`."""
        return columns.reshape(like.movedim(1, 0).shape).movedim(0, 1)
