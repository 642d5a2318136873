"""The contract of parts, of which the net `stack` consists."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

from torch import nn

from .arguments import one_line
from .errors import InvflowError
from .state import TensorShape

Made: TypeAlias = tuple[nn.Module, TensorShape]
"""A module, and the shape that it returns."""


class Part(ABC):
    """A step of a `stack`: the description of a module, which is made for the shape that reaches it.

    A subclass overrides `make`, and says whether it `chooses` the shape that it returns, and what `obstacle` it is.
    Its JSON fields are the annotated parameters of its constructor.

    Examples:
        >>> import torch
        >>> class Swish(Part):
        ...     def make(self, shape, wanted):
        ...         return torch.nn.Hardswish(), shape
        >>> Swish().make((3, 8, 8), None)
        (Hardswish(), (3, 8, 8))
    """

    tag: ClassVar[str]
    """The name in specs and messages, set by `register_part`; the class's name if it is not registered."""

    chooses: ClassVar[bool] = False
    """Whether it can return any number of channels: the last such part of a net returns those that the net must."""

    keeps_zero: ClassVar[bool] = False
    """Whether it maps 0 to 0 with a slope, so that a net that ends with it can start at zero before it."""

    @abstractmethod
    def make(self, shape: TensorShape, wanted: TensorShape | None) -> Made:
        """The module for an input of this shape, without the batch.

        Args:
            shape: the shape of the input, channels first.
            wanted: the shape that the net must return, for the last part that chooses; None for all others.

        Raises:
            ShapeError: the part does not take this shape.
        """

    @property
    def obstacle(self) -> str | None:
        """Why a net with this part cannot be converted for `exact` numerics; None if it can be."""
        return f"its net's {self.tag} is computed in real numbers"

    def start_at_zero(self, module: nn.Module) -> None:
        """Lets a module that this part made return 0 until it is trained.

        Raises:
            InvflowError: it cannot.
        """
        raise InvflowError(
            f"zero_last expects a convolution or a linear layer at the end of the net, got {self.tag}; behind an "
            "activation, zeros may get no gradient"
        )

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.tag = cls.__name__

    def __repr__(self) -> str:
        """The class with the arguments it was constructed with, on one line."""
        return one_line(self)
