"""Conditioners and heads: shapes, parameter counts, context, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import invflow
from invflow import Classifier, ShapeError
from invflow.models import ConvNetHead, LinearHead
from invflow.nets import MLP, Conv


def kinds(net):
    return [type(layer).__name__ for layer in net]


def test_conv_puts_norm_and_activation_after_each_convolution_but_the_last():
    shape = (4, 5, 5)
    assert kinds(Conv(shape, shape)) == ["Conv2d"]
    assert kinds(Conv(shape, shape, hidden=[3], norm="batch")) == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    assert kinds(Conv(shape, shape, final_activation=True, activation="tanh")) == ["Conv2d", "Tanh"]


@pytest.mark.parametrize("context_shape", [(2,), (2, 5, 4)])
def test_context_enters_both_nets(context_shape):
    x, context = torch.randn(3, 4, 5, 4), torch.randn(3, *context_shape)
    for make in (Conv, MLP):
        net = make((4, 5, 4), (6, 5, 4), context_shape)
        assert net(x, context).shape == (3, 6, 5, 4)
        assert not torch.equal(net(x, context), net(x, context + 1))
        with pytest.raises(ShapeError, match="expects a context of shape"):
            net(x)
        with pytest.raises(ShapeError, match="built without a context"):
            make((4, 5, 4), (6, 5, 4))(x, context)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Conv((4, 5, 5), (4, 5, 5), kernel_size=2), "kernel_size: input should be odd"),
        (lambda: Conv((4, 5, 5), (4, 4, 4)), r"must map \(4, 5, 5\) to \(4, 4, 4\), but returns \(4, 5, 5\)"),
        (lambda: Conv((4,), (4,)), r"expects a shape \(channels, length\), \(channels, height, width\) or"),
        (lambda: Conv((4, 5, 5), (4, 5, 5), (1, 3, 3)), "expects a context"),
        (lambda: Conv((4, 5, 5), (4, 5, 5), hidden=[0]), "hidden.0: input should be greater than 0"),
        (lambda: ConvNetHead(10, [4], shape=(4,)), "convnet head expects"),
        (lambda: LinearHead(1, shape=(4,)), "classes: input should be greater than or equal to 2"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_heads_take_tuple_states():
    state = (torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4))
    shape = ((3, 4, 4), (5, 4, 4))
    assert LinearHead(10, shape=shape)(state).shape == (2, 10)
    assert ConvNetHead(10, [6, 7], shape=shape)(state).shape == (2, 10)


def test_classifier_separates_features_from_logits():
    model = Classifier(invflow.Sequential(invflow.bijections.Psi(2)), LinearHead(10, shape=(4, 2, 2)))
    x = torch.randn(3, 1, 4, 4)
    assert torch.equal(model.head(model.features(x)), model(x))
    assert torch.equal(model.bijection.inverse(model.features(x)), x)
    assert model.linear_head
    assert not Classifier(invflow.Sequential(), ConvNetHead(10, [4], shape=(1, 4, 4))).linear_head

    class Deeper(type(model.head)):  # may add layers, so that it has to declare itself linear again
        pass

    assert not Classifier(invflow.Sequential(), Deeper(10, shape=(4,))).linear_head


def test_a_hand_written_net_gets_the_context_only_where_there_is_one():
    calls = []

    class Spy(nn.Module):
        def forward(self, *inputs):
            calls.append(len(inputs))
            return torch.zeros_like(inputs[0])

    coupling = invflow.bijections.AdditiveCoupling(Spy())
    pair = (torch.zeros(1, 2), torch.zeros(1, 2))
    coupling(pair)
    coupling(pair, torch.zeros(1, 1))
    assert calls == [1, 2]
