"""Rational-quadratic splines: their values, how accurate their inverses are, and that they are those of nflows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import invflow
from invflow.bijections import Merge, Spline, SplineCoupling, Split
from invflow.bijections.rational_quadratic import RationalQuadratic
from invflow.measures import jacobian

DTYPES = [torch.float32, torch.float64]
PUBLISHED = {torch.float64: 1e-12, torch.float32: 2e-6}
"""What the published values of a spline are to be met to."""

ROUNDINGS = 16
"""Of an inverse, in units of eps times the bound: those of a dozen operations on numbers up to the bound."""

PEER = 1e-10
"""Between two programs that compute the same function in float64 in another order."""

SLOPE_ONE = math.log(math.expm1(1 - 1e-3))
"""What the papers' logit of a slope of 1 is, and ours is 0."""

LOOSE = 30
"""How many times the steepest slope a bound of it may be, which bounds two factors separately: infinity bounds too."""

WIDTHS, HEIGHTS, SLOPES = [0.5, -1, 0.25, 1.5], [-0.75, 0.5, 1, -0.25], [0.3, -1.2, 2]
KNOTS = [
    [-3, -1.7279553767881393, -1.4394626372558184, -0.44746609329507957, 3],
    [-3, -2.4915477245032035, -0.73181696326228288, 2.1655962458767508, 3],
    [1, 0.85535524446852712, 0.26428246733803119, 2.1279280110429725, 1],
]
# x, y and log(dy/dx), computed with 50 digits
VALUES = [
    (-3.5, -3.5, 0),
    (-3, -3, 0),
    (-2.5, -2.7656622011884527, -1.3467085780742204),
    (-1, 0.16196245175108226, 1.3521672100237402),
    (0, 2.5428214854240713, -1.0868826404356614),
    (0.7, 2.6681132620827553, -2.3095130415613754),
    (2.9, 2.9252091589995754, -0.57913086275407977),
    (3, 3, 0),
    (4, 4, 0),
]


def random_splines(count, scale, dtype, bins=8, seed=0):
    """Logits of this scale, a number in the interval for each spline, and the splines."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(3 * bins - 1, count, generator=generator, dtype=torch.float64)
    numbers = 3 * (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)
    return logits.to(dtype), numbers.to(dtype), RationalQuadratic(bins, 3.0, 1e-3, 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_has_the_published_values(dtype):
    spline = RationalQuadratic(4, 3.0, 1e-3, 1e-3)
    made = torch.tensor([*WIDTHS, *HEIGHTS, *(logit - SLOPE_ONE for logit in SLOPES)], dtype=dtype)[:, None]
    x, y, log_slope = torch.tensor(VALUES, dtype=torch.float64).T
    close = {"rtol": 0, "atol": PUBLISHED[dtype]}
    torch.testing.assert_close(spline.knots(made)[..., 0].double(), torch.tensor(KNOTS, dtype=torch.float64), **close)
    found, slope = spline.apply(x.to(dtype), made)
    torch.testing.assert_close(found.double(), y, **close)
    torch.testing.assert_close(slope.double(), log_slope, **close)
    back, slope = spline.undo(y.to(dtype), made)
    torch.testing.assert_close(back.double(), x, rtol=0, atol=PUBLISHED[dtype] / log_slope.exp().min().item())
    torch.testing.assert_close(slope.double(), log_slope, rtol=0, atol=10 * PUBLISHED[dtype])  # of an x that is rounded


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_are_fixed_exactly_and_nothing_moves_outside(dtype):
    logits, _, spline = random_splines(1000, 10, dtype)
    for value in (-3.0, 3.0, -3.5, 1e6, -1e30):
        x = torch.full((1000,), value, dtype=dtype)
        for call in (spline.apply, spline.undo):
            y, log_slope = call(x, logits)
            assert torch.equal(y, x)
            assert not log_slope.any()
    knots = spline.knots(logits)
    assert bool((knots[:2, 0] == -3).all() and (knots[:2, -1] == 3).all() and (knots[2, [0, -1]] == 1).all())
    least = 6e-3 - 3 * ROUNDINGS * torch.finfo(dtype).eps
    assert knots[:2].diff(dim=1).min() >= least
    assert 1e-3 <= knots[2].min() <= knots[2].max() <= 1e3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [2, 5, 8])
def test_zeros_are_the_identity(dtype, bins):
    layer, eps = Spline((2,), bins=bins).to(dtype), torch.finfo(dtype).eps
    x = torch.linspace(-4, 4, 1000, dtype=dtype).reshape(-1, 2)
    for call in (layer.forward_and_log_det, layer.inverse_and_log_det):
        y, log_det = call(x)
        assert (y - x).abs().max() <= 3 * 4 * eps
        assert log_det.abs().max() <= 2 * 4 * eps
    net = nn.Linear(2, 2 * (3 * bins - 1), dtype=dtype).requires_grad_(False)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    u, v = SplineCoupling(net, bins)((x, x))
    assert torch.equal(v, x)
    assert (u - x).abs().max() <= 3 * 4 * eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slope_of_one_has_a_log_determinant_of_exactly_zero(dtype):
    spline = RationalQuadratic(8, 3.0, 1e-3, 0.5)  # for which slopes of 1 are not rounded
    made = torch.zeros(23, 1000, dtype=dtype)
    assert bool((spline.knots(made)[2] == 1).all())
    x = torch.linspace(-3, 3, 1000, dtype=dtype)
    assert not spline.apply(x, made)[1].any()
    assert not spline.undo(x, made)[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 5, 10])
def test_its_inverse_is_accurate_to_rounding_whatever_the_slopes(dtype, scale):
    logits, x, spline = random_splines(20_000, scale, dtype)
    unit = 3 * torch.finfo(dtype).eps
    y, log_slope = spline.apply(x, logits)
    back, log_slope_there = spline.undo(y, logits)
    again, _ = spline.apply(back, logits)
    assert all(one.isfinite().all() for one in (y, log_slope, back, log_slope_there, again))
    assert float((again - y).abs().max()) <= ROUNDINGS * unit
    # In units of the whole interval: on a plateau y is the same number for many x, and f' there not the same.
    assert float(((back - x).abs() * log_slope.exp()).max()) <= ROUNDINGS * 2 * unit
    # For any y of the interval, where an x between two numbers is rounded to one of them.
    x, _ = spline.undo(y := logits[0].tanh() * 3, logits)
    again, log_slope = spline.apply(x, logits)
    assert float(((again - y).abs() / log_slope.exp().clamp(min=1)).max()) <= ROUNDINGS * unit


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_no_weights_make_it_nan(scale):
    logits, x, spline = random_splines(20_000, scale, torch.float32)
    x[:6] = torch.tensor([3.0, -3.0, 0.0, 1e38, -1e38, 3.0000002])
    logits[:, 6:1000] = logits[:, 6:1000].sign() * scale
    for call in (spline.apply, spline.undo):
        given = [x.clone().requires_grad_(), logits.clone().requires_grad_()]
        y, log_slope = call(*given)
        assert y.isfinite().all()
        assert log_slope.isfinite().all()
        assert (y - x)[x.abs() >= 3].abs().max() == 0
        for slope in torch.autograd.grad((y.sum(), log_slope.sum()), given):
            assert slope.isfinite().all()


def test_gradients_are_right_to_the_second_order_in_both_directions():
    logits, x, spline = random_splines(6, 1.0, torch.float64, bins=3)
    x[0] = 4.0  # outside
    given = (x.requires_grad_(), logits.requires_grad_())
    for call in (spline.apply, spline.undo):
        assert gradcheck(call, given)
        assert gradgradcheck(call, given)


def test_gradients_are_right_where_the_root_changes_its_form():
    spline = RationalQuadratic(2, 3.0, 0.125, 1e-3)  # a min_size for which m is 0 without a rounding
    y = torch.tensor([-1.5, 1.5], dtype=torch.float64, requires_grad=True)  # of identities, in the middles of bins
    made = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(spline.undo, (y, made))


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 4), (2, 2, 3, 2)])
def test_each_number_has_a_spline_of_its_own_at_every_position(shape):
    torch.manual_seed(0)
    linear = nn.Linear(2, 2 * 23).double()

    class Everywhere(nn.Module):
        def forward(self, a):
            return linear(a.movedim(1, -1)).movedim(-1, 1)

    a, b = torch.randn(2, 3, *shape, dtype=torch.float64)
    u, log_det = SplineCoupling(Everywhere()).forward_and_log_det((a, b))
    rows = [one.movedim(1, -1).reshape(-1, 2) for one in (a, b)]
    expected, each = SplineCoupling(linear).forward_and_log_det(tuple(rows))
    torch.testing.assert_close(u[0].movedim(1, -1).reshape(-1, 2), expected[0], rtol=0, atol=PEER)
    torch.testing.assert_close(log_det, each.reshape(3, -1).sum(1), rtol=0, atol=PEER)
    layer = Spline(shape).double()
    nn.init.normal_(layer.numbers)
    one, _ = layer.spline.apply(rows[0], layer.numbers[:, None])
    torch.testing.assert_close(layer(a).movedim(1, -1).reshape(-1, 2), one, rtol=0, atol=PEER)


@pytest.mark.parametrize(("bins", "bound"), [(8, 3.0), (5, 1.0)])
def test_it_is_the_spline_coupling_of_nflows(bins, bound):
    library = pytest.importorskip("nflows.transforms.coupling")
    torch.manual_seed(0)
    features, numbers = 3, 3 * bins - 1

    class Net(nn.Sequential):
        hidden_features = 16  # nflows divides the logits of widths and heights by the root of it

        def forward(self, x, context=None):
            return super().forward(x)

    def make(inputs, outputs):
        return Net(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs)).double()

    mask = torch.tensor([0] * features + [1] * features)
    peer = library.PiecewiseRationalQuadraticCouplingTransform(mask, make, bins, tails="linear", tail_bound=bound)
    nn.init.normal_(peer.transform_net[-1].weight)
    net = copy.deepcopy(peer.transform_net)
    with torch.no_grad():
        for weights in (net[-1].weight, net[-1].bias):
            rows = weights.view(features, numbers, -1).transpose(0, 1).clone()  # one number after another
            weights.copy_(rows.reshape(weights.shape))
        net[-1].bias[2 * bins * features :] -= SLOPE_ONE
    coupling = SplineCoupling(net, bins, bound, logit_divisor=4.0)
    x = 2 * torch.randn(200, 2 * features, dtype=torch.float64)
    halves = x.chunk(2, dim=1)
    expected, log_det = peer(x)
    (u, v), found = coupling.forward_and_log_det(halves)
    torch.testing.assert_close(torch.cat([v, u], dim=1), expected, rtol=0, atol=PEER)
    torch.testing.assert_close(found, log_det, rtol=0, atol=PEER)
    y = torch.cat([halves[0], expected[:, features:]], dim=1)
    (a, b), back = coupling.inverse_and_log_det((expected[:, features:], halves[0]))
    torch.testing.assert_close(torch.cat([a, b], dim=1), peer.inverse(y)[0], rtol=0, atol=1e-8)  # its error, mostly
    torch.testing.assert_close(back, -log_det, rtol=0, atol=1e-8)


def test_no_slope_exceeds_its_bounds():
    torch.manual_seed(0)
    layer = Spline((4,), bins=5).double()
    nn.init.normal_(layer.numbers, std=2.0)
    x = torch.linspace(-3, 3, 20_000, dtype=torch.float64)[:, None].expand(-1, 4)
    log_slopes = layer.spline.apply(x, layer.numbers[:, None])[1].detach()
    steepest, flattest = float(log_slopes.max().exp()), float((-log_slopes.min()).exp())
    forward, inverse = layer.lipschitz_bounds()
    assert steepest <= forward <= LOOSE * steepest
    assert flattest <= inverse <= LOOSE * flattest
    assert Spline((4,)).lipschitz_bounds() == pytest.approx((1.0, 1.0))
    one = torch.tensor([[0.3, -1.0, 2.0, 2.9]], dtype=torch.float64)
    values = torch.linalg.svdvals(jacobian(layer, one))
    assert 1 / inverse <= float(values.min()) <= float(values.max()) <= forward


@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_constant_memory_training_gives_the_same_gradients(way):
    torch.manual_seed(0)
    layers = [SplineCoupling(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2 * 23))) for _ in range(3)]
    found = {}
    for policy in ("stored", "reversible"):
        chain = invflow.Sequential(Split(), *copy.deepcopy(layers), Merge(), backprop=policy).double()
        x = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y, log_det = getattr(chain, f"{way}_and_log_det")(x)
        found[policy] = torch.autograd.grad((y.square().sum(), log_det.sum()), [x, *chain.parameters()])
    for stored, reversible in zip(*found.values(), strict=True):
        torch.testing.assert_close(reversible, stored, rtol=1e-8, atol=1e-8)  # of reconstructions through three splines


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"bins": 10, "min_size": 0.1}, r"layers.1: a spline expects bins \* min_size below 1, got 10 \* 0.1; take"),
        ({"bins": 1}, r"layers.1.bins: .*greater than or equal to 2"),
        ({"bound": 0}, r"layers.1.bound: .*greater than 0"),
        ({"min_slope": 1}, r"layers.1.min_slope: .*less than 1"),
    ],
)
@pytest.mark.parametrize("tag", ["spline", "spline_coupling"])
def test_a_spline_that_cannot_be_is_refused_at_its_place(tag, layer, message):
    coupled = {"net": {"type": "mlp"}} if tag == "spline_coupling" else {}
    layers = [{"type": "split"} if coupled else {"type": "affine"}, {"type": tag, **coupled, **layer}]
    with pytest.raises(invflow.SpecError, match=message) as caught:
        invflow.build({"input": {"shape": [4]}, "layers": layers})
    assert len(caught.value.errors) == 1
