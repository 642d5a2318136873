"""What a chain computes in, as objects that compute: real numbers, snapped, on a grid, or exact.

A chain calls its numerics on the states at its two ends; a coupling calls them for its conditioner's result and for its
sums. No other code depends on the mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from ..context import Context
from ..options import Options
from ..state import State
from . import conditioners, grid

Level: TypeAlias = Literal["float", "grid", "exact"]
LEVELS: tuple[Level, ...] = ("float", "grid", "exact")
"""How exact an inverse can be, the least first: up to rounding; bit-exact on a grid, given the same batch shape, layout
and device; bit-exact on a grid whatever these are."""


class Limit(NamedTuple):
    """How exact the inverse of a layer can be, given its parameters.

    Attributes:
        level: the level that it can reach.
        reason: why it can reach no better one.
    """

    level: Level
    reason: str = ""


REAL_ARITHMETIC = Limit("float", "its inverse undoes real arithmetic, which is true up to rounding only")
NONE = Limit("exact")


def least(levels: Iterable[Level]) -> Level:
    """The least of some levels; the highest level for no levels.

    Examples:
        >>> least(["exact", "float"]), least([])
        ('float', 'exact')
    """
    return min(levels, key=LEVELS.index, default=LEVELS[-1])


FracBits: TypeAlias = Annotated[int, Field(ge=0, le=52)]
_FRAC_BITS = "the grid is the multiples of 2^-frac_bits"


class Mode(Options):
    """What a chain computes in; the base of the four modes, which itself computes in real numbers.

    Attributes:
        level: the level that each layer of the chain must reach.
        integer_nets: whether conditioners must be order-free, and count in steps of the grid.
        on_grid: whether the states between the layers stay on a grid too, so that each layer must keep them on it.
        about_data: whether only the end of the chain that takes data is affected.
        limit: how exact a chain in these numerics can be, whatever its layers are.
    """

    mode: str
    level: ClassVar[Level] = "float"
    integer_nets: ClassVar[bool] = False
    on_grid: ClassVar[bool] = False
    about_data: ClassVar[bool] = False
    limit: ClassVar[Limit] = NONE

    @property
    def step(self) -> float:
        """The distance between neighbouring data; 0 for real numbers."""
        return 0.0

    @property
    def rounds(self) -> bool:
        """Whether the chain may change a state at one of its ends, so that a round trip may not return it."""
        return False

    def reach(self, dtype: torch.dtype) -> float:
        """The bound on the magnitudes of all states of this dtype."""
        return math.inf

    def enter(self, state: Any) -> Any:
        """A state as it enters a chain, at either end. Raises NumericsError if these numerics do not accept it."""
        return state

    def leave(self, x: Any) -> Any:
        """What the inverse of a chain returns for its last state."""
        return x

    def nearest(self, state: State) -> State:
        """The nearest state that a chain accepts, at either end: for features that it did not compute."""
        return state

    def nearest_data(self, state: State) -> State:
        """The nearest state that is valid data: on their grid, if there is one."""
        return state

    def condition(self, net: nn.Module, a: Tensor, context: Context, is_stack: bool) -> Tensor:
        """The result of a conditioner.

        Args:
            net: the conditioner.
            a: its input.
            context: its second input, or None.
            is_stack: whether all its layers treat 0.0 and -0.0 alike.
        """
        made: Tensor = net(a) if context is None else net(a, context)
        return made

    def require_same_function(self, who: str, net: nn.Module) -> None:
        """Raises NumericsError if the conditioner may not be the forward's function, and that would break a promise."""

    def add(self, who: str, b: Tensor, made: Tensor) -> Tensor:
        """``b + made``."""
        return made + b

    def subtract(self, who: str, u: Tensor, made: Tensor) -> Tensor:
        """``u - made``, which undoes `add`."""
        return u - made


class Float(Mode):
    """Real numbers, inverted up to rounding."""

    mode: Literal["float"]


class _WithGrid(Mode):
    """The base of the modes whose data lie on a grid."""

    frac_bits: FracBits = Field(default=16, description=_FRAC_BITS)

    @property
    def step(self) -> float:
        return 2.0**-self.frac_bits

    def nearest_data(self, state: State) -> State:
        return grid.snap(state, self.frac_bits)

    def condition(self, net: nn.Module, a: Tensor, context: Context, is_stack: bool) -> Tensor:
        return conditioners.evaluate(net, a, context, in_float64=False, hide_sign=not is_stack)

    def require_same_function(self, who: str, net: nn.Module) -> None:
        conditioners.require_same_function(who, net)


class Snap(_WithGrid):
    """Real numbers; the inverse rounds its result to the data's grid, so that data come back without one wrong bit."""

    mode: Literal["snap"]
    about_data: ClassVar[bool] = True
    limit: ClassVar[Limit] = Limit("float", "it rounds at its end, so that it is no bijection of the grid")
    frac_bits: FracBits = Field(default=8, description=_FRAC_BITS)

    @property
    def rounds(self) -> bool:
        return True

    def leave(self, x: Any) -> Any:
        return grid.snap(x, self.frac_bits)


class _OnGrid(_WithGrid):
    """The base of the two modes whose states stay on a grid."""

    on_grid: ClassVar[bool] = True
    entry: Literal["check", "snap"] = Field(
        default="check", description='what becomes of a state off the grid: "check" refuses it, "snap" rounds it'
    )

    @property
    def rounds(self) -> bool:
        return self.entry == "snap"

    def reach(self, dtype: torch.dtype) -> float:
        return grid.limit(dtype, self.frac_bits)

    def enter(self, state: Any) -> Any:
        return grid.enter(state, self.mode, self.frac_bits, rounds=self.rounds)

    def nearest(self, state: State) -> State:
        return grid.snap(state, self.frac_bits)

    def add(self, who: str, b: Tensor, made: Tensor) -> Tensor:
        return grid.add(who, b, self._steps(made, b.dtype), self.frac_bits)

    def subtract(self, who: str, u: Tensor, made: Tensor) -> Tensor:
        return grid.add(f"the inverse of {who}", u, self._steps(made, u.dtype), self.frac_bits, -1)

    def _steps(self, made: Tensor, dtype: torch.dtype) -> Tensor:
        """The result of a conditioner in whole steps of the grid."""
        return grid.steps(made, self.frac_bits, dtype)


class Grid(_OnGrid):
    """The state stays on a grid: bit-exact if both directions see the same batch shape, layout and device."""

    mode: Literal["grid"]
    level: ClassVar[Level] = "grid"
    conditioner_dtype: Literal["float64"] | None = Field(
        default=None, description="what conditioners compute in; null: the state's dtype"
    )

    def condition(self, net: nn.Module, a: Tensor, context: Context, is_stack: bool) -> Tensor:
        wide = self.conditioner_dtype == "float64"
        return conditioners.uncompiled()(net, a, context, in_float64=wide, hide_sign=not is_stack)


class Exact(_OnGrid):
    """The state stays on a grid and conditioners are integer: bit-exact whatever the batch, layout or library."""

    mode: Literal["exact"]
    level: ClassVar[Level] = "exact"
    integer_nets: ClassVar[bool] = True
    activation_bits: Annotated[int, Field(ge=2, le=16)] = Field(
        default=10, description="the integers between the layers of a conditioner are below 2^activation_bits"
    )

    def _steps(self, made: Tensor, dtype: torch.dtype) -> Tensor:
        return made  # an order-free net already counts in steps


Numerics: TypeAlias = Annotated[Float | Snap | Grid | Exact, Field(discriminator="mode")]

FLOAT = Float(mode="float")
