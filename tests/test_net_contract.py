"""The contract of nets: shapes, context, and what a layer with a net may require."""

from __future__ import annotations

import pytest
import torch
from pydantic import PositiveInt
from torch import nn

import invflow
from invflow import Bijection, SpecError, registry
from invflow.bijections import AdditiveCoupling
from invflow.nets import MLP, Conditioned, takes_context
from invflow.testing import property_tests

from .authors import Doubling, spec_of

pytestmark = pytest.mark.usefixtures("forget_what_a_test_registers")


class TestNets:
    def test_a_layer_with_a_net_and_nothing_else(self):
        @invflow.register("acme.gated")
        class Gated(Bijection):
            """``y = x``; the net is called and its output ignored.

            Args:
                net: any.
            """

            volume_preserving = True
            examples = [({"net": {"type": "mlp"}}, (3,))]

            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            def forward(self, x, context=None):
                self.net(x)
                return x

            def inverse(self, y, context=None):
                return y

        chain = invflow.build(spec_of({"type": "acme.gated", "net": {"type": "mlp", "hidden": [5]}}))
        assert [tuple(weight.shape) for weight in chain.parameters()] == [(5, 4), (5,), (4, 5), (4,)]

    def test_net_shapes_see_the_fields(self):
        @invflow.register("acme.bins")
        class Binned(Doubling):
            """``y = 2 x``, with a net that returns several numbers for each number of x.

            Args:
                net: the conditioner.
                bins: the number of outputs for each number of x.
            """

            def __init__(self, net: nn.Module, bins: PositiveInt = 3) -> None:
                super().__init__()
                self.net = net

            @classmethod
            def net_shapes(cls, shape, fields):
                return {"net": (shape, (fields["bins"] * shape[0], *shape[1:]))}

        for bins, expected in (({}, 12), ({"bins": 5}, 20)):
            chain = invflow.build(spec_of({"type": "acme.bins", "net": {"type": "mlp"}, **bins}))
            assert chain[0].net(torch.zeros(1, 4)).shape == (1, expected)

    def test_net_shapes_of_what_is_no_net(self):
        @invflow.register("acme.misspelt")
        class Misspelt(Doubling):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()

            @classmethod
            def net_shapes(cls, shape, fields):
                return {"nte": (shape, shape)}

        with pytest.raises(SpecError, match=r"layers.0: net_shapes of acme.misspelt names 'nte', which is not one"):
            invflow.build(spec_of({"type": "acme.misspelt", "net": {"type": "mlp"}}))

    def test_a_net_without_context_in_a_spec_with_one(self):
        @invflow.register_net("acme.triple")
        class Triple(nn.Module):
            def __init__(self, in_shape: tuple[int, ...]) -> None:
                super().__init__()

            def forward(self, a):
                return 3 * a

        document = {
            "input": {"shape": [4], "context_shape": [2]},
            "layers": [
                {"type": "split"},
                {"type": "additive_coupling", "net": {"type": "acme.triple"}},
                {"type": "merge"},
            ],
        }
        chain = invflow.build(document)
        x, context = torch.randn(3, 4), torch.randn(3, 2)
        y = chain(x, context)
        torch.testing.assert_close(chain.inverse(y, context), x)
        with pytest.raises(invflow.ShapeError, match=r"expects a context of shape \(2,\), got none"):
            chain(x)

    def test_which_nets_take_a_context(self):
        class Masked(nn.Module):
            def forward(self, x, mask=None):
                return x

        class Needing(nn.Module):
            def forward(self, x, y):
                return x + y

        class Optional(nn.Module):
            def forward(self, x, context=None):
                return x

        class Any(nn.Module):
            def forward(self, *inputs):
                return inputs[0]

        class Built(nn.Module):
            def __init__(self, context_shape=None):
                super().__init__()

        nets = (nn.Linear(2, 2), nn.Sequential(), Masked(), Needing(), Optional(), Any(), Built(), MLP((2,), (2,)))
        assert [takes_context(net) for net in nets] == [False, False, False, True, True, True, True, True]

    def test_a_context_in_another_place_is_refused(self):
        class Late(nn.Module):
            def forward(self, a, weight=None, context=None):
                return a

        with pytest.raises(ValueError, match="Late: a net is called with the context as the second argument"):
            AdditiveCoupling(Late())

    def test_what_wraps_a_net_is_looked_through(self):
        inner = nn.Linear(2, 2)
        pair, context = (torch.randn(3, 2), torch.randn(3, 2)), torch.randn(3, 1)
        for net in (torch.compile(inner, backend="eager"), nn.DataParallel(inner)):
            assert not takes_context(net)
            torch.testing.assert_close(AdditiveCoupling(net)(pair, context), AdditiveCoupling(inner)(pair))

    def test_conditioned_comes_first(self):
        with pytest.raises(TypeError, match="Wrong: put Conditioned before the other base classes"):

            class Wrong(Bijection, Conditioned):
                pass

    def test_a_net_that_maps_to_another_shape_is_refused_at_its_place(self):
        @invflow.register_net("acme.same")
        class Same(nn.Module):
            def __init__(self, in_shape: tuple[int, ...]) -> None:
                super().__init__()

            def forward(self, a):
                return a

        coupling = {"type": "additive_coupling", "net": {"type": "acme.same"}}
        with pytest.raises(SpecError, match=r"layers.1.net: acme.same must map \(2,\) to \(3,\), but returns \(2,\)"):
            invflow.build(spec_of({"type": "split"}, coupling, shape=(5,)))

    def test_registering_a_net_breaks_no_property_tests(self):
        @invflow.register_net("acme.odd")
        class Odd(nn.Module):
            """Fits few layers, and takes no context."""

            def __init__(self, in_shape: tuple[int, ...]) -> None:
                super().__init__()

            def forward(self, a):
                return a.flatten(2).cumsum(2).reshape(a.shape)

        property_tests("additive_coupling", "affine_coupling")("additive_coupling")

    @pytest.mark.parametrize("tag", ["conv", "mlp", "lipschitz_conv", "lipschitz_mlp"])
    def test_a_last_layer_that_starts_at_zero(self, tag):
        shape = (2, 5, 5) if "conv" in tag else (6,)
        net = registry.nets.find(tag)(shape, shape, zero_last=True)
        x = torch.randn(3, *shape)
        assert torch.equal(net(x), torch.zeros_like(x))
        net.train()(x).sum().backward()
        assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in net.parameters())
        with torch.no_grad():
            for weight in net.parameters():
                weight.add_(0.1)
        assert net(x).abs().sum() > 0

    def test_zeros_before_an_activation_are_refused(self):
        with pytest.raises(
            ValueError, match=r"zero_last expects a convolution or a linear layer at the end .* got relu"
        ):
            MLP((2,), (2,), final_activation=True, zero_last=True)
