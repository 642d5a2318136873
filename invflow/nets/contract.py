"""What is asked of a net, the function inside a coupling or a residual block.

Any `torch.nn.Module` will do: it is called with the state, and with the context behind it if there is one and the net
takes one. A registered net's constructor has its JSON fields as annotated parameters, and those of these three that it
wants to know, which the builder fills: ``in_shape`` and ``out_shape`` of what it maps, without the batch, and
``context_shape``, None if the spec has no context. It refuses shapes that it cannot map with a `ShapeError`.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from .._torch import unwrapped
from ..errors import InvflowError


@runtime_checkable
class Lipschitz(Protocol):
    """A net that knows how far it stretches: what `residual` asks for."""

    def lipschitz_bound(self) -> float:
        """An upper bound of the Lipschitz constant of the net, as its weights are."""


class Stack(nn.Sequential):
    """A net that applies its layers one after the other, to the input with the context behind it.

    Attributes:
        context_features: how many of the first layer's channels, the last ones, are the context's.
    """

    def __init__(self, *layers: nn.Module, context_features: int = 0) -> None:
        super().__init__(*layers)
        self.context_features = context_features


def takes_context(net: nn.Module) -> bool:
    """Whether a net is called with the context too, behind the state.

    It is if its constructor has a ``context_shape``, or its ``forward`` a second parameter that is named ``context`` or
    has to be given, or any number of them. What wraps another module, as `torch.compile` does, is looked through.

    Raises:
        InvflowError: its ``forward`` has a parameter ``context`` that is not the second.
    """
    try:
        constructor = inspect.signature(type(net).__init__).parameters
        _, *parameters = inspect.signature(type(net).forward).parameters.values()
    except (AttributeError, TypeError, ValueError):  # a scripted module has no signature: it is given what there is
        return True
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    named = any(one.name == "context" for one in parameters)
    if named and [one.name for one in positional[1:2]] != ["context"]:
        raise InvflowError(
            f"{type(net).__name__}: a net is called with the context behind the state; make context the second "
            "parameter of its forward"
        )
    needed = [one for one in positional if one.default is one.empty]
    any_number = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    if any_number and (inner := unwrapped(net)) is not net:
        return takes_context(inner)
    return "context_shape" in constructor or named or any_number or len(needed) > 1


class Conditioned:
    """What a bijection inherits, before `Bijection`, that holds a net under the name ``net``.

    Attributes:
        net: it may be replaced.
        net_takes_context: see `takes_context`; found out when the net is set, for signatures take time to read.
    """

    net: nn.Module
    net_takes_context: bool

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__setattr__ is not Conditioned.__setattr__:
            raise TypeError(f"{cls.__name__}: put Conditioned before the other classes that it inherits")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "net":
            self.net_takes_context = value is not None and takes_context(value)

    def conditioned(self, a: Any, context: Tensor | None) -> Any:
        """``net(a)``, or ``net(a, context)`` if there is a context and the net takes one."""
        return self.net(a, context) if context is not None and self.net_takes_context else self.net(a)
