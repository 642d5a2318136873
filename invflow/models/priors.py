"""Priors: distributions of the last state of a chain."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ..registry import register_prior
from ..state import Shape, State, TensorShape, flat_size, flatten, make_state


class Prior(nn.Module, ABC):
    """A distribution over states."""

    @abstractmethod
    def log_prob(self, z: State) -> Tensor:
        """The log-density of each sample, in nats, ``(batch,)``."""

    @abstractmethod
    def sample(self, count: int, temperature: float = 1.0) -> State:
        """``count`` independent samples; a temperature below 1 draws them closer to what is most likely."""


@register_prior("standard_normal")
class StandardNormal(Prior):
    """Independent standard normal numbers: ``log p(z) = -1/2 sum(z^2 + log 2 pi)``.

    At another temperature samples have that standard deviation.

    Args:
        shape: the shape of the state, without the batch.

    Examples:
        >>> StandardNormal(shape=(2,)).log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    origin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        # Tells samples which device and dtype the model was moved to.
        self.register_buffer("origin", torch.zeros(()), persistent=False)

    def log_prob(self, z: State) -> Tensor:
        squares = flatten(z).square().sum(1)
        return -0.5 * (squares + flat_size(self.shape) * math.log(2 * math.pi))

    def sample(self, count: int, temperature: float = 1.0) -> State:
        def draw(leaf: TensorShape) -> Tensor:
            return temperature * torch.randn((count, *leaf), dtype=self.origin.dtype, device=self.origin.device)

        return make_state(draw, self.shape)
