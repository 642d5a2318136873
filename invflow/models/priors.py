"""Priors, distributions of the last state of a chain; and densities of pixels: dequantisation, bits per dimension."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from .._torch import Constants
from ..errors import ShapeError
from ..registry import register_prior
from ..state import Shape, State, TensorShape, flat_size, flatten, make_state, require_state


class Prior(nn.Module, ABC):
    """A distribution over states.

    Args:
        shape: the shape of the state, without the batch; a parameter of this name is filled when a spec is built, and
            so is ``context_shape``, the shape of the context or None.
    """

    takes_context: ClassVar[bool] = False
    """Whether `log_prob` and `sample` take the context, one row or one for each sample, as a further argument."""

    reparametrized: ClassVar[bool] = True
    """Whether samples are differentiable with respect to all parameters."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def log_prob(self, z: State) -> Tensor:
        """The log-density of each sample, in nats, ``(batch,)``; -inf outside the support."""

    @abstractmethod
    def sample(self, count: int, temperature: float = 1.0) -> State:
        """``count`` independent samples; a temperature below 1 draws them nearer to the most likely states."""


@register_prior("standard_normal")
class StandardNormal(Constants, Prior):
    """Independent standard normal numbers: ``log p(z) = -1/2 sum(z^2 + log 2 pi)``.

    Samples have the temperature as their standard deviation.

    Args:
        shape: the shape of the state, without the batch.

    Examples:
        >>> StandardNormal(shape=(2,)).log_prob(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    constants = ("origin",)
    saved = False
    origin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        # Samples take the device and the dtype of this tensor, which moves with the model.
        self.origin = self.made("origin")

    def made(self, name: str) -> Tensor:
        return torch.zeros(())

    def log_prob(self, z: State) -> Tensor:
        require_state("the standard_normal prior", self.shape, None, z)
        flat = flatten(z)
        if not flat.is_floating_point():
            raise ShapeError(f"the standard_normal prior expects floating-point states, got {flat.dtype}")
        squares = flat.square().sum(1)
        return -0.5 * (squares + flat_size(self.shape) * math.log(2 * math.pi))

    def sample(self, count: int, temperature: float = 1.0) -> State:
        def draw(leaf: TensorShape) -> Tensor:
            return temperature * torch.randn((count, *leaf), dtype=self.origin.dtype, device=self.origin.device)

        return make_state(draw, self.shape)


def dequantize(pixels: Tensor, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """``(k + u) / levels`` for pixels ``k / levels`` with integers k, and for each an independent uniform u in [0, 1).

    A density fitted to k alone could grow without bound on the grid. The mean of its logarithm over u is a lower bound
    of ``log P(k)``, where P is the probability that the density gives to the cells of the grid. Pixels off the grid,
    as augmentation makes them, are rounded to the nearest k first.

    Reference: Theis, van den Oord, Bethge: A note on the evaluation of generative models, 2015,
    https://arxiv.org/abs/1511.01844

    Args:
        pixels: ``k / levels``, of any shape.
        levels: the inverse of a grey level's width.
        generator: the generator for u; torch's global one by default.

    Examples:
        >>> x = dequantize(torch.tensor([0.0, 0.25, 0.75]), levels=4)
        >>> (x * 4).floor().tolist()
        [0.0, 1.0, 3.0]
    """
    # u is a multiple of 2^-24, so (k + u) / levels may round up to the next cell, at most to 1. That is harmless.
    noise = torch.rand(pixels.shape, dtype=pixels.dtype, device=pixels.device, generator=generator)
    return (torch.round(pixels * levels) + noise) / levels


def bits_per_dimension(log_prob: Tensor, dimensions: int, levels: int) -> Tensor:
    """``-log2 P / dimensions`` for the log-density of dequantised pixels ``(k + u) / levels``, in nats.

    A cell of the grid has volume ``levels ** -dimensions``, so that ``log P = log p - dimensions * log(levels)``.

    Args:
        log_prob: the log-density of the pixels in [0, 1), in nats, of any shape.
        dimensions: the number of numbers in a sample.
        levels: as in `dequantize`.

    Examples:
        >>> bits_per_dimension(torch.zeros(1), dimensions=784, levels=256)  # uniform: each pixel takes 8 bits
        tensor([8.])
    """
    return math.log2(levels) - log_prob / (dimensions * math.log(2))
