"""What a spec says about exactness: which numbers the state may be, and how a chain keeps them."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from ..options import Options

Level: TypeAlias = Literal["float", "grid", "exact"]
LEVELS: tuple[Level, ...] = ("float", "grid", "exact")
"""What an inverse can be, the least first."""

FracBits: TypeAlias = Annotated[int, Field(ge=0, le=52)]
_FRAC_BITS = "the grid is the multiples of 2^-frac_bits"
_ENTRY = 'what becomes of a state off the grid: "check" refuses it, "snap" rounds it'


class Float(Options):
    """Real numbers, inverted up to rounding."""

    mode: Literal["float"]


class Snap(Options):
    """Real numbers; the inverse rounds its result to the data's grid, so that data come back without one wrong bit."""

    mode: Literal["snap"]
    frac_bits: FracBits = Field(default=8, description=_FRAC_BITS)


class Grid(Options):
    """The state stays on a grid: bit-exact where both directions see the same batch shape, layout and device."""

    mode: Literal["grid"]
    frac_bits: FracBits = Field(default=16, description=_FRAC_BITS)
    entry: Literal["check", "snap"] = Field(default="check", description=_ENTRY)
    conditioner_dtype: Literal["float64"] | None = Field(
        default=None, description="what conditioners compute in; null: the state's dtype"
    )


class Exact(Options):
    """The state stays on a grid and conditioners are integer: bit-exact whatever the batch, layout or library."""

    mode: Literal["exact"]
    frac_bits: FracBits = Field(default=16, description=_FRAC_BITS)
    entry: Literal["check", "snap"] = Field(default="check", description=_ENTRY)
    activation_bits: Annotated[int, Field(ge=2, le=16)] = Field(
        default=10, description="the integers between the layers of a conditioner are below 2^activation_bits"
    )


Numerics: TypeAlias = Annotated[Float | Snap | Grid | Exact, Field(discriminator="mode")]

FLOAT = Float(mode="float")


def level_of(numerics: Float | Snap | Grid | Exact) -> Level:
    """What a layer must be able to give in a chain of these numerics."""
    return numerics.mode if isinstance(numerics, Grid | Exact) else "float"


def at_least(level: str, wanted: str) -> bool:
    """Whether a level is as good as another one.

    >>> at_least("exact", "grid"), at_least("float", "grid")
    (True, False)
    """
    return LEVELS.index(level) >= LEVELS.index(wanted)
