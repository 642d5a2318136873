"""Psi: the published formula, the measured vectors, and every kind of tensor."""

from __future__ import annotations

import itertools

import pytest
import torch

from invflow import ShapeError
from invflow.bijections import Psi

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def published(x, block_size):
    """The definition, as i-RevNet's authors wrote it."""
    batch, channels, height, width = x.shape
    bl, rows, columns = block_size, height // block_size, width // block_size
    blocks = x.reshape(batch, channels, rows, bl, columns, bl).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(batch, bl * bl * channels, rows, columns)


def numbered(channels, height, width, dtype):
    values = torch.arange(2 * channels * height * width).reshape(2, channels, height, width)
    return (values % 2 == 0) if dtype == torch.bool else values.to(dtype)


def test_the_measured_vectors():
    x = torch.arange(8).reshape(1, 2, 2, 2)
    assert Psi(2)(x).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert Psi(2, layout="channel")(x).flatten().tolist() == list(range(8))
    expected = [[[0, 2], [8, 10]], [[1, 3], [9, 11]], [[4, 6], [12, 14]], [[5, 7], [13, 15]]]
    assert Psi(2)(torch.arange(16).reshape(1, 1, 4, 4)).tolist() == [expected]


@pytest.mark.parametrize(("channels", "block_size"), list(itertools.product(range(1, 5), repeat=2)))
def test_equals_the_published_formula_for_every_dtype(channels, block_size):
    for dtype in DTYPES:
        x = numbered(channels, 2 * block_size, 3 * block_size, dtype)
        for laid_out in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().mT):
            y = Psi(block_size)(laid_out)
            assert y.dtype == dtype
            assert torch.equal(y, published(x, block_size))
            assert torch.equal(Psi(block_size).inverse(y), x)


@pytest.mark.parametrize("block_size", range(1, 5))
def test_the_channel_layout_is_pixel_unshuffle(block_size):
    x = torch.randn(2, 3, 2 * block_size, 3 * block_size)
    psi = Psi(block_size, layout="channel")
    assert torch.equal(psi(x), torch.nn.functional.pixel_unshuffle(x, block_size))
    assert torch.equal(psi.inverse(psi(x)), x)


def test_sequences_by_hand():
    x = torch.tensor([[[0, 1, 2, 3], [10, 11, 12, 13]]])
    assert Psi(2)(x).tolist() == [[[0, 2], [10, 12], [1, 3], [11, 13]]]
    assert Psi(2, layout="channel")(x).tolist() == [[[0, 2], [1, 3], [10, 12], [11, 13]]]


def test_volumes_by_hand():
    x = torch.arange(16).reshape(1, 1, 2, 2, 4)  # x[0, 0, i, j, k] = 8 i + 4 j + k
    expected = [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert Psi(2)(x).reshape(8, 2).tolist() == expected
    two = torch.cat([x, x + 100], 1)
    assert Psi(2)(two)[0, :, 0, 0, 0].tolist() == [0, 100, 1, 101, 4, 104, 5, 105, 8, 108, 9, 109, 12, 112, 13, 113]
    assert Psi(2, layout="channel")(two)[0, :, 0, 0, 0].tolist() == [
        *[0, 1, 4, 5, 8, 9, 12, 13],
        *[100, 101, 104, 105, 108, 109, 112, 113],
    ]


@pytest.mark.parametrize("layout", ["block", "channel"])
@pytest.mark.parametrize("sides", [(6,), (4, 6), (2, 4, 6)])
def test_a_channel_holds_one_place_of_every_block(layout, sides):
    """The definition, number by number, for any number of positions."""
    x = torch.arange(3 * torch.Size(sides).numel()).reshape(1, 3, *sides)
    y, count = Psi(2, layout=layout)(x), 2 ** len(sides)
    for place in itertools.product(range(2), repeat=len(sides)):
        index = sum(bit * 2 ** (len(sides) - 1 - i) for i, bit in enumerate(place))
        every = x[(slice(None), slice(None), *(slice(start, None, 2) for start in place))]
        for c in range(3):
            channel = index * 3 + c if layout == "block" else c * count + index
            assert torch.equal(y[:, channel], every[:, c])
    assert torch.equal(Psi(2, layout=layout).inverse(y), x)


@pytest.mark.parametrize("layout", ["block", "channel"])
def test_carries_nan_and_infinity(layout):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]).reshape(1, 1, 2, 2)
    psi = Psi(2, layout=layout)
    back = psi.inverse(psi(x))
    assert torch.equal(back.view(torch.int32), x.view(torch.int32)), "not the same bits"


@pytest.mark.parametrize("layout", ["block", "channel"])
def test_saves_nothing_for_backward(layout):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        Psi(2, layout=layout)(torch.randn(2, 3, 4, 4, requires_grad=True)).sum()
    assert saved == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Psi(3)(torch.zeros(1, 1, 28, 28)), "that 3 divides, got 28 x 28"),
        (lambda: Psi(3)(torch.zeros(1, 1, 28)), "expects a length that 3 divides, got 28"),
        (lambda: Psi(2)(torch.zeros(1, 1, 2, 3, 4)), "a depth, a height and a width that 2 divides, got 2 x 3 x 4"),
        (lambda: Psi(2).inverse(torch.zeros(1, 6, 4, 4)), "channels that 4 divides, got 6"),
        (lambda: Psi(2).inverse(torch.zeros(1, 4, 4, 4, 4)), "channels that 8 divides, got 4"),
        (
            lambda: Psi(2)(torch.zeros(4, 4)),
            r"psi expects a shape \(channels, length\), .* besides the batch, got \(4,\)",
        ),
        (lambda: Psi(2).output_shape(((1, 4, 4), (1, 4, 4))), "one tensor, got a tuple state"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(ShapeError, match=message):
        call()
