"""Bijections that promise to be exact, but are not."""

from __future__ import annotations

import torch
from torch import nn

from invflow.bijections import AdditiveCoupling
from invflow.nets import Conv
from invflow.numerics import NONE, Exact, Grid
from invflow.numerics.integer import FixedPoint, Quantize, Requantize

from .base import fault

IMAGES = ((2, 8, 8), (2, 8, 8))
SHAPE = (2, 8, 8)
EXACT = Exact(mode="exact", frac_bits=16)


class Claims(AdditiveCoupling):
    """Promises to be exact, whatever its net."""

    @property
    def limit(self):
        return NONE

    @property
    def exactness(self):
        return "exact"

    def set_numerics(self, numerics):
        self.numerics = numerics


def spread(net):
    """The net with weights large enough for its sums to round."""
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(5)
    return net


@fault("order free", IMAGES)
class SigmoidInExactConditioner(Claims):
    """A conditioner in exact numerics ends in a sigmoid of real numbers."""

    def __init__(self):
        super().__init__(spread(Conv(SHAPE, SHAPE, hidden=[4], activation="sigmoid")))
        self.numerics = Grid(mode="grid", frac_bits=18)


@fault("order free", IMAGES)
class RealConvolution(Claims):
    """A conditioner in exact numerics sums real weights."""

    def __init__(self):
        super().__init__(spread(Conv(SHAPE, SHAPE, hidden=[8])))
        self.numerics = Grid(mode="grid", frac_bits=18)


class Unproved(FixedPoint):
    def prove(self):
        """Accepts any weights."""


def integer_net(layer):
    """Ten bits in, one layer, steps of the grid out."""
    return nn.Sequential(Quantize(torch.tensor(2.0**8), 1023), layer, Requantize(None, None))


@fault("order free", IMAGES)
class WrongBound(AdditiveCoupling):
    """The weights of an order-free net are larger than its bound allows."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randint(-(2**15), 2**15, (2, 2, 3, 3), generator=generator) * 2.0**-12
        shift = torch.full((2,), 12)
        layer = Unproved(weight, torch.zeros(2), shift, 1023, nn.Conv2d(2, 2, 3, padding=1))
        super().__init__(integer_net(layer))
        self.set_numerics(EXACT)


class Winograd(nn.Module):
    """A 3x3 convolution by the fast algorithm F(4x4, 3x3), whose transforms contain sixths and twenty-fourths."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)
        rows = [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]
        self.register_buffer("g", torch.tensor(rows, dtype=torch.float64) / 24)
        self.register_buffer(
            "b",
            torch.tensor(
                [
                    [4, 0, -5, 0, 1, 0],
                    [0, -4, -4, 1, 1, 0],
                    [0, 4, -4, -1, 1, 0],
                    [0, -2, -1, 2, 1, 0],
                    [0, 2, -1, -2, 1, 0],
                    [0, 4, 0, -5, 0, 1],
                ],
                dtype=torch.float64,
            ),
        )
        self.register_buffer(
            "a",
            torch.tensor(
                [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
                dtype=torch.float64,
            ),
        )

    def forward(self, q):
        g, b, a = (matrix.to(q.dtype) for matrix in (self.g, self.b, self.a))
        height, width = q.shape[2:]
        down, right = (-height) % 4, (-width) % 4
        padded = nn.functional.pad(q, (1, 1 + right, 1, 1 + down))
        tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # (batch, channels, rows, columns, 6, 6)
        kernels = torch.einsum("xi,ocij,yj->ocxy", g, self.weight.to(q.dtype), g)
        inputs = torch.einsum("xi,ncrsij,yj->ncrsxy", b, tiles, b)
        made = torch.einsum("ocxy,ncrsxy->norsxy", kernels, inputs)
        found = torch.einsum("ix,norsxy,jy->norisj", a, made, a)
        return found.reshape(*found.shape[:2], height + down, width + right)[:, :, :height, :width]


def integer_weights():
    """Integers whose sums nearly reach the bound of 2^24."""
    return torch.randint(-800, 801, (2, 2, 3, 3), generator=torch.Generator().manual_seed(1)).float()


@fault("order free", IMAGES)
class WinogradKernel(AdditiveCoupling):
    """The convolution of an order-free net is computed by Winograd's algorithm."""

    def __init__(self):
        super().__init__(integer_net(Winograd(integer_weights() / 256)))
        self.set_numerics(EXACT)


def honest():
    """The sound coupling that the Winograd kernel is planted in."""
    weight = integer_weights()
    layer = FixedPoint(weight / 256, torch.zeros(2), torch.full((2,), 8), 1023, nn.Conv2d(2, 2, 3, padding=1))
    coupling = AdditiveCoupling(integer_net(layer))
    coupling.set_numerics(EXACT)
    return coupling


class OffGrid(Grid):
    """Adds the output of a net without rounding it."""

    def _steps(self, made, dtype):
        return made * 2.0**self.frac_bits


@fault("round trip", IMAGES)
class OffTheGrid(AdditiveCoupling):
    """A coupling on a grid adds the output of its net without rounding it."""

    def __init__(self):
        super().__init__(Conv(SHAPE, SHAPE))
        self.set_numerics(OffGrid(mode="grid"))
