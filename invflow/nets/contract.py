"""The contract of nets, the functions inside couplings and residual blocks.

Any `torch.nn.Module` can be a net. It is called with the state, and with the context as the second argument if there is
one and the net takes one. The constructor of a registered net has its JSON fields as annotated parameters. It may also
have ``in_shape`` and ``out_shape``, the shapes that it maps between, without the batch, and ``context_shape``, None if
the spec has no context; the builder fills these. It raises `ShapeError` for shapes that it cannot map.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .._torch import unwrapped
from ..bijection import Bijection
from ..context import Context, seen
from ..errors import InvflowError


@runtime_checkable
class Lipschitz(Protocol):
    """A net with a known Lipschitz constant, as `residual` requires."""

    def lipschitz_bound(self) -> float:
        """An upper bound of the net's Lipschitz constant for its current weights."""


@runtime_checkable
class Stepwise(Protocol):
    """A causal net that takes a few tokens at a time, as `transformer_autoregressive` uses it to be inverted faster."""

    def step(self, x: Tensor, context: Context, past: Any) -> tuple[Tensor, Any]:
        """The outputs for the tokens that come next, ``(batch, channels, tokens)``, and the past of those after them.

        Args:
            x: the tokens, ``(batch, channels, tokens)``.
            context: the context; None if there is none, or if the net takes none.
            past: what the step for the tokens before returned; None for the first.
        """


def takes_context(net: nn.Module) -> bool:
    """Whether a net is called with the context as the second argument.

    It is if its constructor has a parameter ``context_shape``, or if its ``forward`` has a second parameter that is
    named ``context`` or has no default, or takes ``*inputs``. For a wrapper, such as that of `torch.compile`, the
    module inside decides.

    Raises:
        InvflowError: ``forward`` has a parameter ``context`` that is not the second.
    """
    try:
        constructor = inspect.signature(type(net).__init__).parameters
        _, *parameters = inspect.signature(type(net).forward).parameters.values()
    except (AttributeError, TypeError, ValueError):  # a scripted module has no signature
        return True
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    named = any(one.name == "context" for one in parameters)
    if named and [one.name for one in positional[1:2]] != ["context"]:
        raise InvflowError(
            f"{type(net).__name__}: a net is called with the context as the second argument; make it the second "
            "parameter of forward"
        )
    needed = [one for one in positional if one.default is one.empty]
    any_number = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    if any_number and (inner := unwrapped(net)) is not net:
        return takes_context(inner)
    return "context_shape" in constructor or named or any_number or len(needed) > 1


def awaiting(net: nn.Module | None) -> list[Bijection]:
    """The bijections among the modules of a net that still have to be initialised."""
    modules = () if net is None else net.modules()
    return [layer for layer in modules if isinstance(layer, Bijection) and layer.awaits_data]


def _initialize_first(layer: Bijection, given: tuple[Any, ...]) -> None:
    layer.initialize(*given)


class Conditioned:
    """The base class, listed before `Bijection`, of bijections with a net in the attribute ``net``.

    Attributes:
        net: the net, which may be replaced.
        net_takes_context: see `takes_context`; set together with the net, because inspecting signatures is slow.
    """

    net: nn.Module
    net_takes_context: bool

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__setattr__ is not Conditioned.__setattr__:
            raise TypeError(f"{cls.__name__}: put Conditioned before the other base classes")

    @property
    def awaits_data(self) -> bool:
        """Whether the layer itself, or an actnorm in its net, still has to be initialised."""
        return super().awaits_data or bool(awaiting(self.net))  # type: ignore[misc]

    def initialize(self, x: Any, context: Context = None) -> None:
        """Initialises the layer, and the actnorms in its net from the numbers that reach them."""
        super().initialize(x, context)  # type: ignore[misc]
        if waiting := awaiting(self.net):
            hooks = [layer.register_forward_pre_hook(_initialize_first) for layer in waiting]
            try:
                with torch.no_grad():
                    self(x, context)  # type: ignore[operator]
            finally:
                for hook in hooks:
                    hook.remove()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "net":
            self.net_takes_context = value is not None and takes_context(value)

    def for_net(self, context: Context) -> Any:
        """What the net is given of the layer's context: its attribute ``sees`` of it, or all; None if it takes none."""
        return seen(context, getattr(self.net, "sees", ...)) if context is not None and self.net_takes_context else None

    def conditioned(self, a: Any, context: Context) -> Any:
        """``net(a)``, or ``net(a, context)`` if there is a context and the net takes one."""
        given = self.for_net(context)
        return self.net(a) if given is None else self.net(a, given)
