"""A layer's forward recomputed from its output, ready to be differentiated."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..bijection import Bijection
from ..context import Context, seen
from ..state import leaves, map_state
from ..wires import call

Replay: TypeAlias = Callable[[], AbstractContextManager[object]]
"""Makes a context manager to evaluate a layer's parts in. Each time it is entered, they find the random numbers and the
buffers of the forward."""


class Retraced(NamedTuple):
    """A call of a bijection, recomputed from what it returned.

    Attributes:
        x: its input, as leaves of a graph; a tensor whose gradient comes from ``passes`` alone need not be a leaf.
        y: the tensors that it returned, as functions of x up to a constant; None for those that only ``passes`` cover.
        log_det: if it was asked for.
        passes: ``(i, j)`` if tensor i of the output is tensor j of the input plus what ``y`` holds: its gradient is
            passed on without a graph.
    """

    x: Any
    y: Sequence[Tensor | None]
    log_det: Tensor | None
    passes: tuple[tuple[int, int], ...] = ()


class Retraces(ABC):
    """A mixin for bijections with a faster way than to invert first and run forward afterwards.

    Couplings have one: they evaluate their conditioner once for both.
    """

    @abstractmethod
    def retrace(self, y: Any, context: Context, replay: Replay, *, log_det: bool, backwards: bool) -> Retraced:
        """``x`` and ``f(x)`` from ``y = f(x)``; if ``backwards``, the same for the inverse.

        Args:
            y: an output, detached.
            context: as in the call.
            replay: see `Replay`.
            log_det: whether the log-determinant is asked for.
            backwards: whether the call was `inverse`, so that y is one of its results.
        """


def retrace(layer: Bijection, y: Any, context: Context, replay: Replay, *, log_det: bool, backwards: bool) -> Retraced:
    """As `Retraces.retrace`, for any bijection: x is computed without a graph, and ``f(x)`` with one."""
    if isinstance(layer, Retraces) and _is_of_this_map(type(layer)):
        return layer.retrace(y, seen(context, layer.sees), replay, log_det=log_det, backwards=backwards)
    with torch.no_grad(), replay():
        x, _ = call(layer, y, context, log_det=False, backwards=not backwards)
    return rerun(layer, x, context, replay, log_det=log_det, backwards=backwards)


def rerun(layer: Bijection, x: Any, context: Context, replay: Replay, *, log_det: bool, backwards: bool) -> Retraced:
    """A call of any bijection, recomputed from its input."""
    x = map_state(_as_leaf, x)
    with replay():
        made, determinant = call(layer, x, context, log_det=log_det, backwards=backwards)
    return Retraced(x, list(leaves(made)), determinant)


@functools.cache
def _is_of_this_map(cls: type) -> bool:
    """Whether `retrace` is at least as specific as the map: a subclass may override the map alone."""
    classes = cls.__mro__

    def position(name: str) -> int:
        return next(i for i, one in enumerate(classes) if name in vars(one))

    return position("retrace") <= min(position("forward"), position("inverse"))


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())
