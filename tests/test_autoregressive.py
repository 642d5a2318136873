"""Autoregressive layers: what nets they refuse, inverses and their gradients, a peer with the same weights."""

from __future__ import annotations

import io
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import invflow
from invflow import InvflowError, ShapeError, SpecError
from invflow.bijections import Autoregressive, Inverse, SplineAutoregressive
from invflow.nets import MLP, MaskedMLP
from invflow.nets.masked import MaskedLinear

AGREE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Relative to max(1, |x|): a few roundings for each of 16 features, times a condition number below 100."""

PEER = 1e-10
"""The same sums in float64, in another order."""

HIDDEN = [12, 9, 10]


def masked(features, numbers=2, context_shape=None, **fields):
    """A masked net with weights that are drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fields = {"hidden": HIDDEN, "activation": "tanh", **fields}
        return MaskedMLP((features,), (numbers * features,), context_shape, **fields)


def layer_of(kind, features=6, context_shape=None, solver="jacobi", **fields):
    options = {} if kind is Autoregressive else {"bins": 4}
    net = masked(features, kind.outputs(options), context_shape, **fields)
    return kind(net, (features,), context_shape, solver=solver, **options)


def sums_before(x):
    """For each feature the sum of those before it."""
    return nn.functional.pad(x.cumsum(1)[:, :-1], (1, 0))


class Late(nn.Module):
    """Autoregressive, but for one output, which sees one feature that comes too late."""

    def __init__(self, features, output, seen):
        super().__init__()
        self.seen = seen
        self.register_buffer("place", nn.functional.one_hot(torch.tensor(output), features))

    def forward(self, x):
        shift = sums_before(x)
        return torch.cat([shift, shift + self.place * x[:, self.seen, None]], dim=1)


class Causal(nn.Module):
    """An autoregressive net without masks, with what changes in train mode, and a use of the global generator."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, context=None):
        before = self.drop(self.norm(sums_before(x))) + 0 * torch.rand(())
        if context is not None:
            before = before + context.sum(1, keepdim=True)
        return torch.cat([self.weight[0] * before, self.weight[1] * before], dim=1)


class TestRefusal:
    @pytest.mark.parametrize("features", [2, 5, 200])
    def test_a_net_that_sees_too_much_is_refused_with_what_it_sees(self, features):
        pairs = {(0, 0), (0, features - 1), (features - 1, features - 1), (features // 2, features // 2 + 1)}
        for output, seen in pairs:
            if seen < features:
                said = f"got Late, whose output for feature {output} depends on feature {seen} "
                with pytest.raises(ShapeError, match=f"autoregressive expects a net whose .* {said}"):
                    Autoregressive(Late(features, output, seen), (features,))

    @pytest.mark.parametrize(
        "net", [MLP((3,), (6,), hidden=[4]), MLP((3,), (6,), hidden=[1, 1], zero_last=True), nn.Linear(3, 6)]
    )
    @pytest.mark.parametrize("trial", range(5))
    def test_weights_that_start_at_zero_hide_nothing(self, net, trial):
        for weight in net.parameters():
            nn.init.uniform_(weight, -trial, 0)
        with pytest.raises(ShapeError, match="depends on feature 2"):
            Autoregressive(net, (3,))

    def test_a_spec_says_where(self):
        document = {"input": {"shape": [3]}, "layers": [{"type": "autoregressive", "net": {"type": "mlp"}}]}
        with pytest.raises(SpecError, match=r"layers.0: autoregressive expects a net .* got mlp"):
            invflow.build(document)
        document["layers"] = [{"type": "inverse", "layer": document["layers"][0]}]
        with pytest.raises(SpecError, match=r"layers.0.layer: autoregressive expects a net .* got mlp"):
            invflow.build(document)

    def test_the_check_has_no_side_effects(self):
        net = Causal()
        net.drop.eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        generator = torch.get_rng_state()
        with torch.inference_mode():
            Autoregressive(net, (4,), (2,))
        assert [module.training for module in net.modules()] == [True, True, False]
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert all(weight.grad is None and weight.requires_grad for weight in net.parameters())
        assert torch.equal(torch.get_rng_state(), generator)

    def test_on_the_meta_device_the_check_is_left_out(self):
        with torch.device("meta"):
            layer = Autoregressive(nn.Linear(3, 6), (3,))
        assert layer(torch.zeros(2, 3, device="meta")).shape == (2, 3)
        assert layer.inverse(torch.zeros(2, 3, device="meta")).is_meta

    def test_the_cost_of_the_check_does_not_grow_with_the_number_of_features(self):
        batches = []

        class Watched(nn.Module):
            def forward(self, x):
                batches.append(len(x))
                return sums_before(x).repeat(1, 2)

        for features in (2, 100, 5000):
            Autoregressive(Watched(), (features,))
        assert batches == [64] * 6

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: Autoregressive(nn.Linear(3, 5), (3,)), r"it must return \(6,\), but returns \(5,\)"),
            (lambda: Autoregressive(masked(4), (3,)), "a net that runs on 3 features, got masked_mlp"),
            (lambda: Autoregressive(masked(3), (3, 2)), r"expects a shape \(features,\)"),
            (lambda: Autoregressive(masked(3), (3,)).output_shape((4,)), r"expects the shape \(3,\), got \(4,\)"),
            (lambda: Autoregressive(masked(3), (3,))(torch.zeros(2, 4)), r"expects the shape \(3,\), got \(4,\)"),
            (lambda: Autoregressive(masked(3), (3,), scale="exp", clamp=1.0), "autoregressive has a clamp with"),
            (lambda: Autoregressive(masked(3), (3,), solver="newton"), "solver: input should be 'jacobi' or"),
            (lambda: SplineAutoregressive(masked(3), (3,), bins=3, min_size=0.4), r"expects bins \* min_size below 1"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, call, message):
        with pytest.raises((InvflowError, ShapeError), match=message):
            call()

    @pytest.mark.parametrize("tag", ["autoregressive", "spline_autoregressive"])
    @pytest.mark.parametrize("mode", ["grid", "exact"])
    def test_exact_numerics_are_refused_by_name(self, tag, mode):
        layer = {"type": tag, "net": {"type": "masked_mlp"}}
        with pytest.raises(SpecError, match=f"layers.0: {tag} cannot be {mode}: its inverse undoes real arithmetic"):
            invflow.build({"input": {"shape": [3]}, "layers": [layer], "numerics": {"mode": mode}})


KINDS = [Autoregressive, SplineAutoregressive]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context_shape", [None, (2,)])
class TestInverse:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_both_solvers_invert_and_agree(self, kind, context_shape, dtype):
        jacobi = layer_of(kind, 16, context_shape).to(dtype)
        sequential = layer_of(kind, 16, context_shape, "sequential").to(dtype)
        x = torch.randn(50, 16, dtype=dtype)
        given = None if context_shape is None else torch.randn(50, *context_shape, dtype=dtype)
        y, log_det = jacobi.forward_and_log_det(x, given)
        found = [layer.inverse_and_log_det(y.detach(), given) for layer in (jacobi, sequential)]
        for back, negative in found:
            torch.testing.assert_close(back, x, rtol=AGREE[dtype], atol=AGREE[dtype])
            torch.testing.assert_close(negative, -log_det, rtol=10 * AGREE[dtype], atol=10 * AGREE[dtype])
        torch.testing.assert_close(*(back for back, _ in found), rtol=AGREE[dtype], atol=AGREE[dtype])

    def test_jacobi_takes_fewer_steps_than_features_and_never_more(self, kind, context_shape):
        for features, smaller in ((2, False), (64, True)):
            layer = layer_of(kind, features, context_shape)
            given = None if context_shape is None else torch.randn(4, *context_shape)
            y = layer(torch.randn(4, features), given).detach()
            count = [0]
            layer.net.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
            with torch.no_grad():
                layer.inverse(y, given)
            assert count[0] < features / 2 if smaller else count[0] <= features

    def test_gradients_of_the_inverse_to_second_order(self, kind, context_shape):
        layer = layer_of(kind, 3, context_shape, hidden=[4]).double()
        y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        given = () if context_shape is None else (torch.randn(2, 2, dtype=torch.float64, requires_grad=True),)
        names, weights = zip(*layer.named_parameters(), strict=True)

        def inverse(*values):
            state = {f"layer.{name}": value for name, value in zip(names, values, strict=False)}
            # Twice, so that the second y depends on the weights, as of a layer that is shared.
            once = torch.func.functional_call(Inverse(layer), state, (y, *values[len(names) :]))
            moved = once + values[-1][..., :1] if given else once
            return torch.func.functional_call(Inverse(layer), state, (moved, *values[len(names) :]))

        free = [weight.detach().requires_grad_() for weight in weights]
        assert torch.autograd.gradcheck(inverse, (*free, *given), fast_mode=True)
        assert torch.autograd.gradcheck(lambda y: layer.inverse_and_log_det(y, *given), (y,))
        assert torch.autograd.gradgradcheck(layer.inverse_and_log_det, (y, *given), fast_mode=True)
        assert torch.autograd.gradgradcheck(inverse, (*free, *given), fast_mode=True)

    @pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
    def test_transforms_of_the_inverse(self, kind, context_shape):
        layer = layer_of(kind, 3, context_shape).double()
        y = torch.randn(2, 3, dtype=torch.float64)
        given = () if context_shape is None else (torch.randn(2, 2, dtype=torch.float64),)

        def one(y, *context):
            return layer.inverse(y[None], *(c[None] for c in context))[0]

        expected = torch.stack(
            [torch.autograd.functional.jacobian(lambda y, i=i: one(y, *(c[i] for c in given)), y[i]) for i in range(2)]
        )
        for differentiate in (torch.func.jacrev, torch.func.jacfwd):
            found = torch.func.vmap(differentiate(one))(y, *given)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Squares(nn.Module):
    """Shifts each feature by the square of the one before, in one matrix, whose zeros turn an infinity to NaN."""

    def forward(self, x):
        shift = x.square() @ torch.eye(x.shape[1], dtype=x.dtype).roll(1, 1).triu(1)
        return torch.cat([torch.zeros_like(x), shift], dim=1)


@pytest.mark.parametrize("solver", ["jacobi", "sequential"])
def test_transients_that_overflow_do_no_harm(solver):
    layer = Autoregressive(Squares(), (20,), solver=solver)
    x = torch.full((2, 20), 2.0)
    assert torch.equal(layer.inverse(layer(x)), x)  # a step on, the 6 of y is -30, then -894, then no number
    x[0] = 1e30
    assert layer.inverse(x)[0].isfinite().tolist() == [True] + 19 * [False]  # these really are none


@pytest.mark.parametrize("solver", ["jacobi", "sequential"])
def test_a_number_that_is_none_reaches_what_follows_it_and_no_other_sample(solver):
    layer = layer_of(Autoregressive, 5, solver=solver)
    y = torch.randn(3, 5)
    y[1, 2] = float("nan")
    x = layer.inverse(y)
    expected = layer.inverse(y.nan_to_num())
    assert x[1, 2:].isnan().all()
    torch.testing.assert_close(x[1, :2], expected[1, :2])
    torch.testing.assert_close(x[[0, 2]], expected[[0, 2]])


def test_batch_norm_in_train_mode_is_undone_by_the_same_batch():
    layer = Autoregressive(Causal(), (4,), (2,)).double()
    layer.net.drop.p = 0.0
    x, given = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    torch.testing.assert_close(layer.inverse(layer(x, given), given), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_an_inverse_autoregressive_flow(kind):
    tag = kind.tag
    inner = {"type": tag, "net": {"type": "masked_mlp", "hidden": [8]}}
    document = {"input": {"shape": [4]}, "layers": [{"type": "inverse", "layer": inner}]}
    chain = invflow.build(document).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    y, log_det = chain.forward_and_log_det(x)
    torch.testing.assert_close(y, chain[0].layer.inverse(x))
    torch.testing.assert_close(chain.inverse(y), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, -chain[0].layer.forward_and_log_det(y)[1])
    (log_det.sum() + y.square().sum()).backward()
    assert all(weight.grad is not None for weight in chain.parameters())


def test_a_spec_makes_the_same_function_and_it_comes_back_from_a_folder(tmp_path):
    net = {"type": "masked_mlp", "hidden": [9, 8], "degrees": "random", "seed": 5, "residual": True}
    layers = [{"type": "autoregressive", "net": net}, {"type": "permute", "order": "reverse"},
              {"type": "spline_autoregressive", "net": net, "bins": 4, "solver": "sequential"}]  # fmt: skip
    document = {"input": {"shape": [5], "context_shape": [2]}, "layers": layers}
    one, other = (invflow.build(document).double() for _ in range(2))
    other.load_state_dict(one.state_dict())
    x, given = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(other(x, given), one(x, given))
    invflow.save(one, tmp_path)
    assert torch.equal(invflow.load(tmp_path)(x, given), one(x, given))
    assert invflow.to_spec(one)["layers"] == layers


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
@torch.no_grad()
def test_the_compiler_gives_the_same_numbers():
    layer = layer_of(Autoregressive, 4)
    x = torch.randn(3, 4)
    torch.compiler.reset()
    for call in (layer, Inverse(layer)):
        torch.testing.assert_close(torch.compile(call, backend="aot_eager")(x), call(x))
    torch.compiler.reset()


def test_the_net_of_the_documentation_is_one():
    page = (Path(__file__).parent.parent / "docs" / "nets.md").read_text().split("## Autoregressive nets")[1]
    names = {}
    exec(re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE).group(1), names)
    layer, x = names["layer"], torch.randn(3, 5)
    torch.testing.assert_close(layer(x)[:, 2], x[:, 2] + (x[:, 0] + x[:, 1]) / 5)
    torch.testing.assert_close(layer.inverse(layer(x)), x)


class Terminal(io.StringIO):
    """What somebody sees who looks at stderr."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.parametrize("slow", [False, True])
def test_long_inversions_show_their_steps_in_a_terminal_only(monkeypatch, stream, slow):
    seen = stream()
    monkeypatch.setattr("sys.stderr", seen)
    monkeypatch.setattr("time.monotonic", itertools.count(0, 2 if slow else 0).__next__)
    layer_of(Autoregressive, 6, solver="sequential").inverse(torch.zeros(1, 6))
    assert ("inverse of autoregressive" in seen.getvalue()) == (slow and stream is Terminal)


def copy_weights(ours, theirs, outputs, inputs):
    """Copies the weights of a peer's layers, in their order, given the places of our outputs and inputs there."""
    mine = [part for part in ours.modules() if isinstance(part, MaskedLinear)]
    for to, other in zip(mine, theirs, strict=True):
        to.load_state_dict({"weight": other.weight, "bias": other.bias})
    first, last = mine[0], mine[-1]
    first.weight.data = first.weight.data[:, inputs]
    last.weight.data, last.bias.data = last.weight.data[outputs], last.bias.data[outputs]


@pytest.mark.filterwarnings("ignore")
def test_maf_of_zuko_with_the_same_weights():
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    theirs = zuko.flows.MAF(4, 2, transforms=3, hidden_features=(9, 10)).double()
    net = {"type": "masked_mlp", "hidden": [9, 10]}
    layer = {"type": "autoregressive", "scale": "soft_clip", "clamp": math.log(1e3), "net": net}
    reverse = {"type": "permute", "order": "reverse"}
    document = {"input": {"shape": [4], "context_shape": [2]}, "layers": [layer, reverse, layer, reverse, layer],
                "prior": {"type": "standard_normal"}}  # fmt: skip
    ours = invflow.build_model(document).double()
    mine = [one for one in ours.bijection if isinstance(one, Autoregressive)]
    for one, other in zip(mine, theirs.transform.transforms, strict=True):
        order = other.order.argsort()  # ours reverses the features, theirs the order in which they depend on each other
        # Of each feature theirs has the shift first.
        outputs = torch.arange(8).reshape(4, 2)[order].flip(1).T.flatten()
        copy_weights(one.net, [part for part in other.hyper if isinstance(part, nn.Linear)], outputs, [*order, 4, 5])
    x, given = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(x, given), theirs(given).log_prob(x), rtol=PEER, atol=PEER)
    z = ours.bijection(x, given)
    torch.testing.assert_close(z, theirs(given).transform(x), rtol=PEER, atol=PEER)
    torch.testing.assert_close(ours.inverse(z, given), theirs(given).transform.inv(z), rtol=PEER, atol=PEER)
