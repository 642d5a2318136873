"""The layer of TarFlow and its net: what depends on what, both solvers, the cache, context, order, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import invflow
from invflow import ShapeError, SpecError
from invflow.bijections import Inverse, TransformerAutoregressive
from invflow.nets import CausalTransformer, Stepwise, Transformer
from invflow.nets.masked import require_autoregressive
from invflow.testing.checker import chosen, examine
from invflow.testing.strategies import Case
from invflow.testing.trial import Setting, Subject

AGREE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Relative to max(1, |x|): some roundings for each of 64 tokens, which later tokens do not amplify 10 times."""

ROUNDING = 1e-12
"""The same sums in float64, in another order."""

SHAPE = (3, 2, 4)
PUBLISHED = Path(__file__).parent.parent / "specs" / "published"


def net_of(shape=SHAPE, context_shape=None, outputs=2, **fields):
    """A causal transformer whose weights are drawn from a fixed seed, and that is no constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = {"channels": 16, "blocks": 2, "heads": 2, **fields}
        net = CausalTransformer(shape, (outputs * shape[0], *shape[1:]), context_shape, **fields)
        nn.init.normal_(net.last.weight, std=0.1)
        nn.init.normal_(net.positions)
        if net.context is not None:
            nn.init.normal_(net.context.weight)
    return net


def layer_of(shape=SHAPE, context_shape=None, order="identity", solver="jacobi", **fields):
    return TransformerAutoregressive(net_of(shape, context_shape, **fields), shape, context_shape, order, solver)


def jacobian(layer, x, context=None):
    """The Jacobian of one sample by tokens in raster order: ``(token, channel, token, channel)``."""
    channels, tokens = x.shape[0], x[0].numel()
    full = torch.func.jacrev(lambda x: layer(x[None], context)[0])(x)
    return full.reshape(channels, tokens, channels, tokens).permute(1, 0, 3, 2)


class Running(nn.Module):
    """A causal net without a step: sums of the tokens up to each, and with `ahead` a bit of a later one."""

    def __init__(self, ahead=None):
        super().__init__()
        self.ahead = ahead

    def forward(self, x):
        tokens = x.flatten(2)
        sums = tokens.cumsum(2).tanh()
        if self.ahead is not None:
            output, seen = self.ahead
            place = nn.functional.one_hot(torch.tensor(output), tokens.shape[2])
            sums = sums + place * tokens[:, :1, seen, None]
        return torch.cat([sums / 2, sums], dim=1).unflatten(2, x.shape[2:])


class TestMap:
    @pytest.mark.parametrize("order", ["identity", "reverse"])
    @pytest.mark.parametrize("context_shape", [None, (2,)])
    def test_no_token_depends_on_a_later_one_and_the_first_stays(self, order, context_shape):
        layer = layer_of(order=order, context_shape=context_shape).double()
        x = torch.randn(*SHAPE, dtype=torch.float64)
        context = None if context_shape is None else torch.randn(1, *context_shape, dtype=torch.float64)
        found = jacobian(layer, x, context)
        tokens = range(8) if order == "identity" else range(7, -1, -1)
        for i, one in enumerate(tokens):
            for j, other in enumerate(tokens):
                block = found[one, :, other]
                if i == j:
                    # Within a token, each number is scaled alone.
                    assert torch.equal(block, block.diagonal().diag())
                    assert bool((block.diagonal() > 0).all())
                else:
                    assert bool((block != 0).all() if i > j else (block == 0).all())
        first = tokens[0]
        y = layer(x[None], context)[0]
        assert torch.equal(y.flatten(1)[:, first], x.flatten(1)[:, first])
        assert bool((y.flatten(1)[:, tokens[1]] != x.flatten(1)[:, tokens[1]]).all())

    def test_the_formula(self):
        net = net_of()
        layer = TransformerAutoregressive(net, SHAPE)
        x = torch.randn(2, *SHAPE)
        made = net(x).flatten(2)
        y, log_det = layer.forward_and_log_det(x)
        tokens, expected = x.flatten(2), x.flatten(2).clone()
        for i in range(1, 8):
            alpha, mu = made[:, :3, i - 1], made[:, 3:, i - 1]
            expected[:, :, i] = (tokens[:, :, i] - mu) * torch.exp(-alpha)
        torch.testing.assert_close(y.flatten(2), expected)
        torch.testing.assert_close(log_det, -made[:, :3, :-1].sum((1, 2)))

    def test_reverse_is_the_same_net_on_the_tokens_in_reverse(self):
        x = torch.randn(2, *SHAPE)
        turned = layer_of(order="reverse")(x.flip((2, 3))).flip((2, 3))
        assert torch.equal(turned, layer_of()(x))

    def test_patches_are_the_channels_of_psi(self):
        layer = {"type": "transformer_autoregressive", "net": {"type": "causal_transformer", "channels": 8}}
        document = {
            "input": {"shape": [2, 4, 6]},
            "layers": [{"type": "psi", "block_size": 2, "layout": "channel"}, layer],
        }
        chain = invflow.build(document)
        assert chain[1].elements == 6
        x = torch.randn(1, 2, 4, 6)
        patches = nn.functional.unfold(x, 2, stride=2)
        assert torch.equal(chain[0](x).flatten(2), patches)

    def test_it_has_as_many_weights_as_published(self):
        layer = {"type": "transformer_autoregressive",
                 "net": {"type": "causal_transformer", "channels": 128, "blocks": 4, "heads": 2}}  # fmt: skip
        layers = [
            {"type": "psi", "block_size": 4, "layout": "channel"},
            {"type": "repeat", "times": 4, "layers": [layer]},
        ]
        document = {"input": {"shape": [1, 28, 28], "context_shape": [10]}, "layers": layers}
        assert sum(weight.numel() for weight in invflow.build(document).parameters()) == 3_227_776


@pytest.mark.parametrize("order", ["identity", "reverse"])
@pytest.mark.parametrize("context_shape", [None, (2,)])
class TestInverse:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_both_solvers_invert_and_agree(self, order, context_shape, dtype):
        shape = (4, 8, 8)
        jacobi, sequential = (
            layer_of(shape, context_shape, order, solver).to(dtype) for solver in ("jacobi", "sequential")
        )
        x = torch.randn(5, *shape, dtype=dtype)
        given = None if context_shape is None else torch.randn(5, *context_shape, dtype=dtype)
        y, log_det = jacobi.forward_and_log_det(x, given)
        found = [layer.inverse_and_log_det(y.detach(), given) for layer in (jacobi, sequential)]
        for back, negative in found:
            torch.testing.assert_close(back, x, rtol=AGREE[dtype], atol=AGREE[dtype])
            torch.testing.assert_close(negative, -log_det, rtol=10 * AGREE[dtype], atol=10 * AGREE[dtype])
        torch.testing.assert_close(*(back for back, _ in found), rtol=AGREE[dtype], atol=AGREE[dtype])

    def test_jacobi_needs_fewer_evaluations_than_tokens_and_sequential_none_of_all(self, order, context_shape):
        shape = (4, 8, 8)
        for solver, most in (("jacobi", 32), ("sequential", 0)):
            layer = layer_of(shape, context_shape, order, solver)
            layer.net.last.weight.data /= 4
            given = None if context_shape is None else torch.randn(4, *context_shape)
            y = layer(torch.randn(4, *shape), given).detach()
            count = [0]
            layer.net.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
            with torch.no_grad():
                layer.inverse(y, given)
            assert count[0] <= most

    def test_gradients_of_the_inverse_to_second_order(self, order, context_shape):
        shape = (2, 3)
        layer = layer_of(shape, context_shape, order, channels=4, blocks=1).double()
        y = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True)
        given = () if context_shape is None else (torch.randn(2, 2, dtype=torch.float64, requires_grad=True),)
        names, weights = zip(*layer.named_parameters(), strict=True)

        def inverse(*values):
            state = {f"layer.{name}": value for name, value in zip(names, values, strict=False)}
            return torch.func.functional_call(Inverse(layer), state, (y, *values[len(names) :]))

        free = [weight.detach().requires_grad_() for weight in weights]
        assert torch.autograd.gradcheck(inverse, (*free, *given), fast_mode=True)
        assert torch.autograd.gradgradcheck(layer.inverse_and_log_det, (y, *given), fast_mode=True)

    def test_transforms_of_the_inverse(self, order, context_shape):
        shape = (2, 3)
        layer = layer_of(shape, context_shape, order, channels=4).double()
        y = torch.randn(2, *shape, dtype=torch.float64)
        given = () if context_shape is None else (torch.randn(2, 2, dtype=torch.float64),)

        def one(y, *context):
            return layer.inverse(y[None], *(c[None] for c in context))[0]

        expected = torch.stack(
            [torch.autograd.functional.jacobian(lambda y, i=i: one(y, *(c[i] for c in given)), y[i]) for i in range(2)]
        )
        found = torch.func.vmap(torch.func.jacrev(one))(y, *given)
        torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


class TestCache:
    @pytest.mark.parametrize("context_shape", [None, (2,)])
    @pytest.mark.parametrize("pieces", [[1] * 8, [8], [3, 1, 4]])
    def test_steps_return_what_one_evaluation_does(self, context_shape, pieces):
        net = net_of(context_shape=context_shape).double()
        assert isinstance(net, Stepwise)
        x = torch.randn(2, *SHAPE, dtype=torch.float64)
        given = None if context_shape is None else torch.randn(2, 2, dtype=torch.float64)
        made, past = [], None
        for piece in x.flatten(2).split(pieces, dim=2):
            one, past = net.step(piece, given, past)
            made.append(one)
        torch.testing.assert_close(torch.cat(made, 2), net(x, given).flatten(2), rtol=ROUNDING, atol=ROUNDING)

    def test_an_inverse_with_the_cache_is_that_without(self):
        class Plain(nn.Module):
            """The same net, of which nobody knows that it has steps."""

            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x):
                return self.net(x)

        net = net_of().double()
        plain = Plain(net)
        assert not isinstance(plain, Stepwise)
        y = torch.randn(4, *SHAPE, dtype=torch.float64)
        found = [TransformerAutoregressive(one, SHAPE, solver="sequential").inverse(y) for one in (net, plain)]
        torch.testing.assert_close(*found, rtol=ROUNDING, atol=ROUNDING)


class TestContext:
    def test_one_hot_classes_are_embedded(self):
        net = net_of(context_shape=(3,)).double()
        x = torch.randn(2, *SHAPE, dtype=torch.float64)
        classes = torch.tensor([2, 0])
        hot = nn.functional.one_hot(classes, 3).double()
        without = net_of().double()
        without.load_state_dict({name: value for name, value in net.state_dict().items() if name != "context.weight"})
        for i in range(2):
            without.first.bias = nn.Parameter(net.first.bias + net.context.weight[:, classes[i]])
            torch.testing.assert_close(without(x[i : i + 1]), net(x, hot)[i : i + 1], rtol=ROUNDING, atol=ROUNDING)

    @pytest.mark.parametrize("solver", ["jacobi", "sequential"])
    def test_one_row_serves_all_samples(self, solver):
        layer = layer_of(context_shape=(2,), solver=solver).double()
        x, row = torch.randn(3, *SHAPE, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
        y, same = layer(x, row), row.expand(3, 2)
        torch.testing.assert_close(y, layer(x, same), rtol=ROUNDING, atol=ROUNDING)
        torch.testing.assert_close(layer.inverse(y, row), x, rtol=ROUNDING, atol=ROUNDING)
        (layer.inverse(y.detach(), row.requires_grad_()).sum()).backward()
        assert row.grad.shape == (1, 2)

    @pytest.mark.parametrize(
        ("declared", "given", "message"),
        [
            ((2,), None, r"causal_transformer expects a context of shape \(2,\) besides the batch, got None"),
            ((2,), (3,), r"causal_transformer expects a context of shape \(2,\) besides the batch, got \(3,\)"),
            (None, (2,), "causal_transformer was built without a context but got one"),
        ],
    )
    def test_a_wrong_context_is_refused(self, declared, given, message):
        layer = layer_of(context_shape=declared)
        with pytest.raises(ShapeError, match=message):
            layer(torch.randn(1, *SHAPE), None if given is None else torch.randn(1, *given))


class TestRefusal:
    @pytest.mark.parametrize("tokens", [2, 9, 150])
    def test_a_net_that_sees_a_later_token_is_refused_with_what_it_sees(self, tokens):
        TransformerAutoregressive(Running(), (2, tokens))
        for output, seen in {(0, 1), (0, tokens - 1), (tokens - 2, tokens - 1)}:
            said = f"tokens up to it alone, got Running, whose output for token {output} depends on token {seen} "
            with pytest.raises(ShapeError, match=said):
                TransformerAutoregressive(Running((output, seen)), (2, tokens))

    def test_a_transformer_that_sees_everything_is_refused_though_its_weights_are_zero(self):
        net = Transformer(SHAPE, (6, 2, 4), channels=8, heads=2, zero_last=True)
        with pytest.raises(ShapeError, match=r"depends on token 7 .* use causal_transformer"):
            TransformerAutoregressive(net, SHAPE)

    @pytest.mark.parametrize("context_shape", [None, (2,)])
    def test_the_net_that_is_not_checked_would_pass_the_check(self, context_shape):
        require_autoregressive("the layer", net_of(context_shape=context_shape), SHAPE, 2, context_shape)

    def test_a_stack_with_causal_attention_is_accepted(self):
        parts = [{"type": "linear", "channels": 8}, {"type": "positions"},
                 {"type": "residual", "parts": [{"type": "layer_norm"}, {"type": "attention", "causal": True}]},
                 {"type": "linear"}]  # fmt: skip
        layer = {"type": "transformer_autoregressive", "net": {"type": "stack", "parts": parts}}
        chain = invflow.build({"input": {"shape": [2, 3, 3]}, "layers": [layer]}).double()
        x = torch.randn(3, 2, 3, 3, dtype=torch.float64)
        torch.testing.assert_close(chain.inverse(chain(x)), x, rtol=ROUNDING, atol=ROUNDING)
        parts[2]["parts"][1]["causal"] = False
        with pytest.raises(SpecError, match=r"layers.0: transformer_autoregressive expects a net .* got stack"):
            invflow.build({"input": {"shape": [2, 3, 3]}, "layers": [layer]})

    def test_a_document_whose_check_would_take_all_memory_is_refused_first(self):
        parts = [{"type": "attention", "heads": 1, "causal": True}, {"type": "linear"}]
        layer = {"type": "transformer_autoregressive", "net": {"type": "stack", "parts": parts}}
        with pytest.raises(SpecError, match=r"building takes [0-9]+ operations up to here"):
            invflow.build({"input": {"shape": [1, 20_000]}, "layers": [layer]})
        # Where nothing is checked, tokens cost nothing.
        layer["net"] = {"type": "causal_transformer", "channels": 2, "heads": 1}
        assert invflow.build({"input": {"shape": [1, 20_000]}, "layers": [layer]})[0].elements == 20_000

    @pytest.mark.parametrize(
        ("shape", "fields", "message"),
        [
            ([3], {}, r"expects a shape \(channels, length\)"),
            ([2, 3], {"channels": 6}, "with 4 heads expects channels, at least 2, that it divides, got 6"),
            ([2, 3], {"channels": 1, "heads": 1}, "expects channels, at least 2, that it divides, got 1"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, shape, fields, message):
        layer = {"type": "transformer_autoregressive", "net": {"type": "causal_transformer", **fields}}
        with pytest.raises((SpecError, ShapeError), match=message):
            invflow.build({"input": {"shape": shape}, "layers": [layer]})

    def test_without_a_token_there_is_no_layer_and_with_one_it_does_nothing(self):
        with pytest.raises(ShapeError, match=r"expects at least one token .* got \(3, 0\)"):
            TransformerAutoregressive(Running(), (3, 0))
        layer, x = layer_of((3, 1)), torch.randn(2, 3, 1)
        assert torch.equal(layer(x), x)
        assert torch.equal(layer.inverse(x), x)

    def test_a_net_for_other_positions_is_refused(self):
        with pytest.raises(ShapeError, match=r"keeps the positions of \(2, 3\), but must return \(4, 4\)"):
            CausalTransformer((2, 3), (4, 4))
        with pytest.raises(ShapeError, match=r"causal_transformer expects the shape \(3, 2, 4\), got \(3, 8\)"):
            TransformerAutoregressive(net_of(), (3, 8))(torch.randn(1, 3, 8))

    @pytest.mark.parametrize("mode", ["grid", "exact"])
    def test_exact_numerics_are_refused_by_name(self, mode):
        layer = {"type": "transformer_autoregressive", "net": {"type": "causal_transformer"}}
        with pytest.raises(SpecError, match=f"transformer_autoregressive cannot be {mode}: its inverse undoes real"):
            invflow.build({"input": {"shape": [3, 4]}, "layers": [layer], "numerics": {"mode": mode}})


@pytest.mark.parametrize("solver", ["jacobi", "sequential"])
def test_a_number_that_is_none_reaches_what_follows_it_and_no_other_sample(solver):
    layer = layer_of(solver=solver).double()
    y = torch.randn(3, *SHAPE, dtype=torch.float64)
    expected = layer.inverse(y)
    y[1, 0, 1, 0] = float("nan")  # token 4
    x = layer.inverse(y).flatten(2)
    assert x[1, 0, 4].isnan()
    assert x[1, :, 5:].isnan().all()
    torch.testing.assert_close(x[1, :, :4], expected.flatten(2)[1, :, :4])
    torch.testing.assert_close(x[[0, 2]], expected.flatten(2)[[0, 2]])


def test_autocast_does_not_reach_the_scale():
    layer = layer_of()
    x = torch.randn(2, *SHAPE)
    expected = layer.forward_and_log_det(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.forward_and_log_det(x)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_it_comes_back_from_a_folder(tmp_path):
    net = {"type": "causal_transformer", "channels": 8, "blocks": 1, "heads": 2, "expansion": 2, "activation": "silu"}
    layer = {"type": "transformer_autoregressive", "net": net}
    layers = [layer, {**layer, "order": "reverse", "solver": "sequential"}]
    chain = invflow.build({"input": {"shape": [2, 3], "context_shape": [2]}, "layers": layers})
    x, given = torch.randn(3, 2, 3), torch.randn(3, 2)
    invflow.save(chain, tmp_path)
    assert torch.equal(invflow.load(tmp_path)(x, given), chain(x, given))
    assert invflow.to_spec(chain)["layers"] == layers


def test_huge_tokens_are_judged_beside_what_came_back():
    # A rounding turns a log-scale from -10 to 10, so that 1e15 comes back of 1e8: the image loses as much more.
    net = {"type": "causal_transformer", "channels": 6, "heads": 1, "expansion": 2}
    case = Case(({"type": "transformer_autoregressive", "net": net, "order": "reverse"},), (1, 6, 6), None, {})
    setting = Setting(kind="huge", dtype=torch.float32, weights=0)
    subject = Subject(case.bijection(), case.shape, case.context_shape)
    assert examine(subject, [setting], chosen(["round trip everywhere"]), 0).ok


def test_the_official_code_returns_the_same():
    """Numbers of github.com/apple/ml-tarflow (313120e) in float64, with these weights and without its casts."""
    text = (PUBLISHED / "tarflow_mnist.json").read_text()
    smaller = {"1, 28, 28": "1, 8, 8", '"channels": 128': '"channels": 64', '"heads": 2': '"heads": 1'}
    for old, new in {**smaller, '"blocks": 4': '"blocks": 1', '"times": 2': '"times": 1'}.items():
        assert old in text
        text = text.replace(old, new)
    chain = invflow.build(json.loads(text)).double()[1:]  # without the layer for pixels
    with torch.no_grad():
        for i, weight in enumerate(chain.parameters()):
            wave = torch.sin(torch.arange(weight.numel(), dtype=torch.float64) + i)
            weight.copy_(0.1 * wave.reshape(weight.shape))
        x = torch.cos(torch.arange(2 * 64, dtype=torch.float64)).reshape(2, 1, 8, 8)
        z, log_det = chain.forward_and_log_det(2 * x - 1, torch.eye(10, dtype=torch.float64)[:2])
    official = [
        -0.040733041635681894,
        -0.400729713030646,
        0.14693531984195915,
        14.348933437015729,
        9.974009316475513,
        -0.5418976817696073,
    ]
    assert z.flatten()[::23].tolist() == pytest.approx(official, rel=ROUNDING)
    assert log_det.tolist() == pytest.approx([1.91876040765903, 1.9109099132174856], rel=ROUNDING)
