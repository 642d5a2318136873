"""A chain of bijections with a head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..arguments import one_line
from ..sequential import Sequential
from .heads import Head


class Classifier(nn.Module):
    """Class scores from the last state of a chain: ``logits = head(bijection(x))``.

    Args:
        bijection: the invertible trunk, a chain.
        head: maps the trunk's last state to logits of shape ``(batch, classes)``.

    Attributes:
        linear_head: whether the logits are a linear function of the features, so that the whole model is invertible
            up to its last linear layer.

    Examples:
        >>> import torch, invflow
        >>> model = Classifier(invflow.Sequential(), invflow.models.LinearHead(classes=3, shape=(4,)))
        >>> model(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, bijection: Sequential, head: nn.Module) -> None:
        super().__init__()
        self.bijection = bijection
        self.head = head

    @property
    def linear_head(self) -> bool:
        return isinstance(self.head, Head) and self.head.linear_in_features

    def __repr__(self) -> str:
        lines = [*repr(self.bijection).splitlines(), one_line(self.head)]
        return "\n".join(["Classifier(", *("  " + line for line in lines), ")"])

    def features(self, x: Any, context: Tensor | None = None) -> Any:
        """The state after the last invertible layer: what ``bijection.inverse`` turns back into ``x``."""
        return self.bijection(x, context)

    def inverse(self, features: Any, context: Tensor | None = None) -> Any:
        """The input that has these features."""
        return self.bijection.inverse(features, context)

    def forward(self, x: Any, context: Tensor | None = None) -> Tensor:
        """Logits, ``(batch, classes)``."""
        return self.head(self.features(x, context))  # type: ignore[no-any-return]
