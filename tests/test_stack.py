"""Nets as lists of parts: shapes, published sizes, starts at zero, initialisation, exactness, refusals."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn import functional

import invflow
from invflow import InvflowError, SpecError
from invflow.bijections import AdditiveCoupling, AffineCoupling, Checkerboard, Residual
from invflow.bijections.stripes import OnCheckerboard
from invflow.nets import Conv, DenseNet, ResNet, Stack, Transformer
from invflow.nets.activations import ACTIVATIONS, ConcatenatedRelu, Relu, Tanh
from invflow.nets.attention import Attention, SelfAttention
from invflow.nets.blocks import First, ResidualBlock, Skips
from invflow.nets.layers import Convolution, Linear, Marked, WeightNormed
from invflow.nets.norms import BatchNorm, Dropout, Gain, LayerNorm
from invflow.nets.orderfree import obstacle
from invflow.registry import parts

DOCS = Path(__file__).parent.parent / "docs" / "nets.md"
EXAMPLE = json.loads(re.search(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)[1])
PUBLISHED = DOCS.read_text().split("## Conditioners of published networks")[1]
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PUBLISHED, re.DOTALL)]


def built(net, a, b=None, **options):
    """The net of an additive coupling from a to b."""
    spec = {"input": {"shape": [a, a if b is None else b]}, "layers": [{"type": "additive_coupling", "net": net}]}
    return invflow.build({**spec, **options})[0].net


def size(module):
    return sum(weight.numel() for weight in module.parameters())


def refusal(net, shape=(4, 5, 5)):
    with pytest.raises(SpecError) as caught:
        built(net, list(shape))
    (error,) = caught.value.errors
    return f"{error['path']}: {error['message']}"


class TestPublished:
    """The conditioners that docs/nets.md writes out have as many parameters as the official code."""

    SHAPES = ((64, 8, 8), (64, 8, 8)), ((6, 16, 16), (12, 16, 16)), ((6, 16, 16), (66, 16, 16)), ((9, 4, 4), (3, 4, 4))
    SIZES = 13_920, 351_876, 506_466, 2_105_558

    @pytest.mark.parametrize(("net", "shapes", "parameters"), [*zip(BLOCKS[:4], SHAPES, SIZES, strict=True)])
    def test_sizes_on_images(self, net, shapes, parameters):
        made = built(net, *map(list, shapes))
        assert size(made) == parameters
        assert f"{parameters:,} parameters" in DOCS.read_text()
        assert made(torch.randn(2, *shapes[0])).shape == (2, *shapes[1])

    def test_sizes_of_a_transformer_layer(self):
        assert [size(built(net, [128, 16, 16])) for net in BLOCKS[4:]] == [66_304, 131_968]

    def test_short_forms_are_the_same_networks(self):
        resnet, densenet = (
            ResNet((6, 4, 4), (66, 4, 4), channels=96, blocks=3),
            DenseNet((9, 4, 4), (3, 4, 4), channels=512, blocks=12),
        )
        assert (size(resnet), size(densenet)) == self.SIZES[2:]

    def test_networks_add_up(self):
        """NSF on CIFAR-10 has 11,835,054 parameters, IDF 58,458,052 with 11,520 of its top prior."""
        with torch.device("meta"):
            spline = 0
            for channels in (12, 48, 192):
                half, linear = channels // 2, channels**2 + channels
                net = ResNet((half, 8, 8), (11 * half, 8, 8), channels=96, blocks=3, dropout=0.2)
                spline += 7 * (2 * channels + linear + size(net)) + linear
            integer = 0
            for channels in (12, 24, 48):
                last = channels // 4
                integer += 8 * size(DenseNet((channels - last, 8, 8), (last, 8, 8), channels=512, blocks=12))
            for channels in (12, 24):
                integer += size(DenseNet((channels // 2, 8, 8), (channels, 8, 8), channels=512, blocks=12))
        assert spline == 11_835_054
        assert integer == 58_458_052 - 11_520

    def test_the_example_at_the_top(self):
        net = built(EXAMPLE, [4, 5, 5])
        assert torch.equal(net(torch.randn(2, 4, 5, 5)), torch.zeros(2, 4, 5, 5))


class TestShapes:
    def test_the_last_part_that_chooses_returns_what_the_net_must(self):
        net = Stack(Convolution(8), Relu(), Convolution(), BatchNorm(), in_shape=(2, 5, 5), out_shape=(3, 5, 5))
        assert [type(one).__name__ for one in net] == ["Conv2d", "ReLU", "Conv2d", "BatchNorm2d"]
        assert net[2].out_channels == net[3].num_features == 3

    @pytest.mark.parametrize("positions", [(), (7,), (5, 4), (3, 4, 2)])
    @pytest.mark.parametrize("tag", ["conv", "mlp", "resnet", "densenet", "transformer"])
    def test_every_net_takes_sequences_and_volumes(self, tag, positions):
        if not positions and tag in ("conv", "transformer"):
            assert "expects a shape (channels, length), (channels, height, width) or" in refusal({"type": tag}, (4,))
            return
        net = built(
            {"type": tag},
            [4, *positions],
            [6, *positions],
        )
        assert net(torch.randn(2, 4, *positions)).shape == (2, 6, *positions)

    def test_stride_rounds_up(self):
        net = Stack(Convolution(3, stride=2), in_shape=(2, 5, 8), out_shape=(3, 3, 4))
        assert net(torch.randn(1, 2, 5, 8)).shape == (1, 3, 3, 4)

    @pytest.mark.parametrize(("positions", "sides"), [((7,), [5]), ((6, 7), [1, 3]), ((4, 5, 6), [3, 1, 5])])
    def test_a_side_for_each_dimension(self, positions, sides):
        net = Stack(Convolution(kernel_size=sides), in_shape=(2, *positions), out_shape=(2, *positions))
        assert list(net[0].weight.shape[2:]) == sides

    def test_vectors_become_images_at_the_end(self):
        net = Stack(Linear(7), Relu(), Linear(), in_shape=(5,), out_shape=(2, 3, 3))
        assert net(torch.randn(4, 5)).shape == (4, 2, 3, 3)

    @pytest.mark.parametrize("context", [(2,), (2, 5, 4)])
    @pytest.mark.parametrize("make", [Conv, ResNet, DenseNet, Transformer])
    def test_the_context_enters(self, make, context):
        net = make((4, 5, 4), (3, 5, 4), context).eval()
        x, given = torch.randn(2, 4, 5, 4), torch.randn(2, *context)
        assert net(x, given).shape == (2, 3, 5, 4)
        assert not torch.equal(net(x, given), net(x, given + 1))


class TestParts:
    def test_weight_norm_starts_as_the_layer_and_separates_length_from_direction(self):
        torch.manual_seed(0)
        module = Stack(Convolution(3, weight_norm=True), in_shape=(2, 5, 5), out_shape=(3, 5, 5)).double()[0]
        assert isinstance(module, WeightNormed)
        x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
        weight = module.layer.weight
        torch.testing.assert_close(module(x), functional.conv2d(x, weight, module.bias, padding=1))
        with torch.no_grad():
            module.layer.weight.mul_(7)
            module.gain.mul_(2)
        torch.testing.assert_close(module(x), 2 * functional.conv2d(x, weight / 7, padding=1))

    def test_a_weight_of_length_zero_makes_no_nan(self):
        module = Stack(Linear(3, weight_norm=True), in_shape=(2,), out_shape=(3,))[0]
        nn.init.zeros_(module.layer.weight)
        module(torch.randn(4, 2)).sum().backward()
        assert all(weight.grad.isfinite().all() for weight in module.parameters())

    def test_a_marked_border_adds_the_weights_of_the_mark_outside_only(self):
        net = Stack(Convolution(1, border="marked", bias=False), in_shape=(1, 4, 4), out_shape=(1, 4, 4))
        assert isinstance(net[0], Marked)
        with torch.no_grad():
            net[0].conv.weight.copy_(torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1))
        outside = torch.tensor([[5.0, 3, 3, 5], [3, 0, 0, 3], [3, 0, 0, 3], [5, 3, 3, 5]])
        assert torch.equal(net(torch.randn(2, 1, 4, 4))[1, 0], outside)

    def test_on_a_checkerboard_a_convolution_is_the_masked_one_of_the_whole_board(self):
        board = Checkerboard("odd")
        net = Stack(OnCheckerboard(Convolution(), colour="odd"), in_shape=(2, 4, 3), out_shape=(4, 4, 3)).double()
        (conv,) = net[0]
        x = torch.randn(5, 2, 4, 6, dtype=torch.float64)
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
        whole = conv(x * ((rows + columns) % 2))
        assert whole.shape == (5, 4, 4, 6)
        torch.testing.assert_close(net(board(x)[0]), board(whole)[1])

    def test_a_net_on_a_checkerboard_starts_at_zero(self):
        part = OnCheckerboard(Convolution(3), Relu(), Convolution())
        net = Stack(part, in_shape=(1, 4, 2), out_shape=(2, 4, 2), zero_last=True)
        assert not net(torch.randn(2, 1, 4, 2)).any()

    def test_skips_add_up_what_all_parts_return(self):
        net = Stack(Skips(Linear(3), Tanh(), Linear(5), channels=4), Linear(), in_shape=(2,), out_shape=(4,)).double()
        (first, act, last), maps = net[0].stages, net[0].maps
        x = torch.randn(7, 2, dtype=torch.float64)
        one = first(x)
        two = act(one)
        torch.testing.assert_close(net[0](x), maps[0](one) + maps[1](two) + maps[2](last(two)))

    def test_a_part_on_the_first_channels_leaves_the_others(self):
        net = Stack(First(Tanh(), Gain()), in_shape=(4, 3), out_shape=(4, 3))
        x = torch.randn(2, 4, 3)
        with torch.no_grad():
            net[0][1].gain.copy_(torch.tensor([[2.0], [-3.0]]))
        gain = torch.tensor([2.0, -3.0]).reshape(1, 2, 1)
        torch.testing.assert_close(net(x), torch.cat([gain * x[:, :2].tanh(), x[:, 2:]], 1))

    def test_a_concatenated_relu_loses_nothing(self):
        net = Stack(ConcatenatedRelu(), in_shape=(3, 2), out_shape=(6, 2))
        x = torch.randn(4, 3, 2)
        positive, negative = net(x).chunk(2, 1)
        assert torch.equal(positive - negative, x)
        assert net(x).min() == 0

    def test_layer_norm_is_pytorchs_at_every_position(self):
        norm = Stack(LayerNorm(), in_shape=(6, 3, 2), out_shape=(6, 3, 2)).double()
        x = torch.randn(2, 6, 3, 2, dtype=torch.float64)
        torch.testing.assert_close(norm(x)[:, :, 1, 0], functional.layer_norm(x[:, :, 1, 0], (6,)))

    @pytest.mark.parametrize("causal", [False, True])
    def test_attention_is_pytorchs(self, causal):
        attention = SelfAttention(8, 2, causal=causal, bias=True).double()
        x = torch.randn(3, 8, 2, 3, dtype=torch.float64)
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (
            part.unflatten(2, (2, 4)).transpose(1, 2) for part in attention.queries_keys_values(tokens).chunk(3, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention(x), attention.out(mixed).transpose(1, 2).reshape(x.shape))

    def test_causal_attention_sees_no_later_position(self):
        attention = SelfAttention(4, 1, causal=True, bias=True)
        x = torch.randn(1, 4, 5)
        changed = torch.cat([x[..., :3], torch.randn(1, 4, 2)], dim=2)
        torch.testing.assert_close(attention(x)[..., :3], attention(changed)[..., :3])

    def test_attention_maps_over_batches_and_differentiates_twice(self):
        attention = SelfAttention(4, 2, causal=False, bias=True).double()
        x = torch.randn(3, 2, 4, 5, dtype=torch.float64)
        torch.testing.assert_close(vmap(attention)(x), torch.stack([attention(one) for one in x]))
        given = x[0].requires_grad_()
        assert torch.autograd.gradgradcheck(attention, given)

    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_activations_are_parts_by_the_same_name(self, name):
        assert parts.find(name) is ACTIVATIONS[name]

    def test_nets_pickle_and_copy(self):
        block = ResidualBlock(LayerNorm(), Attention(2))
        net = Stack(Convolution(4, weight_norm=True), block, Linear(), in_shape=(2, 3, 3), out_shape=(2, 3, 3))
        x = torch.randn(2, 2, 3, 3)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other(x), net(x))


class TestStartsAtZero:
    @pytest.mark.parametrize("tag", ["conv", "mlp", "resnet", "densenet", "transformer"])
    def test_short_forms(self, tag):
        net = built({"type": tag, "zero_last": True}, [4, 3, 3])
        x = torch.randn(2, 4, 3, 3)
        assert torch.equal(net(x), torch.zeros_like(x))
        net(x).sum().backward()
        assert any(weight.grad.abs().sum() > 0 for weight in net.parameters() if weight.grad is not None)

    @pytest.mark.parametrize("border", ["zeros", "marked"])
    @pytest.mark.parametrize("weight_norm", [False, True])
    def test_a_stack_with_a_scale_behind(self, border, weight_norm):
        last = {"type": "conv", "border": border, "weight_norm": weight_norm}
        listed = [{"type": "conv"}, {"type": "relu"}, last, {"type": "scale"}, {"type": "dropout"}]
        net = built({"type": "stack", "zero_last": True, "parts": listed}, [4, 3, 3])
        assert torch.equal(net(torch.randn(2, 4, 3, 3)), torch.zeros(2, 4, 3, 3))

    @pytest.mark.parametrize(
        ("listed", "came"),
        [(["conv", "relu"], "got relu"), (["conv", "batch_norm"], "got batch_norm"), (["dropout"], "among the parts")],
    )
    def test_anything_else_at_the_end_is_refused(self, listed, came):
        net = {"type": "stack", "zero_last": True, "parts": [{"type": tag} for tag in listed]}
        assert came in refusal(net)


class TestActNorm:
    """An actnorm in a net is initialised with the layer, from the numbers that reach it."""

    NET = {
        "type": "stack",
        "parts": [{"type": "conv", "channels": 5}, {"type": "actnorm"}, {"type": "relu"}, {"type": "conv"}],
    }

    @pytest.mark.parametrize("layer", ["additive_coupling", "affine_coupling", "factor_out"])
    def test_initialised_with_its_layer(self, layer):
        head = [] if layer == "factor_out" else [{"type": "split"}]
        chain = invflow.build({"input": {"shape": [6, 4, 4]}, "layers": [*head, {"type": layer, "net": self.NET}]})
        x = 5 + 3 * torch.randn(50, 6, 4, 4)
        assert chain.awaits_data
        chain.initialize(x)
        assert not chain.awaits_data
        net = chain[-1].net
        normalised = net[1](net[0](x[:, :3])).movedim(1, 0).flatten(1)
        torch.testing.assert_close(normalised.mean(1), torch.zeros(5), atol=1e-4, rtol=0)
        torch.testing.assert_close(normalised.std(1, correction=0), torch.ones(5), atol=1e-4, rtol=0)
        assert not net[1]._forward_pre_hooks

    def test_a_layer_without_one_awaits_nothing(self):
        assert not AdditiveCoupling(nn.Linear(2, 2)).awaits_data
        assert not Residual(invflow.nets.LipschitzMLP((2,), (2,))).awaits_data

    def test_hooks_go_even_if_the_batch_is_refused(self):
        coupling = AffineCoupling(built(self.NET, [2, 3, 3], [4, 3, 3]))
        x = (torch.full((2, 2, 3, 3), torch.nan), torch.zeros(2, 2, 3, 3))
        with pytest.raises(invflow.NumericsError, match="finite"):
            coupling.initialize(x)
        assert not coupling.net[1]._forward_pre_hooks


class TestExact:
    LINES = re.findall(r"^\| (`.*?) \|.*\| (.*?) \|$", DOCS.read_text(), re.MULTILINE)

    @pytest.mark.parametrize("tag", sorted(parts.registered()))
    def test_a_part_says_what_is_so_and_the_docs_repeat_it(self, tag):
        """Whether a net with the part between convolutions can be made order-free."""
        needs = {"residual": [Relu()], "dense": [Relu()], "skips": [Relu()], "pad": [2]}
        part = parts.find(tag)(*needs.get(tag, []))
        _, made = part.make((16, 4, 4), None)
        behind = [part] if tag in ACTIVATIONS else [part, Relu()]
        first = [] if part.chooses else [Convolution()]
        last = Convolution(4) if made[1:] else Linear(4)
        net = Stack(*first, *behind, last, in_shape=(16, 4, 4), out_shape=(4, *made[1:]))
        assert (obstacle(net) is None) is (part.obstacle is None)
        documented = next(allows for tags, allows in self.LINES if f"`{tag}`" in tags)
        assert documented.startswith("no") is (part.obstacle is not None)

    @pytest.mark.parametrize("options", [{"weight_norm": True}, {"border": "reflect"}, {"border": "marked"}])
    def test_a_part_may_allow_it_for_some_fields_only(self, options):
        net = Stack(Convolution(4), Relu(), Convolution(**options), in_shape=(4, 4, 4), out_shape=(4, 4, 4))
        assert "no integer form" in obstacle(net)

    @pytest.mark.parametrize("positions", [(6,), (3, 4, 5)])
    def test_sequences_and_volumes_are_exact_whatever_the_batch(self, positions):
        listed = [
            {"type": "conv", "channels": 5, "bias": False},
            {"type": "batch_norm"},
            {"type": "relu"},
            {"type": "dropout"},
            {"type": "conv"},
        ]
        nets = [{"type": "conv", "hidden": [7], "activation": "gelu"}, {"type": "stack", "parts": listed}]
        layers = [{"type": "split"}, *({"type": "additive_coupling", "net": net} for net in nets), {"type": "merge"}]
        numerics = {"mode": "exact", "frac_bits": 8}
        chain = invflow.build({"input": {"shape": [4, *positions]}, "numerics": numerics, "layers": layers}).eval()
        x = torch.randint(0, 256, (17, 4, *positions)) / 256
        y = chain(x)
        assert not torch.equal(x, y)
        assert torch.equal(chain.inverse(y), x)
        assert torch.equal(torch.cat([chain(one[None]) for one in x]), y)
        assert torch.equal(chain.double()(x.double()).float(), y)


class TestRefusals:
    """One line, at the place of the part."""

    CASES = (
        ([{"type": "conv"}, {"type": "attention", "heads": 3}], ".1: attention with 3 heads expects channels that it"),
        (
            [{"type": "residual", "parts": [{"type": "relu"}, {"type": "conv", "stride": 2}]}],
            ".0: residual expects parts that keep the shape (4, 5, 5), got (4, 3, 3)",
        ),
        (
            [{"type": "residual", "parts": [{"type": "group_norm", "groups": 3}]}],
            ".0.parts.0: group_norm with 3 groups expects channels that it divides, got 4",
        ),
        (
            [{"type": "dense", "parts": [{"type": "conv", "stride": 2}]}],
            ".0: dense expects parts that keep the positions of (4, 5, 5), got (4, 3, 3)",
        ),
        ([{"type": "skips", "parts": []}], ".0: skips expects parts, got none"),
        (
            [{"type": "skips", "parts": [{"type": "relu"}, {"type": "conv", "stride": 2}]}],
            ".0: skips expects parts that return the same positions, got the shapes ((4, 5, 5), (4, 3, 3))",
        ),
        (
            [{"type": "checkerboard", "parts": [{"type": "conv", "stride": 2}]}],
            ".0: checkerboard expects parts that keep the positions of (4, 5, 10), got (4, 3, 5)",
        ),
        (
            [{"type": "first", "channels": 4, "parts": []}],
            ".0: first expects more than 4 channels, got (4, 5, 5)",
        ),
        (
            [{"type": "first", "parts": [{"type": "crelu"}]}],
            ".0: first expects parts that keep the shape (2, 5, 5), got (4, 5, 5)",
        ),
        ([{"type": "conv", "kernel_size": [3]}], ".0: conv expects one kernel_size, or 2 for (4, 5, 5), got [3]"),
        (
            [{"type": "conv", "kernel_size": 11, "border": "reflect"}],
            ".0: conv with a mirrored border expects more than 5 positions, got (4, 5, 5)",
        ),
        ([{"type": "conv", "groups": 3}], ".0: conv with groups 3 expects channels that it divides, got 4 in, 4 out"),
        ([{"type": "psi", "block_size": 2}], ".0: psi with block_size 2 expects"),
        ([{"type": "conv", "channels": 1}, {"type": "layer_norm"}], ".1: layer_norm expects at least 2 channels"),
        ([{"type": "conv", "chanels": 2}], ".0.chanels: unknown key 'chanels' of conv; did you mean 'channels'?"),
        ([{"type": "atention"}], ".0: unknown part type 'atention'; did you mean 'attention'?"),
        ([{"type": "split"}], ".0: unknown part type 'split': it is a layer"),
        ({"type": "conv"}, ": expected a list of parts, got"),
        ([3], ".0: expected a part, an object with a type, got 3"),
        ([{"type": "repeat", "times": 2, "layers": []}], ".0.layers: unknown key 'layers' of repeat"),
    )

    @pytest.mark.parametrize(("listed", "line"), CASES)
    def test_a_part_that_does_not_fit(self, listed, line):
        with pytest.raises(SpecError) as caught:
            built({"type": "stack", "parts": listed}, [4, 5, 5])
        first = caught.value.errors[0]
        assert f"{first['path']}: {first['message']}".startswith(f"layers.0.net.parts{line}")

    def test_a_net_that_returns_another_shape(self):
        net = {"type": "stack", "parts": [{"type": "conv", "stride": 2}]}
        assert refusal(net) == "layers.0.net: stack must map (4, 5, 5) to (4, 5, 5), but returns (4, 3, 3)"

    def test_in_python_the_place_is_in_the_message(self):
        with pytest.raises(InvflowError, match=r"^parts\.1\.parts\.0: attention with 3 heads"):
            Stack(Relu(), ResidualBlock(Attention(3)), in_shape=(4, 2, 2), out_shape=(4, 2, 2))
        with pytest.raises(InvflowError, match="Stack: parts: expected a Part, got Conv2d"):
            Stack(nn.Conv2d(2, 2, 3), in_shape=(2, 5, 5), out_shape=(2, 5, 5))

    def test_dropout_never_drops_all(self):
        with pytest.raises(InvflowError, match="probability: input should be less than 1"):
            Dropout(1.0)


class Cumulated(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x.cumsum(1)


def test_a_part_of_ones_own_needs_one_class(forget_what_a_test_registers):
    @invflow.register_part("acme.cumulate")
    class Cumulate(invflow.Part):
        """Sums along the channels.

        Args:
            factor: what to multiply the sums by.
        """

        def __init__(self, factor: float = 1.0) -> None:
            self.factor = factor

        def make(self, shape, wanted):
            return Cumulated(self.factor), shape

    net = {"type": "stack", "parts": [{"type": "acme.cumulate", "factor": 2.0}, {"type": "linear"}]}
    spec = {"input": {"shape": [[2], [3]]}, "layers": [{"type": "additive_coupling", "net": net}]}
    chain = invflow.build(spec)
    assert invflow.load_spec(invflow.to_spec(chain)).hash == invflow.load_spec(spec).hash
    assert "Stack(Cumulate(factor=2.0), Linear())" in repr(chain)
    with pytest.raises(SpecError, match=r"cannot be exact: its net's acme\.cumulate is computed in real numbers"):
        invflow.build({**spec, "numerics": {"mode": "exact"}})
