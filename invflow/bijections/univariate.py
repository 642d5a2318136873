"""Increasing functions of one number, whose parameters a net gives: what couplings and autoregressive layers apply."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..state import zero_log_det


class Univariate(metaclass=ABCMeta):  # not ABC, beside which no class of FSDP's can stand
    """A layer that applies ``u = g(b; made)`` to numbers b, where a net gives ``made``.

    A subclass defines g, its inverse and its derivative, and `outputs` if g takes more than one number of the net for
    each number of b.
    """

    @classmethod
    def outputs(cls, fields: Mapping[str, Any]) -> int:
        """The number of outputs of the net for each number of b, given the layer's own plain fields.

        They are stacked along the channels: first one output for all channels of b, then the next.
        """
        return 1

    @abstractmethod
    def _transform(self, b: Tensor, made: Tensor) -> tuple[Tensor, Tensor | None]:
        """``u = g(b; made)`` and ``log(du/db)``, elementwise; None if that is 0."""

    @abstractmethod
    def _untransform(self, u: Tensor, made: Tensor) -> tuple[Tensor, Tensor | None]:
        """``b = g^-1(u; made)`` and, likewise, ``log(du/db)``."""


def summed(log_scale: Tensor | None, like: Tensor) -> Tensor:
    """The log-determinant, ``(batch,)``."""
    if log_scale is None:
        return zero_log_det(like)
    return log_scale.sum(1) if log_scale.dim() == 2 else log_scale.sum(tuple(range(1, log_scale.dim())))
