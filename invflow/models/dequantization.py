"""Densities of pixels: dequantisation, bits per dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
