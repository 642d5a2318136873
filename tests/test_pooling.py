"""Parts that change shapes without weights, and the head that is made of parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import invflow
from invflow import ShapeError, SpecError
from invflow.models import StackHead
from invflow.nets import Stack
from invflow.nets.layers import Convolution, Linear
from invflow.nets.pooling import AveragePool, MaxPool, Mean, PadChannels

HEAD = {"type": "stack", "classes": 3, "parts": [{"type": t} for t in ("batch_norm", "relu", "mean", "linear")]}


@pytest.mark.parametrize("positions", [(7,), (7, 6), (7, 6, 5)])
@pytest.mark.parametrize(("size", "stride"), [(2, None), (3, 2), (3, 1)])
def test_pools_are_those_of_pytorch(positions, size, stride):
    x = torch.randn(2, 3, *positions)
    for part, name in ((AveragePool, "avg"), (MaxPool, "max")):
        module, made = part(size, stride).make((3, *positions), None)
        expected = getattr(functional, f"{name}_pool{len(positions)}d")(x, size, stride)
        assert torch.equal(module(x), expected)
        assert (2, *made) == expected.shape


@pytest.mark.parametrize(("added", "expected"), [(2, [0, 1, 2, 0]), (3, [0, 1, 2, 0, 0]), (1, [1, 2, 0])])
def test_zeros_on_both_sides(added, expected):
    for rest in ((), (1,), (1, 1)):
        module, made = PadChannels(added).make((2, *rest), None)
        assert module(torch.tensor([[1.0, 2.0]]).reshape(1, 2, *rest)).flatten().tolist() == expected
        assert made == (2 + added, *rest)


def test_a_net_that_ends_with_zeros_can_start_at_zero():
    net = Stack(Convolution(4), PadChannels(2), in_shape=(2, 3), out_shape=(6, 3), zero_last=True)
    assert not net(torch.randn(2, 2, 3)).any()


@pytest.mark.parametrize("positions", [(5,), (3, 5), (2, 3, 5)])
def test_the_mean_of_all_positions(positions):
    x = torch.randn(2, 4, *positions, dtype=torch.float64)
    assert torch.allclose(Mean().make((4, *positions), None)[0](x), x.flatten(2).mean(2), rtol=0, atol=1e-15)


def test_what_does_not_fit():
    with pytest.raises(
        ShapeError, match=r"^average_pool expects at least 3 positions in every dimension, got \(2, 2, 5\)"
    ):
        AveragePool(3).make((2, 2, 5), None)
    with pytest.raises(ShapeError, match=r"^mean expects a shape \(channels, length\)"):
        Mean().make((2,), None)


class TestHead:
    """A head made of parts."""

    def document(self, **head):
        layers = [{"type": "split"}, {"type": "additive_coupling", "net": {"type": "conv"}}]
        return {"input": {"shape": [4, 5, 5]}, "layers": layers, "head": {**HEAD, **head}}

    def test_its_logits_are_those_of_its_parts(self):
        model = invflow.build_model(self.document()).eval()
        norm, linear = (next(m for m in model.head.modules() if isinstance(m, t)) for t in (nn.BatchNorm2d, nn.Linear))
        nn.init.normal_(norm.running_mean)
        x = torch.randn(2, 4, 5, 5)
        state = torch.cat(model.features(x), dim=1)
        assert torch.equal(model(x), linear(functional.avg_pool2d(norm(state).relu(), 5).flatten(1)))
        assert not model.linear_head
        assert "because the head has layers of its own" in model.caveat

    def test_a_spec_comes_back(self):
        model = invflow.build_model(self.document())
        assert invflow.to_spec(model)["head"] == HEAD
        assert [tuple(p.shape) for p in model.head.parameters()] == [(4,), (4,), (3, 4), (3,)]

    @pytest.mark.parametrize(
        ("parts", "line"),
        [
            (
                [{"type": "linear"}],
                r"^head: the stack head must return \(3,\), one logit a class, but returns \(3, 5, 5\)",
            ),
            ([{"type": "mean"}], r"^head: the stack head must return \(3,\), one logit a class, but returns \(4,\)"),
            ([{"type": "mean"}, {"type": "conv"}], r"^head.parts.1: conv expects a shape \(channels, length\)"),
            ([{"type": "meen"}], r"^head.parts.0: unknown part type 'meen'; did you mean 'mean'"),
        ],
    )
    def test_what_does_not_fit_has_its_place(self, parts, line):
        with pytest.raises(SpecError, match=line):
            invflow.build_model(self.document(parts=parts))

    def test_it_refuses_another_state(self):
        head = StackHead(Mean(), Linear(), classes=2, shape=(4, 5, 5))
        with pytest.raises(ShapeError, match=r"^the stack head expects"):
            head(torch.zeros(1, 4, 6, 6))
        with pytest.raises(
            ShapeError, match=r"tuple of tensors of equal positions, got \(\(1, 2\), \(1, 3\)\); merge them"
        ):
            StackHead(Mean(), Linear(), classes=2, shape=((1, 2), (1, 3)))
