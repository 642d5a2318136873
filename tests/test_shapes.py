"""Layers that move numbers, and injections: every layout by hand, every dtype, every bit."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow import InvflowError, ShapeError
from invflow.bijections import Checkerboard, Duplicate, Flatten, Inverse, Pad, Permute, Reshape, Stripes, Transpose
from invflow.state import leaves, shape_of

from .authors import spec_of
from .test_psi import DTYPES

MOVERS = {
    "checkerboard": (Checkerboard(), (3, 4, 6)),
    "odd squares first": (Checkerboard(first="odd"), (2, 5, 2)),
    "checkerboard of a volume": (Checkerboard(), (2, 3, 3, 4)),
    "stripes": (Stripes(), (2, 5, 3)),
    "columns": (Stripes(dim=3, first="odd"), (2, 3, 4)),
    "channels": (Stripes(dim=1), (5, 2, 3)),
    "flatten": (Flatten(shape=(2, 3, 4)), (2, 3, 4)),
    "reshape": (Reshape(to=[4, -1], shape=(2, 3, 4)), (2, 3, 4)),
    "transpose": (Transpose(order=[3, 1, 2]), (2, 3, 4)),
    "reverse": (Permute(order="reverse", shape=(5, 2, 2)), (5, 2, 2)),
    "swap": (Permute(order="swap", shape=(5, 2, 2)), (5, 2, 2)),
    "pad": (Pad(channels=2), (3, 2, 2)),
    "duplicate": (Duplicate(), (3, 2, 2)),
}


@pytest.mark.parametrize("name", MOVERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_layout_comes_back_bit_by_bit(name, dtype):
    layer, shape = MOVERS[name]
    x = torch.arange(2 * torch.Size(shape).numel()).reshape(2, *shape)
    x = (x % 3 == 0) if dtype == torch.bool else x.to(dtype)
    for laid_out in (
        x,
        x.mT.contiguous().mT,
        *([x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else []),
    ):
        y = layer(laid_out)
        assert all(leaf.dtype == dtype for leaf in leaves(y))
        assert shape_of(y) == layer.output_shape(shape)
        assert torch.equal(layer.inverse(y), x)


@pytest.mark.parametrize("name", MOVERS)
def test_nan_and_infinity_are_numbers_too(name):
    layer, shape = MOVERS[name]
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]).repeat(30)[: torch.Size(shape).numel()]
    x = x.reshape(1, *shape)
    assert torch.equal(layer.inverse(layer(x)).view(torch.int32), x.view(torch.int32)), "not the same bits"


@pytest.mark.parametrize("name", [name for name, (layer, _) in MOVERS.items() if not isinstance(layer, Permute)])
def test_nothing_is_saved_for_backward(name):
    layer, shape = MOVERS[name]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(torch.randn(2, *shape, requires_grad=True))
        layer.inverse(y)
    assert saved == []


class TestCheckerboard:
    def test_a_board_by_hand(self):
        board = torch.arange(12).reshape(1, 1, 3, 4)
        black, white = Checkerboard()(board)
        assert black.tolist() == [[[[0, 2], [5, 7], [8, 10]]]]
        assert white.tolist() == [[[[1, 3], [4, 6], [9, 11]]]]
        for one, other in zip(Checkerboard(first="odd")(board), (white, black), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("shape", [(2, 6), (2, 3, 4), (1, 4, 4), (1, 1, 2), (2, 3, 2, 4), (1, 4, 5, 2)])
    def test_the_halves_are_the_positions_of_each_parity_in_order(self, shape):
        x = torch.arange(torch.Size(shape).numel()).reshape(1, *shape)
        indices = torch.meshgrid(*map(torch.arange, shape[1:]), indexing="ij")
        parity = sum(indices) % 2
        for wanted, half in enumerate(Checkerboard()(x)):
            assert torch.equal(half.flatten(2), x[:, :, parity == wanted])

    def test_couplings_follow_and_the_inverse_puts_the_image_together(self):
        coupling = {"type": "affine_coupling", "net": {"type": "conv", "hidden": [4]}}
        back = {"type": "inverse", "layer": {"type": "checkerboard"}}
        chain = invflow.build(spec_of({"type": "checkerboard"}, coupling, coupling, back, shape=(3, 8, 8))).double()
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        assert chain.output_shape((3, 8, 8)) == (3, 8, 8)
        torch.testing.assert_close(chain.inverse(chain(x)), x, atol=1e-12, rtol=0)

    def test_a_pair_of_other_halves_is_refused(self):
        with pytest.raises(ShapeError, match="expects the halves of one tensor, that of even indices first"):
            Checkerboard().inverse((torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3)))


class TestStripes:
    def test_rows_columns_and_channels(self):
        x = torch.arange(2 * 3 * 4).reshape(1, 2, 3, 4)
        for dim, parts in {
            1: (x[:, :1], x[:, 1:]),
            2: (x[:, :, [0, 2]], x[:, :, [1]]),
            3: (x[..., ::2], x[..., 1::2]),
        }.items():
            found = Stripes(dim=dim)(x)
            assert all(torch.equal(one, other) for one, other in zip(found, parts, strict=True))
            swapped = Stripes(dim=dim, first="odd")(x)
            assert all(torch.equal(one, other) for one, other in zip(swapped, parts[::-1], strict=True))

    def test_nice_takes_even_features_first(self):
        even, odd = Stripes(dim=1)(torch.arange(7)[None])
        assert (even.tolist(), odd.tolist()) == ([[0, 2, 4, 6]], [[1, 3, 5]])

    def test_after_one_coupling_the_odd_ones_are_first(self):
        exchanged = torch.tensor([[1, 3]]), torch.tensor([[0, 2, 4]])
        assert Stripes(dim=1, first="odd").inverse(exchanged).tolist() == [[0, 1, 2, 3, 4]]
        with pytest.raises(ShapeError, match=r"that of even indices first, got \(\(2,\), \(3,\)\)"):
            Stripes(dim=1).inverse(exchanged)


class TestReshape:
    def test_numbers_keep_their_order(self):
        x = torch.arange(24).reshape(1, 2, 3, 4)
        assert Flatten(shape=(2, 3, 4))(x).tolist() == [list(range(24))]
        assert torch.equal(Reshape(to=[6, -1], shape=(2, 3, 4))(x), x.reshape(1, 6, 4))

    def test_transpose_by_hand(self):
        x = torch.arange(24).reshape(1, 2, 3, 4)
        assert torch.equal(Transpose(order=[3, 1, 2])(x), x.permute(0, 3, 1, 2))
        assert Transpose(order=[3, 1, 2])(x)[0, 1, 1, 2] == x[0, 1, 2, 1]

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: Reshape(to=[5], shape=(4,)), r"reshape to \[5\] expects as many numbers in the state, got \(4,\)"),
            (lambda: Reshape(to=[3, -1], shape=(4,)), r"as many numbers in the state, got \(4,\)"),
            (lambda: Reshape(to=[8, -1], shape=(4,)), r"as many numbers in the state, got \(4,\)"),
            (lambda: Reshape(to=[-1, -1], shape=(4,)), "at most one of them -1"),
            (lambda: Reshape(to=[2, 2], shape=(4,))(torch.zeros(1, 2, 2)), r"the shape \(4,\) that it was built for"),
            (lambda: Reshape(to=[2, 2], shape=(4,)).inverse(torch.zeros(1, 4)), r"the shape \(2, 2\), got \(4,\)"),
            (lambda: Flatten(shape=((2,), (2,))), "one tensor, got a tuple state"),
            (lambda: Transpose(order=[1, 3]), "each of 1 .. 2 once"),
        ],
    )
    def test_refuses_what_does_not_fit(self, call, message):
        with pytest.raises(InvflowError, match=message):
            call()


class TestPermute:
    @pytest.mark.parametrize("channels", [1, 2, 5, 6])
    def test_named_orders(self, channels):
        x = torch.arange(channels)[None]
        half = channels // 2
        assert torch.equal(Permute(order="reverse", shape=(channels,))(x), x.flip(1))
        assert torch.equal(Permute(order="swap", shape=(channels,))(x), torch.cat([x[:, half:], x[:, :half]], 1))

    def test_a_name_needs_the_shape(self):
        with pytest.raises(InvflowError, match=r"the incoming shape too: Permute\(order='swap', shape="):
            Permute(order="swap")

    def test_a_name_is_written_as_it_was_read(self):
        chain = invflow.build(spec_of({"type": "permute", "order": "reverse"}))
        assert invflow.to_spec(chain)["layers"] == [{"type": "permute", "order": "reverse"}]
        assert chain.state_dict()["layers.0.order"].tolist() == [3, 2, 1, 0]


class TestInjections:
    def test_pad_is_the_padding_of_i_revnet(self):
        x = torch.randn(2, 3, 4, 4)
        published = torch.nn.functional.pad(x.permute(0, 2, 1, 3), (0, 0, 0, 29)).permute(0, 2, 1, 3)
        assert torch.equal(Pad(channels=29)(x), published)
        with pytest.raises(ShapeError, match=r"more than 2 channels, got \(2, 4\)"):
            Pad(channels=2).inverse(torch.zeros(1, 2, 4))

    def test_two_streams_of_a_reversible_transformer(self):
        """`Y1 = X1 + F(X2), Y2 = X2 + G(Y1)` from the same x twice, as two couplings that exchange their halves."""
        net = {"type": "mlp", "hidden": [4]}
        layers = [{"type": "duplicate"}, *[{"type": "additive_coupling", "net": net}] * 2]
        chain = invflow.build(spec_of(*layers, shape=(6,), numerics={"mode": "grid"})).eval()
        x = torch.randint(256, (8, 6)) / 256
        first, second = chain[1].net, chain[2].net
        y1 = x + first(x)
        for found, right in zip(chain(x), (x + second(y1), y1), strict=True):
            torch.testing.assert_close(found, right, atol=1e-4, rtol=0)  # the grid's step is 2^-16
        assert torch.equal(chain.inverse(chain(x)), x)

    def test_an_overflow_does_not_lose_what_was_duplicated(self):
        x = torch.full((1, 2), torch.finfo(torch.float32).max)
        assert torch.equal(Duplicate().inverse(Duplicate()(x)), x)

    def test_they_cannot_be_run_backwards(self):
        for layer in (Pad(channels=1), Duplicate()):
            with pytest.raises(ShapeError, match="cannot be run backwards: it adds dimensions"):
                Inverse(layer)
