"""Layers of other libraries, given as callables."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..bijection import Bijection
from ..context import Context
from ..state import Shape, State, shape_of, zero_log_det, zeros

Call = Callable[..., Any]

_LOG_DETS = ("log det", "inverse log det", "log det form", "log det everywhere")


class Foreign(Bijection):
    """A layer of another library as a bijection, for `check_bijection`.

    Args:
        forward: x to y; called with the context too if there is one.
        inverse: y to x, likewise.
        forward_log_det: x to log |det dy/dx|, of shape (batch,). Without both, log-determinants are not checked.
        inverse_log_det: y to ``log |det dx/dy|``.
        module: the layer, if it has weights. The functions then take it as their first argument, because the check runs
            on copies of it in several dtypes and modes.
        layer_count: the number of layers inside; the tolerance for rounding errors is proportional to it.

    Attributes:
        unknown: the names of the properties that cannot be checked.

    Examples:
        >>> from invflow.testing import check_bijection
        >>> double = from_callables(lambda x: 2 * x, lambda y: y / 2)
        >>> check_bijection(double, (3,), examples=2, skip=["compiles"]).ok
        True
    """

    def __init__(
        self,
        forward: Call,
        inverse: Call,
        forward_log_det: Call | None = None,
        inverse_log_det: Call | None = None,
        module: nn.Module | None = None,
        layer_count: int = 1,
    ) -> None:
        super().__init__()
        self.layer_count = layer_count
        self.module = module
        self._calls = (forward, inverse)
        self._log_dets = (forward_log_det, inverse_log_det)
        # Functions that are defined inside others do not pickle, and other libraries hold indices in buffers, which
        # averages truncate: neither makes a map wrong.
        self.unknown = {"pickles", "handling", *(() if all(self._log_dets) else _LOG_DETS)}

    def forward(self, x: Any, context: Context = None) -> Any:
        return self._call(self._calls[0], x, context)

    def inverse(self, y: Any, context: Context = None) -> Any:
        return self._call(self._calls[1], y, context)

    def forward_and_log_det(self, x: Any, context: Context = None) -> tuple[Any, Tensor]:
        return self.forward(x, context), self._log_det(self._log_dets[0], x, context)

    def inverse_and_log_det(self, y: Any, context: Context = None) -> tuple[Any, Tensor]:
        return self.inverse(y, context), self._log_det(self._log_dets[1], y, context)

    def output_shape(self, shape: Shape) -> Shape:
        probe = copy.deepcopy(self).eval()
        like = next(probe.parameters(), torch.empty(0))
        with torch.no_grad():
            y: State = probe(zeros(shape, dtype=like.dtype, device=like.device))
        return shape_of(y)

    def _call(self, function: Call, state: Any, context: Context) -> Any:
        held = () if self.module is None else (self.module,)
        return function(*held, state) if context is None else function(*held, state, context)

    def _log_det(self, function: Call | None, state: Any, context: Context) -> Any:
        """The log-determinant; without a function for it, zeros, which are not checked."""
        return zero_log_det(state) if function is None else self._call(function, state, context)


from_callables = Foreign
"""The same: a bijection made of the functions that another library's layer offers."""
