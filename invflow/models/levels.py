"""Levels of a chain on a grid whose distribution the nets of its `factor_out` layers give."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import nn

from ..bijections import FactorOut
from ..errors import InvflowError
from ..sequential import Sequential
from ..state import Shape, is_tensor_shape


def tells_the_prior(layer: nn.Module) -> TypeGuard[FactorOut]:
    """Whether the layer is a `factor_out` with a net, on a grid."""
    return isinstance(layer, FactorOut) and layer.tells_the_prior


def levels_of(chain: Sequential) -> int:
    """How many levels have a distribution that depends on the others: they come first in the last state.

    Raises:
        InvflowError: a layer may change or move such a level after it is done.
    """
    if not any(map(tells_the_prior, chain.modules())):
        return 0
    if chain.declared_shape is None:
        raise InvflowError(
            "on a grid, the net of a factor_out is for the prior, in a chain that was built from a spec; build one, or "
            "leave out the net"
        )
    done = 0
    for step, shape in zip(chain.steps(), chain.shapes(chain.declared_shape), strict=False):
        if tells_the_prior(step.layer) and not step.backwards:
            parts = 1 if is_tensor_shape(shape) else len(shape)
            if step.path or parts != done + 1:
                raise InvflowError(
                    f"on a grid, the net of a factor_out is for the prior, and no other layer may make a tuple before, "
                    f"got the shape {shape} before {step.name}; leave out its net, or the other layer"
                )
            done += 1
        elif done and not (step.path and step.path[0] >= done):
            raise InvflowError(
                f"on a grid, what a factor_out with a net has taken out is for the prior, but {step.title} may change "
                "it; put that layer into an on"
            )
    return done


def others(state: Any, levels: int) -> Any:
    """The part of a last state, or of its shape, that is no such level."""
    if not levels:
        return state
    rest = state[levels:]
    return rest[0] if len(rest) == 1 else rest


def shape_of_others(chain: Sequential, shape: Shape) -> Shape:
    """The shape of what the prior has parameters for, of a chain whose last state has this shape."""
    return others(shape, levels_of(chain))  # type: ignore[no-any-return]
