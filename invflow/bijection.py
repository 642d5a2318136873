"""The contract that every layer keeps: `Bijection`."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .errors import NumericsError
from .numerics.options import FLOAT, Exact, Float, Grid, Snap, at_least, level_of
from .state import Shape, State, leaves, map_state, shape_of, zero_log_det, zeros

Replay: TypeAlias = Callable[[], AbstractContextManager[object]]


class Retraced(NamedTuple):
    """A forward that was computed again from its output, ready to be differentiated.

    Attributes:
        x: the input, as leaves of a graph; a tensor that gradients reach by ``passes`` alone need not be one.
        y: the tensors of the output, as functions of x up to a constant; None for what only ``passes`` reach.
        log_det: where it was asked for.
        passes: ``(i, j)`` where tensor i of the output is tensor j of the input plus what ``y`` holds: its gradient is
            handed on without a graph.
    """

    x: Any
    y: Sequence[Tensor | None]
    log_det: Tensor | None
    passes: tuple[tuple[int, int], ...] = ()


class Bijection(nn.Module, ABC):
    """An invertible map between states, with its log-determinant.

    A subclass overrides `forward` and `inverse`; where the map does not preserve volume also
    `forward_and_log_det` and `inverse_and_log_det`; where it changes the shape also `output_shape`.

    What each subclass promises: no hidden state (no caches, and the caller's tensors stay as they are), forward and
    inverse agree with the same weights in train mode too, and no lambdas or closures in attributes, so that every
    model pickles.

    Attributes:
        domain: where inputs may lie; ``"reals"`` is all of R^n.
        level: how exact the inverse can be, with the parameters that it has: ``"float"`` (up to rounding), ``"grid"``
            (bit-exact on a grid, given the same batch shape, layout and device) or ``"exact"`` (bit-exact on a grid).
        shortfall: why it can be no more exact than its level.
        numerics: what it computes in, set by `set_numerics`.
        cheap_inverse: whether inverting costs about as much as going forward, so that activations may be recomputed.
        examples: ``(fields, shape)`` pairs that documentation and property tests start from: the JSON fields of a
            layer document without its type, and an input shape that they accept.
    """

    domain: ClassVar[str] = "reals"
    level: ClassVar[str] = "float"
    shortfall: ClassVar[str] = "its inverse undoes real arithmetic, which is true up to rounding only"
    numerics: Float | Snap | Grid | Exact = FLOAT
    cheap_inverse: ClassVar[bool] = False
    examples: ClassVar[Sequence[tuple[dict[str, Any], Shape]]] = ()

    @abstractmethod
    def forward(self, x: Any, context: Tensor | None = None) -> Any:
        """Y = f(x)."""

    @abstractmethod
    def inverse(self, y: Any, context: Tensor | None = None) -> Any:
        """X = f^-1(y)."""

    def forward_and_log_det(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        """``(y, log |det dy/dx|)``, the second of shape ``(batch,)``, dtype and device of the input."""
        return self(x, context), zero_log_det(x)

    def inverse_and_log_det(self, y: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        """``(x, log |det dx/dy|)``: the second is the negative of the forward one at x."""
        return self.inverse(y, context), zero_log_det(y)

    def retrace(self, y: Any, context: Tensor | None, replay: Replay, *, log_det: bool) -> Retraced:
        """``x`` and again ``f(x)`` from ``y = f(x)``, for constant-memory training.

        ``x`` is computed without a graph and becomes a leaf; what follows from it has one. The default inverts, then
        runs forward; a bijection that knows better, as couplings do, evaluates its conditioner once for both.

        Args:
            y: an output, detached.
            context: as in `forward`.
            replay: a context manager to evaluate the layer's parts in: they find what they found in the forward, the
                same random numbers and the same buffers, each time that it is entered.
            log_det: whether the log-determinant is asked for; else it is None.
        """
        with torch.no_grad(), replay():
            x = map_state(_as_leaf, self.inverse(y, context))
        with replay():
            made, determinant = self.forward_and_log_det(x, context) if log_det else (self(x, context), None)
        return Retraced(x, list(leaves(made)), determinant)

    def retrace_inverse(self, x: Any, context: Tensor | None, replay: Replay, *, log_det: bool) -> Retraced:
        """``y`` and again ``f^-1(y)`` from ``x = f^-1(y)``: `retrace` of this bijection run backwards."""
        with torch.no_grad(), replay():
            y = map_state(_as_leaf, self(x, context))
        with replay():
            made, determinant = self.inverse_and_log_det(y, context) if log_det else (self.inverse(y, context), None)
        return Retraced(y, list(leaves(made)), determinant)

    def output_shape(self, shape: Shape) -> Shape:
        """The shape of ``self(x)`` for an ``x`` of this shape. Raises ShapeError where there is none."""
        return shape

    def input_shape(self, shape: Shape) -> Shape:
        """The shape of ``self.inverse(y)`` for a ``y`` of this shape. Raises ShapeError where there is none.

        The default reads it off the inverse of zeros without a context, on a copy, so that nothing of this module
        moves; a bijection that cannot run without its context overrides it.
        """
        probe = copy.deepcopy(self).eval()
        like = next(probe.parameters(), torch.empty(0))
        with torch.no_grad():
            x: State = probe.inverse(zeros(shape, dtype=like.dtype, device=like.device))
        return shape_of(x)

    def set_numerics(self, numerics: Float | Snap | Grid | Exact) -> None:
        """Computes in these numerics from now on: a chain asks this of each of its layers.

        The default takes note; a bijection that has to compute otherwise to reach its level looks at ``numerics``.

        Raises:
            NumericsError: it cannot be as exact as they ask.
        """
        if not at_least(self.level, level_of(numerics)):
            raise NumericsError(f"{self._tag()} cannot be {level_of(numerics)}: {self.shortfall}")
        self.numerics = numerics

    @property
    def exactness(self) -> str:
        """How exact the inverse is as it stands, in the numerics that were set; the level, where they do not matter."""
        return self.level

    def _tag(self) -> str:
        from .registry import bijections  # the registry knows this class

        return bijections.name_of(type(self))

    def lipschitz_bounds(self) -> tuple[float, float]:
        """Upper bounds of the Lipschitz constants of the map and of its inverse, infinite where none is known.

        Of a tuple state the distance is the Euclidean one of all its numbers together.
        """
        return math.inf, math.inf

    @property
    def awaits_data(self) -> bool:
        """Whether `initialize` has something to do: an ActNorm that has seen no data, or a chain that holds one."""
        return False

    def initialize(self, x: Any, context: Tensor | None = None) -> None:
        """Data-dependent initialisation from a batch of inputs, where the layer has any."""

    def __repr__(self) -> str:
        """The class with the arguments it was constructed with, on one line."""
        return one_line(self)


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point() or tensor.is_complex())


def arguments_of(module: nn.Module) -> dict[str, Any] | None:
    """The arguments that a registered class was constructed with; None for any other module.

    A part that the module keeps under its parameter's name is what the module holds now: it may have been replaced.
    """
    recorded: dict[str, Any] | None = module.__dict__.get("_arguments")
    if recorded is None:
        return None
    kept: frozenset[str] = module.__dict__["_kept"]
    current = {name: getattr(module, name) for name in kept if hasattr(module, name)}
    return {
        **recorded,
        **{name: tuple(part) if isinstance(part, nn.ModuleList) else part for name, part in current.items()},
    }


def one_line(module: nn.Module) -> str:
    """``Class(argument=value, net=Net(argument=value))`` on one line, as far as the arguments were recorded."""
    arguments = arguments_of(module)
    if arguments is None:
        inside = module.extra_repr() or ("..." if next(module.children(), None) is not None else "")
    else:
        inside = ", ".join(
            ", ".join(map(one_line, value)) if _are_modules(value) else f"{name}={_shown(value)}"
            for name, value in arguments.items()
            if not name.endswith("shape") and value != ()
        )
    return f"{type(module).__name__}({inside})"


def _shown(value: Any) -> str:
    return one_line(value) if isinstance(value, nn.Module) else repr(value)


def _are_modules(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(part, nn.Module) for part in value)
