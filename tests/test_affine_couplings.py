"""Couplings that scale and shift: their functions of the scale, their extremes, and the same functions in peers."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn

import invflow
from invflow.bijections import AffineCoupling, GinCoupling

SCALES = {
    "tanh": lambda r: torch.exp(2 * torch.tanh(r / 2)),
    "atan": lambda r: torch.exp(0.636 * 2 * torch.atan(r / 2)),
    "soft_clip": lambda r: torch.exp(r / (1 + (r / 2).abs())),
    "sigmoid": lambda r: torch.sigmoid(r + 2),
    "twice_sigmoid": lambda r: 2 * torch.sigmoid(r),
    "exp": torch.exp,
}
PEER = {"rtol": 1e-10, "atol": 1e-10}  # the acceptance of the issue, in float64


class Given(nn.Module):
    """A conditioner that returns what it was made with, whatever the input."""

    def __init__(self, *parts):
        super().__init__()
        self.made = nn.Parameter(torch.cat(parts, 1))

    def forward(self, a):
        return self.made.expand(len(a), *self.made.shape[1:])


class Ours(nn.Module):
    """A peer's net for our coupling: r first and then t, and r multiplied, because FrEIA clamps after it divides."""

    def __init__(self, net, *, raw=slice(None), shift=slice(None), factor=1.0):
        super().__init__()
        self.net, self.raw, self.shift, self.factor = net, raw, shift, factor

    def forward(self, a):
        made = self.net(a)
        return torch.cat([self.factor * made[:, self.raw], made[:, self.shift]], 1)


class WithContext(nn.Sequential):
    """A net as nflows calls it."""

    def forward(self, a, context=None):
        return super().forward(a)


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def conv(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, outputs, 1)).double()


@pytest.mark.parametrize("shift_first", [False, True])
@pytest.mark.parametrize("scale", SCALES)
def test_the_scale_is_the_documented_function(scale, shift_first):
    raw, shift, b = (torch.randn(1, 5, 3, dtype=torch.float64) * 3 for _ in range(3))
    coupling = AffineCoupling(Given(raw, shift), scale=scale, shift_first=shift_first)
    (u, a), log_det = coupling.forward_and_log_det((b, b))
    factor = SCALES[scale](raw)
    torch.testing.assert_close(u, (b + shift) * factor if shift_first else factor * b + shift)
    torch.testing.assert_close(log_det, factor.log().sum((1, 2)))
    assert torch.equal(a, b)
    back, inverse_log_det = coupling.inverse_and_log_det((u, a))
    torch.testing.assert_close(back[1], b)
    torch.testing.assert_close(inverse_log_det, -log_det)


def test_the_floor_is_added_to_the_scale():
    raw, shift, b = (torch.randn(1, 5, dtype=torch.float64) * 3 for _ in range(3))
    coupling = AffineCoupling(Given(raw, shift), scale="sigmoid", floor=0.25)
    factor = torch.sigmoid(raw + 2) + 0.25
    (u, _), log_det = coupling.forward_and_log_det((b, b))
    torch.testing.assert_close(u, factor * b + shift)
    torch.testing.assert_close(log_det, factor.log().sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fields", [*({"scale": scale} for scale in SCALES), {"scale": "sigmoid", "floor": 1e-3}])
def test_no_weights_make_a_number_that_is_not_finite(fields, dtype):
    """What a step of any finite size can make of the last layer: the largest numbers of the dtype included."""
    largest = torch.finfo(dtype).max
    raw = torch.tensor([[0.0, 1.0, -1.0, 30.0, -30.0, 1e4, -1e4, largest, -largest]], dtype=dtype)
    b = torch.linspace(-1, 1, raw.shape[1], dtype=dtype)[None]
    for shift_first in (False, True):
        coupling = AffineCoupling(Given(raw, torch.zeros_like(raw)), shift_first=shift_first, **fields)
        for call in (coupling.forward_and_log_det, coupling.inverse_and_log_det):
            (first, second), log_det = call((b.clone().requires_grad_(), b))
            gradients = torch.autograd.grad(first.sum() + second.sum() + log_det.sum(), coupling.net.made)
            for found in (first, second, log_det, *gradients):
                assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_unbounded_scales_change_nothing_before(dtype):
    raw = torch.linspace(-9.9, 9.9, 101, dtype=dtype)[None]
    for scale in ("sigmoid", "twice_sigmoid", "exp"):
        coupling = AffineCoupling(Given(raw, torch.zeros_like(raw)), scale=scale)
        found = coupling((torch.ones_like(raw), torch.ones_like(raw)))[0]
        torch.testing.assert_close(found, SCALES[scale](raw.double()).to(dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"clamp": 1.0, "scale": "exp"},
            'affine_coupling has a clamp with "tanh", "atan", "soft_clip" only, got 1.0',
        ),
        ({"clamp": 1.0, "scale": "sigmoid"}, 'affine_coupling has a clamp .* got 1.0 with "sigmoid"'),
        ({"floor": 0.1}, 'affine_coupling has a floor with the scale "sigmoid" only, got 0.1 with "tanh"'),
        ({"floor": 0.1, "scale": "twice_sigmoid"}, 'a floor .* got 0.1 with "twice_sigmoid"'),
        ({"scale": "softplus"}, "scale: .*'tanh', 'atan', 'soft_clip'"),
        ({"floor": -1.0, "scale": "sigmoid"}, "floor: "),
    ],
)
def test_fields_that_do_not_fit_are_refused_at_their_place(fields, message):
    layers = [{"type": "split"}, {"type": "affine_coupling", "net": {"type": "mlp"}, **fields}]
    with pytest.raises(invflow.SpecError, match=rf"layers\.1.*{message}") as caught:
        invflow.build({"input": {"shape": [4]}, "layers": layers})
    assert len(caught.value.errors) == 1


def test_every_scale_pickles():
    for scale in SCALES:
        coupling = AffineCoupling(nn.Linear(2, 6), scale=scale)
        pair = (torch.randn(4, 2), torch.randn(4, 3))
        assert torch.equal(pickle.loads(pickle.dumps(coupling))(pair)[0], coupling(pair)[0])


class TestGin:
    @pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2), (4, 2, 3, 2)])
    def test_it_preserves_volume_at_every_position(self, shape):
        made = (5 * torch.randn(1, *shape, dtype=torch.float64), torch.zeros(1, *shape, dtype=torch.float64))
        b = torch.ones(1, *shape, dtype=torch.float64)
        (scale, _), log_det = GinCoupling(Given(*made)).forward_and_log_det((b, b))
        torch.testing.assert_close(scale.prod(1), torch.ones_like(scale[:, 0]))
        assert scale.std() > 0.1  # it does scale
        assert torch.equal(log_det, torch.zeros(1, dtype=torch.float64))

    def test_one_channel_is_shifted_only(self):
        coupling = GinCoupling(nn.Linear(3, 2))
        a, b = torch.randn(5, 3), torch.randn(5, 1)
        assert torch.equal(coupling((a, b))[0], coupling.net(a)[:, 1:] + b)

    def test_its_largest_stretch_is_below_that_of_twice_the_clamp(self):
        raw = torch.tensor([[1e30, -1e30, -1e30, -1e30]])
        stretched = GinCoupling(Given(raw, 0 * raw), clamp=1.5)((torch.ones(1, 4), torch.ones(1, 4)))[0]
        assert stretched.max().item() == pytest.approx(math.exp(1.5 * 1.5))


def freia_block(name, inputs, net):
    modules = pytest.importorskip("FrEIA.modules")
    return getattr(modules, name)([inputs], subnet_constructor=net, clamp=1.5, clamp_activation="TANH").double()


class TestPeers:
    @pytest.mark.parametrize(("shape", "net"), [((7,), mlp), ((6, 4, 3), conv)])
    @pytest.mark.parametrize(
        ("theirs", "ours"), [("GLOWCouplingBlock", AffineCoupling), ("GINCouplingBlock", GinCoupling)]
    )
    def test_freia(self, theirs, ours, shape, net):
        """FrEIA changes the first half given the second and then the second given the first: two of our couplings."""
        block = freia_block(theirs, shape, net)
        sizes = [block.split_len1, block.split_len2]
        first, second = (
            ours(Ours(part, raw=slice(size), shift=slice(size, None), factor=1.5), clamp=1.5)
            for part, size in zip((block.subnet2, block.subnet1), sizes, strict=True)
        )
        x = torch.randn(9, *shape, dtype=torch.float64)
        x1, x2 = x.split(sizes, 1)
        (y1, passed), log_det = first.forward_and_log_det((x2, x1))  # (a, b) -> (u, a)
        (y2, passed), other = second.forward_and_log_det((y1, passed))
        (expected,), their_log_det = block([x])
        torch.testing.assert_close(torch.cat([y1, y2], 1), expected, **PEER)
        torch.testing.assert_close(log_det + other, their_log_det + torch.zeros(9, dtype=torch.float64), **PEER)
        back = first.inverse(second.inverse((y2, y1)))
        torch.testing.assert_close(torch.cat([back[1], back[0]], 1), block([expected], rev=True)[0][0], **PEER)

    @pytest.mark.parametrize(("shape", "net"), [((7,), mlp), ((6, 4, 3), conv)])
    def test_nflows(self, shape, net):
        """nflows transforms what the mask names, with a scale of sigmoid(r + 2) + 0.001, and t before r."""
        transforms = pytest.importorskip("nflows.transforms")
        mask = torch.arange(shape[0]) % 2
        theirs = transforms.AffineCouplingTransform(mask, lambda *sizes: WithContext(*net(*sizes))).double()
        changes = int(mask.sum())
        ours = Ours(theirs.transform_net, raw=slice(changes, None), shift=slice(changes))
        coupling = AffineCoupling(ours, scale="sigmoid", floor=1e-3)
        x = torch.randn(9, *shape, dtype=torch.float64)
        expected, their_log_det = theirs(x)
        (found, passed), log_det = coupling.forward_and_log_det((x[:, mask == 0], x[:, mask == 1]))
        assert torch.equal(passed, expected[:, mask == 0])
        torch.testing.assert_close(found, expected[:, mask == 1], **PEER)
        torch.testing.assert_close(log_det, their_log_det, **PEER)
        back, back_log_det = coupling.inverse_and_log_det((found, passed))
        their_back, their_back_log_det = theirs.inverse(expected)
        torch.testing.assert_close(back[1], their_back[:, mask == 1], **PEER)
        torch.testing.assert_close(back_log_det, their_back_log_det, **PEER)

    @pytest.mark.parametrize(("scale", "theirs"), [("exp", "exp"), ("sigmoid", "sigmoid_inv")])
    def test_normflows(self, scale, theirs):
        """normflows takes t and r from the channels in turn."""
        flows = pytest.importorskip("normflows.flows")
        net = mlp(3, 6)
        coupling = AffineCoupling(Ours(net, raw=slice(1, None, 2), shift=slice(0, None, 2)), scale=scale)
        a, b = (torch.randn(9, 3, dtype=torch.float64) for _ in range(2))
        (_, expected), their_log_det = flows.AffineCoupling(net, scale_map=theirs)([a, b])
        (found, _), log_det = coupling.forward_and_log_det((a, b))
        torch.testing.assert_close(found, expected, **PEER)
        torch.testing.assert_close(log_det, their_log_det, **PEER)
