"""Maps of single numbers over the whole of their domains."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow import Sequential, ShapeError
from invflow.bijections import (
    ActNorm,
    Affine,
    Inverse,
    LeakyRelu,
    Linear1x1,
    Logit,
    Permute,
    Psi,
    Scale,
    Sigmoid,
    SinhArcsinh,
    Softplus,
    Tanh,
)
from invflow.models import Flow, StandardNormal, dequantize

EPS = torch.finfo(torch.float32).eps


def sizes():
    """1,000 numbers of every exponent of float32, as float64."""
    mantissas = 1 + torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (2.0 ** torch.arange(-149, 128, dtype=torch.float64)[:, None] * mantissas).flatten()


def roundings(layer, call, x):
    """The largest error of what a call returns in float32, in units of eps max(1, |value|)."""
    found = getattr(layer, call)(x)
    right = getattr(layer.double(), call)(x.double())
    layer.float()
    worst = 0.0
    for a, b in zip(found, right, strict=True):
        in_range = b.abs() < torch.finfo(torch.float32).max
        worst = max(worst, float(((a.double() - b).abs() / b.abs().clamp(min=1))[in_range].max()) / EPS)
    return worst


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 0.05, 0.25])
def test_a_logit_in_float32_is_that_of_float64_over_its_domain(alpha):
    layer = Logit(alpha)
    margin = alpha / (1 - 2 * alpha)
    numbers = torch.cat([sizes(), *(end + sign * sizes() for end in (0, 1) for sign in (1, -1))])
    edges = torch.cat([-margin + sizes(), 1 + margin - sizes()])
    x = torch.cat([torch.tensor([0.0, 1.0]), numbers.float(), edges.float()])[:, None]
    x = x[(x.double() > -margin) & (x.double() < 1 + margin)].reshape(-1, 1)
    assert roundings(layer, "forward_and_log_det", x) <= 4
    torch.testing.assert_close(layer(x), layer.forward_and_log_det(x)[0], rtol=0, atol=0)
    y = torch.cat([sizes(), -sizes()]).float()[:, None]
    assert roundings(layer, "inverse_and_log_det", y) <= 4
    assert layer.forward_and_log_det(layer.inverse(y))[1].isfinite().all()  # every sample has a density


@pytest.mark.parametrize("layer", [Affine((1,)), ActNorm((1,))])
def test_scales_in_float32_are_those_of_float64(layer):
    with torch.no_grad():
        layer.log_scale.fill_(0.37)
        layer.shift.fill_(-0.21)
        x = torch.cat([torch.zeros(1, dtype=torch.float64), sizes(), -sizes()]).float()[:, None]
        assert roundings(layer, "forward_and_log_det", x) <= 4
        assert roundings(layer, "inverse_and_log_det", x) <= 4


def test_a_scale_without_a_shift_has_one_weight_a_channel_and_keeps_zero():
    layer = Affine((2, 3), shift=False)
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([2.0, 0.5]).log())
    x = torch.tensor([[[1.0, 0.0, 3.0], [4.0, 0.0, 2.0]]])
    y, log_det = layer.forward_and_log_det(x)
    torch.testing.assert_close(y, torch.tensor([[[2.0, 0.0, 6.0], [2.0, 0.0, 1.0]]]))
    torch.testing.assert_close(layer.inverse(y), x)
    torch.testing.assert_close(log_det, torch.zeros(1))
    assert list(layer.state_dict()) == ["log_scale"]


@pytest.mark.parametrize("outside", [-0.2, 1.5, 1.0625, -1e30, math.inf, -math.inf])
@pytest.mark.parametrize("front", [[], [Psi(2)]])
def test_outside_its_domain_a_density_is_zero_and_its_gradients_are_finite(outside, front):
    shape = (4, 1, 1) if front else (1, 2, 2)
    flow = Flow(Sequential(*front, Logit(), ActNorm(shape)), StandardNormal(shape))
    x = torch.full((3, 1, 2, 2), 0.5)
    x[1, 0, 1, 0] = outside
    x[2] = math.nan
    found = flow.log_prob(x)
    assert found[0].isfinite()
    assert found[1] == -math.inf
    assert found[2].isnan()
    assert flow.bijection(x)[1].isnan().any()  # there is no such state
    flow.log_prob(x[:2]).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in flow.parameters())


def test_dequantised_digits_lie_in_the_domain_of_a_wider_logit():
    from invflow.spec.training import Data
    from invflow.training.data import load_data

    data = load_data(Data(name="digits"))
    pixels = dequantize(data.train.all().values, data.levels)
    assert 1 < pixels.max() <= data.high
    assert Logit(0.06).forward_and_log_det(pixels)[1].isfinite().all()


@pytest.mark.parametrize(("fields", "fits"), [({}, False), ({"alpha": 0.055}, False), ({"alpha": 0.06}, True)])
def test_training_refuses_data_that_have_no_density(fields, fits):
    from invflow.spec.training import Data
    from invflow.training.data import load_data
    from invflow.training.run import task_of

    spec = invflow.load_spec(
        {
            "input": {"shape": [1, 8, 8]},
            "layers": [{"type": "logit", **fields}],
            "prior": {"type": "standard_normal"},
            "training": {"data": {"name": "digits"}},
        }
    )
    task = task_of(invflow.build_model(spec), load_data(Data(name="digits")))
    if fits:
        task.check_range(spec)
    else:
        with pytest.raises(invflow.SpecError, match=r"layers: dequantised pixels of digits lie in \[0, 1.0625\]"):
            task.check_range(spec)


# The vectors of published.md, 4.3, rounded from 50 digits.
LOG_SLOPES = [
    (Sigmoid(), 10.0, -10.000090797798434), (Sigmoid(), -10.0, -10.000090797798434),
    (Sigmoid(), 0.0, -1.3862943611198906), (Sigmoid(), 50.0, -50.0),
    (Tanh(), 10.0, -18.613705643002417), (Tanh(), 0.5, -0.24022901391655505), (Tanh(), 50.0, -98.613705638880109),
    (Softplus(), -10.0, -10.000045398899217), (Softplus(), 10.0, -4.5398899216864647e-5), (Softplus(), 50.0, -1.93e-22),
    (Logit(0.05), 0.0, 2.9416650522837152), (Logit(0.05), 0.5, 1.2809338454620643),
]  # fmt: skip


INTERVALS = [Sigmoid(), Tanh(), Softplus()]


ENDS = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0), "positive": (0.0, math.inf)}


VECTOR = {torch.float64: 1e-12, torch.float32: 2e-6}  # the acceptance of the issue, relative to max(1, |value|)


def by_name(layer):
    return type(layer).__name__


@pytest.mark.parametrize("dtype", VECTOR)
@pytest.mark.parametrize(("layer", "x", "log_slope"), LOG_SLOPES)
def test_log_determinants_are_those_of_the_literature(layer, x, log_slope, dtype):
    x = torch.tensor([[x, x]], dtype=dtype)
    y, found = layer.forward_and_log_det(x)
    assert abs(found.item() / 2 - log_slope) <= VECTOR[dtype] * max(1, abs(log_slope))
    x, back = layer.inverse_and_log_det(y)
    torch.testing.assert_close(back, -layer.forward_and_log_det(x)[1], rtol=VECTOR[dtype], atol=VECTOR[dtype])


def test_the_logit_of_zero_is_that_of_the_literature():
    assert Logit(0.05)(torch.zeros(1, 1, dtype=torch.float64)).item() == pytest.approx(-2.9444389791664405, abs=1e-12)


def test_softplus_is_not_the_identity_before_rounding_makes_it_so():
    x = torch.tensor([[21.0]], dtype=torch.float64)
    assert Softplus()(x).item() - 21 == pytest.approx(math.exp(-21), abs=4e-15)  # a rounding of 21


@pytest.mark.parametrize("layer", INTERVALS, ids=by_name)
def test_maps_into_an_interval_in_float32_are_those_of_float64(layer):
    low, high = ENDS[layer.codomain]
    x = torch.cat([torch.zeros(1, dtype=torch.float64), sizes(), -sizes()]).float()[:, None]
    assert roundings(layer, "forward_and_log_det", x) <= 4
    near = [end + sign * sizes() for end in (low, high) for sign in (1, -1) if math.isfinite(end)]
    y = torch.cat([sizes(), -sizes(), *near]).float()[:, None]
    assert roundings(layer, "inverse_and_log_det", y[(y > low) & (y < high)][:, None]) <= 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layer", INTERVALS, ids=by_name)
def test_every_image_is_inside_of_the_interval_and_has_an_inverse(layer, dtype):
    low, high = ENDS[layer.codomain]
    numbers = torch.cat([torch.zeros(1, dtype=torch.float64), sizes()])
    x = torch.cat([numbers, -numbers]).to(dtype)
    x = x[x.abs() < torch.finfo(dtype).max / 2][:, None].requires_grad_()  # the log-determinant of tanh is about -2 |x|
    y, log_det = layer.forward_and_log_det(x)
    assert ((y > low) & (y < high)).all()
    back, inverse_log_det = layer.inverse_and_log_det(y)
    (gradient,) = torch.autograd.grad(y.sum() + log_det.sum(), x, retain_graph=True)
    (other,) = torch.autograd.grad(back.sum() + inverse_log_det.sum(), y)
    assert all(found.isfinite().all() for found in (log_det, back, inverse_log_det, gradient, other))


@pytest.mark.parametrize(
    ("layer", "dtype", "low", "high"),
    [
        (Sigmoid(), torch.float32, -87, 16), (Sigmoid(), torch.float64, -708, 36),
        (Tanh(), torch.float32, -8, 8), (Tanh(), torch.float64, -18, 18),
        (Softplus(), torch.float32, -87, 1e6), (Softplus(), torch.float64, -708, 1e9),
    ],
)  # fmt: skip
def test_a_round_trip_returns_what_the_documentation_says(layer, dtype, low, high):
    x = torch.linspace(low, high, 1001, dtype=dtype)[:, None]
    y, log_slope = layer.forward_and_log_det(x)
    back = layer.inverse(y)
    # A rounding of y, and of the sums that lead back, is divided by the slope.
    allowed = 4 * torch.finfo(dtype).eps * (y.abs() / log_slope.exp()[:, None] + x.abs().clamp(min=1))
    assert ((back - x).abs() <= allowed).all()
    assert (back - x).abs().max() < 1


@pytest.mark.parametrize("layer", INTERVALS, ids=by_name)
def test_outside_the_interval_a_density_is_zero_and_its_gradients_are_finite(layer):
    low, high = ENDS[layer.codomain]
    beyond = [-math.inf, -1e30, -200.0, low - 1, low, high, high + 1, 200.0, 1e30, math.inf]
    flow = Flow(Sequential(Inverse(layer), Affine((2,))), StandardNormal((2,)))
    for outside in (y for y in beyond if not low < y < high):
        y = torch.tensor([[0.25, outside], [0.25, 0.75]], requires_grad=True)
        found = flow.log_prob(y)
        assert found[0] == -math.inf
        assert found[1].isfinite()
        state, log_det = layer.inverse_and_log_det(y)
        assert state.isfinite().all()
        assert log_det[0] == -math.inf
        (gradient,) = torch.autograd.grad(found.sum(), y, retain_graph=True)
        assert gradient.isfinite().all()
    assert layer.inverse_and_log_det(torch.tensor([[math.nan]]))[1].isnan()


def test_the_gradient_at_the_end_of_a_logits_domain_is_finite():
    x = torch.tensor([[-0.25], [1.25], [0.5]], dtype=torch.float64, requires_grad=True)  # p is 0, 1, 0.5
    y, log_det = Logit(1 / 6).forward_and_log_det(x)
    assert log_det[:2].isneginf().all()
    (gradient,) = torch.autograd.grad(y.sum() + log_det.sum(), x)
    assert gradient.isfinite().all()


class TestLeakyRelu:
    @pytest.mark.parametrize("slope", [1e-4, 0.01, 1.0, 3.0, 1e4])
    def test_values_and_log_determinant(self, slope):
        layer = LeakyRelu(slope)
        x = torch.tensor([[-3.0, -0.5, 0.5, 4.0]], dtype=torch.float64)
        y, log_det = layer.forward_and_log_det(x)
        torch.testing.assert_close(y, torch.where(x > 0, x, slope * x))
        assert log_det.item() == pytest.approx(2 * math.log(slope))
        torch.testing.assert_close(layer.inverse(y), x)
        assert layer.inverse_and_log_det(y)[1].item() == -log_det.item()

    @pytest.mark.parametrize("slope", [0.0, -0.5, 1e-50])
    def test_a_slope_that_is_none_is_refused(self, slope):
        with pytest.raises(invflow.SpecError, match=r"layers\.0\.slope: .* greater than or equal to 0.0001"):
            invflow.build({"input": {"shape": [2]}, "layers": [{"type": "leaky_relu", "slope": slope}]})


class TestScale:
    @pytest.mark.parametrize("exponent", [-64, -3, 0, 1, 64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_round_trip_returns_every_bit(self, exponent, dtype):
        layer = Scale(exponent)
        x = torch.cat([sizes(), -sizes()]).to(dtype)[:, None]
        inside = (x.abs() < 2.0**63) & (x.abs() > 2.0**-62)  # y is a normal float32
        assert torch.equal(layer.inverse(layer(x))[inside], x[inside])
        assert torch.equal(layer(layer.inverse(x))[inside], x[inside])

    def test_external_values(self):
        chain = Sequential(Scale(1), Permute(order=[0, 1]), Scale(-2)).double()
        x = torch.randn(10, 2, 3, 4, dtype=torch.float64)
        y, log_det = chain.forward_and_log_det(x)
        assert torch.equal(y, x / 2)
        torch.testing.assert_close(
            log_det, torch.full((10,), 24 * math.log(0.5), dtype=torch.float64), rtol=1e-15, atol=0
        )

    def test_a_scale_of_minus_two_and_a_shift_of_two(self):
        """A negative scale is a linear map: no elementwise layer has one."""
        linear, affine = Linear1x1((2, 3, 4)), Affine((2, 3, 4))
        with torch.no_grad():
            linear.lower.zero_()
            linear.upper.zero_()
        linear.sign = -torch.ones(2)
        with torch.no_grad():
            linear.log_diagonal.zero_()
            affine.shift.fill_(2.0)
        chain = Sequential(Scale(1), linear, affine).double()
        x = torch.randn(10, 2, 3, 4, dtype=torch.float64)
        y, log_det = chain.forward_and_log_det(x)
        torch.testing.assert_close(y, -2 * x + 2)
        torch.testing.assert_close(
            log_det, torch.full((10,), 24 * math.log(2), dtype=torch.float64), rtol=1e-15, atol=0
        )

    @pytest.mark.parametrize("mode", ["grid", "exact"])
    @pytest.mark.parametrize(("exponent", "why"), [(1, r"2\^1 x leaves gaps"), (-3, r"2\^-3 x leads off it")])
    def test_on_a_grid_it_is_refused_at_its_place(self, mode, exponent, why):
        layers = [{"type": "scale", "exponent": 0}, {"type": "scale", "exponent": exponent}]
        document = {"input": {"shape": [2]}, "numerics": {"mode": mode}, "layers": layers}
        with pytest.raises(invflow.SpecError, match=rf"layers\.1: scale cannot be {mode}: of a grid, {why}"):
            invflow.build(document)
        document["layers"] = layers[:1]
        assert invflow.build(document).exactness != "float"
        document |= {"layers": layers, "numerics": {"mode": "snap"}}
        x = torch.arange(8).reshape(4, 2) / 256
        chain = invflow.build(document)
        assert torch.equal(chain.inverse(chain(x)), x)


class TestSinhArcsinh:
    def test_it_starts_as_the_identity(self):
        x = torch.randn(5, 3, 2, dtype=torch.float64)
        y, log_det = SinhArcsinh((3, 2)).double().forward_and_log_det(x)
        torch.testing.assert_close(y, x)
        torch.testing.assert_close(log_det, torch.zeros(5, dtype=torch.float64))

    def test_values_of_the_formula(self):
        layer = SinhArcsinh((2,)).double()
        with torch.no_grad():
            layer.skewness.copy_(torch.tensor([0.5, -1.0]))
            layer.log_tailweight.copy_(torch.tensor([0.7, -0.4]))
        weight = (2 * torch.tanh(layer.log_tailweight / 2)).exp()
        x = torch.linspace(-5, 5, 11, dtype=torch.float64)[:, None].expand(-1, 2)
        y, log_det = layer.forward_and_log_det(x)
        t = (torch.asinh(x) + layer.skewness) * weight
        torch.testing.assert_close(y, torch.sinh(t))
        torch.testing.assert_close(log_det, (weight * t.cosh() / (1 + x**2).sqrt()).log().sum(1))
        torch.testing.assert_close(layer.inverse(y), x)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_no_weights_and_no_input_make_a_number_that_is_not_finite(self, dtype):
        largest = torch.finfo(dtype).max
        values = [0.0, 0.3, -20.0, 30.0, -34.1, -45.0, 1e4, largest, -largest]
        weights = torch.cartesian_prod(torch.tensor(values, dtype=dtype), torch.tensor(values, dtype=dtype))
        layer = SinhArcsinh((len(weights),)).to(dtype)
        with torch.no_grad():
            layer.skewness.copy_(weights[:, 0])
            layer.log_tailweight.copy_(weights[:, 1])
        numbers = torch.cat([torch.zeros(1, dtype=torch.float64), sizes()[::50]]).to(dtype)
        x = torch.cat([numbers, -numbers, torch.tensor([largest, -largest], dtype=dtype)])[:, None]
        x = x.expand(-1, len(weights)).clone().requires_grad_()
        for call in (layer.forward_and_log_det, layer.inverse_and_log_det):
            y, log_det = call(x)
            assert y.isfinite().all()
            assert log_det.isfinite().all()
            gradients = torch.autograd.grad(
                (y / largest).sum() + log_det.sum(), [x, *layer.parameters()], retain_graph=True
            )
            gradients += torch.autograd.grad(y.sum(), x)
            assert not any(gradient.isnan().any() for gradient in gradients)

    def test_other_channels_are_refused(self):
        with pytest.raises(ShapeError, match="sinh_arcsinh expects 3 channels, got 2"):
            SinhArcsinh((3,))(torch.zeros(1, 2))
