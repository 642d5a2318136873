"""What bijections share that hold one other."""

from __future__ import annotations

from ..bijection import Bijection
from ..numerics.options import Exact, Float, Grid, Snap


class Wrapper(Bijection):
    """A bijection that applies another one: as exact, as cheap to invert, and as ready as that.

    Attributes:
        layer: the other one.
    """

    def __init__(self, layer: Bijection) -> None:
        super().__init__()
        self.layer = layer

    @property
    def level(self) -> str:  # type: ignore[override]
        return self.layer.level

    @property
    def shortfall(self) -> str:  # type: ignore[override]
        return self.layer.shortfall

    @property
    def exactness(self) -> str:
        return self.layer.exactness

    def set_numerics(self, numerics: Float | Snap | Grid | Exact) -> None:
        self.layer.set_numerics(numerics)
        self.numerics = numerics

    @property
    def cheap_inverse(self) -> bool:  # type: ignore[override]
        return self.layer.cheap_inverse

    @property
    def awaits_data(self) -> bool:
        return self.layer.awaits_data
