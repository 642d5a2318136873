"""Densities of pixels: dequantisation, by uniform noise or by noise that a flow draws, and bits per dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..bijection import Bijection
from ..bijections.intervals import Sigmoid
from ..draws import drawn
from ..errors import InvflowError
from .priors import normal_log_prob


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
    noise = drawn(torch.rand, tuple(pixels.shape), dtype=pixels.dtype, device=pixels.device, generator=generator)
    return (torch.round(pixels * levels) + noise) / levels


class Dequantizer(nn.Module):
    """Noise u for pixels ``k / levels``, drawn by a flow that sees them: ``u = sigmoid(g(e; k / levels))``.

    e is standard normal. With the density p of ``(k + u) / levels``, the mean of ``log p - log q(u | k)`` is a lower
    bound of ``log P(k)``, up to the volume of a cell, as it is for uniform noise, whose ``log q`` is 0. It is the
    tighter, the nearer q is to p within the cell.

    Reference: Ho, Chen, Srinivas, Duan, Abbeel: Flow++, 2019, https://arxiv.org/abs/1902.00275

    Args:
        bijection: g, from and to images, whose context is the pixels.

    Raises:
        InvflowError: it is no bijection, or one of an interval.

    Examples:
        >>> from invflow.bijections import Affine
        >>> x, log_q = Dequantizer(Affine(shape=(1, 2, 2)))(torch.zeros(3, 1, 2, 2), levels=4)
        >>> bool((x >= 0).all() and (x <= 0.25).all()), log_q.shape
        (True, torch.Size([3]))
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise InvflowError(f"a dequantizer expects a bijection, got {type(bijection).__name__}")
        if bijection.domain != "reals" or not bijection.surjective:
            raise InvflowError(
                f"a dequantizer expects a bijection of the reals, which normal noise is, got {bijection}"
            )
        self.bijection = bijection

    def forward(self, pixels: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """``((k + u) / levels, log q(u | k))``, the second in nats, ``(batch,)``."""
        whole = torch.round(pixels * levels)
        noise = drawn(torch.randn, tuple(pixels.shape), dtype=pixels.dtype, device=pixels.device)
        v, log_det = self.bijection.forward_and_log_det(noise, whole / levels)
        u, of_sigmoid = Sigmoid().forward_and_log_det(v)
        zero = noise.new_zeros(())
        return (whole + u) / levels, normal_log_prob(noise.flatten(1), zero, zero) - log_det - of_sigmoid


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
