"""Any bijection with its two directions exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..bijection import Bijection
from ..context import Context, seen
from ..errors import InvflowError, ShapeError
from ..registry import register
from ..reversible.retrace import Replay, Retraced, Retraces, retrace
from ..state import Path
from ..steps import Step
from ..wires import Ask, Wrapper


def directed(step: Step) -> Bijection:
    """A step as a bijection of its part of the state: its layer, or the layer's inverse."""
    return Inverse(step.layer) if step.backwards else step.layer


def given_to(step: Step, context: Any) -> Any:
    """What `directed` of a step is called with of the chain's context, or of its shape."""
    around = step.around(context)
    return around if step.backwards else seen(around, step.layer.sees)


@register("inverse")
class Inverse(Wrapper, Retraces):
    """The inverse of a bijection, as a bijection: ``y = layer.inverse(x)``. ``Inverse(Inverse(b))`` is ``b``.

    Use it to exchange the fast and the slow direction of a layer, or to undo one, such as a `psi`.

    Args:
        layer: the bijection to run backwards.

    Raises:
        ShapeError: the layer adds dimensions (an `Injection`, or a chain with one), and has a left inverse only, or it
            has none (a `Joint`, or a chain with one).

    Examples:
        >>> from invflow.bijections import Psi
        >>> Inverse(Psi(2)).output_shape((4, 7, 7))
        (1, 14, 14)
    """

    runs_backwards = True
    examples = [
        ({"layer": {"type": "psi", "block_size": 2}}, (4, 2, 3)),
        ({"layer": {"type": "split"}}, ((1, 2), (2, 2))),
        ({"layer": {"type": "additive_coupling", "net": {"type": "mlp"}}}, ((3,), (2,))),
    ]

    def __new__(cls, layer: Bijection | None = None) -> Any:  # unpickling calls it without a layer
        if isinstance(layer, Inverse) and layer.sees is ...:  # or what it sees would be lost
            return layer.layer
        return super().__new__(cls)

    def __init__(self, layer: Bijection) -> None:
        if not layer.invertible:
            raise ShapeError(f"{layer.tag} cannot be run backwards: it is, or holds, a joint, which has no inverse")
        if not layer.surjective:
            raise ShapeError(f"{layer.tag} cannot be run backwards: it adds dimensions, and has a left inverse only")
        super().__init__(layer)

    @classmethod
    def wiring(cls, count: int, shape: Ask, fields: Mapping[str, Any]) -> Sequence[tuple[int, Path]]:
        """The layer on all of the state."""
        return [(0, ())]

    @property
    def domain(self) -> str:
        return self.layer.codomain or "reals"

    @property
    def codomain(self) -> str | None:
        return self.layer.domain

    def lipschitz_bounds(self) -> tuple[float, float]:
        forward, inverse = self.layer.lipschitz_bounds()
        return inverse, forward

    def retrace(self, y: Any, context: Context, replay: Replay, *, log_det: bool, backwards: bool) -> Retraced:
        return retrace(self.layer, y, context, replay, log_det=log_det, backwards=not backwards)

    @torch.no_grad()
    def initialize(self, x: Any, context: Context = None) -> None:
        """Raises InvflowError: the layer's input is the output of this inverse, which does not exist yet."""
        if self.awaits_data:
            raise InvflowError("a layer run backwards cannot be initialised from data; initialise it, then invert it")
