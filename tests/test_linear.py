"""Linear layers: against their matrices, against peers, and at the weights that break others."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from torch.nn import functional

import invflow
from invflow import InvflowError, NumericsError, ShapeError
from invflow.bijections import ConvExponential, Haar, Householder, Linear1x1, Psi, Rotation
from invflow.bijections.conv_exponential import _terms
from invflow.measures import magnitude
from invflow.testing.trial import perturb

from .authors import spec_of

CLOSED_FORM = 1e-12
"""Round trips and matrices in float64, a few dozen roundings of numbers up to 100."""
SINGLE = 1e-5
"""In float32, 16 roundings of numbers up to 5."""
PEER = 1e-10
"""Equality with other implementations in float64, which sum in other orders."""
POSITIONS = [(), (5,), (4, 3), (2, 3, 2)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_batch(*shape):
    return torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def moved(layer, seed=0):
    """The layer in float64, its weights moved as by training."""
    perturb(layer.double(), seed)
    return layer


def matrix_of(layer, shape):
    """The dense matrix of a linear layer, column by column."""
    size = torch.Size(shape).numel()
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return (layer(unit) - layer(torch.zeros_like(unit))).flatten(1).T.detach()


@pytest.mark.parametrize("parametrization", ["plu", "lu", "plain"])
@pytest.mark.parametrize("positions", POSITIONS)
class TestLinear1x1:
    def test_the_log_det_counts_every_position(self, parametrization, positions):
        layer = moved(Linear1x1((3, *positions), bias=True, parametrization=parametrization))
        w = matrix_of(layer, (3, *[1] * len(positions)))
        expected = math.prod(positions) * torch.linalg.slogdet(w).logabsdet
        y, log_det = layer.forward_and_log_det(random_batch(3, *positions))
        torch.testing.assert_close(log_det, expected.expand(3), atol=CLOSED_FORM, rtol=0)
        assert torch.equal(layer.inverse_and_log_det(y)[1], -log_det)

    def test_it_is_a_1x1_convolution(self, parametrization, positions):
        layer = moved(Linear1x1((3, *positions), bias=True, parametrization=parametrization))
        x = random_batch(3, *positions)
        w = matrix_of(layer, (3, *[1] * len(positions)))
        expected = torch.einsum("oi,bip->bop", w, x.reshape(3, 3, -1)) + layer.bias[:, None]
        torch.testing.assert_close(layer(x), expected.reshape(x.shape), atol=CLOSED_FORM, rtol=0)
        torch.testing.assert_close(layer.inverse(layer(x)), x, atol=CLOSED_FORM, rtol=0)


class TestParametrizations:
    def test_a_bias_starts_at_zero_and_is_not_there_by_default(self):
        assert "bias" not in dict(Linear1x1((3,)).named_parameters())
        assert Linear1x1((3,), bias=True).bias.tolist() == [0, 0, 0]

    def test_the_state_of_the_default_is_that_of_earlier_versions(self):
        assert list(Linear1x1((2,)).state_dict()) == ["lower", "upper", "log_diagonal", "sign", "order"]

    @pytest.mark.parametrize("parametrization", ["plu", "plain"])
    def test_starts_as_a_rotation_or_a_reflection(self, parametrization):
        w = matrix_of(Linear1x1((6,), parametrization=parametrization).double(), (6,))
        # Made in float32: a dozen roundings of it.
        torch.testing.assert_close(w @ w.T, torch.eye(6, dtype=torch.float64), atol=2e-6, rtol=0)

    def test_lu_starts_as_the_identity_with_a_bias_of_zero(self):
        layer = Linear1x1((4, 2, 2), bias=True, parametrization="lu")
        x = torch.randn(2, 4, 2, 2)
        torch.testing.assert_close(layer(x), x, atol=1e-6, rtol=0)  # a few roundings in float32
        assert "order" not in layer.state_dict()
        assert sum(weight.numel() for weight in layer.parameters()) == 4 * 4 + 4  # as many as a matrix and a bias have

    def test_lu_never_comes_near_zero(self):
        layer = Linear1x1((3,), parametrization="lu")
        with torch.no_grad():
            layer.factors.fill_diagonal_(-1e4)
        x = torch.randn(5, 3)
        y, log_det = layer.forward_and_log_det(x)
        torch.testing.assert_close(log_det, torch.full((5,), 3 * math.log(1e-3)), atol=1e-5, rtol=0)
        torch.testing.assert_close(layer.inverse(y), x)
        log_det.sum().backward()
        assert layer.factors.grad.isfinite().all()

    def test_plain_weights_are_those_of_a_convolution(self):
        layer = Linear1x1((3, 4, 4), bias=True, parametrization="plain").double()
        x = random_batch(3, 4, 4)
        expected = functional.conv2d(x, layer.weight[:, :, None, None], layer.bias)
        torch.testing.assert_close(layer(x), expected, atol=CLOSED_FORM, rtol=0)

    def test_a_singular_plain_matrix_is_refused_in_one_line(self):
        layer = Linear1x1((3,), parametrization="plain")
        with torch.no_grad():
            layer.weight[2] = layer.weight[1] = 0
        assert layer.forward_and_log_det(torch.ones(2, 3))[1].tolist() == [-math.inf] * 2
        with pytest.raises(NumericsError, match=r"^the inverse of linear_1x1 expects a matrix that is not singular"):
            layer.inverse(torch.ones(2, 3))

    @pytest.mark.parametrize("positions", [(), (3, 4)])
    def test_lu_is_that_of_nflows(self, positions):
        lu = pytest.importorskip("nflows.transforms.lu")
        conv = pytest.importorskip("nflows.transforms.conv")
        other = conv.OneByOneConvolution(5) if positions else lu.LULinear(5)
        other.double()
        layer = moved(Linear1x1((5, *positions), bias=True, parametrization="lu"))
        with torch.no_grad():
            other.lower_entries.copy_(layer.factors[*other.lower_indices])
            other.upper_entries.copy_(layer.factors[*other.upper_indices])
            other.unconstrained_upper_diag.copy_(layer.factors.diagonal())
            other.bias.copy_(layer.bias)
        x = random_batch(5, *positions)
        expected, log_det = other(x)
        order = other.permutation._permutation if positions else torch.arange(5)
        y, found = layer.forward_and_log_det(x[:, order])
        torch.testing.assert_close(y, expected, atol=PEER, rtol=0)
        torch.testing.assert_close(found, log_det, atol=PEER, rtol=0)

    def test_glow_on_images_of_16_by_16(self):
        coupling = {"type": "affine_coupling", "net": {"type": "conv", "hidden": [8]}}
        step = [{"type": "actnorm"}, {"type": "linear_1x1"}, {"type": "split"}, coupling, {"type": "merge"}]
        chain = invflow.build(spec_of({"type": "psi", "block_size": 2}, *step * 4, shape=(3, 16, 16)))
        chain = moved(chain).eval()
        chain.requires_grad_(False)
        x = random_batch(3, 16, 16)
        y, log_det = chain.forward_and_log_det(x)
        back, inverse_log_det = chain.inverse_and_log_det(y)
        largest = magnitude(*chain.trace(x))
        assert float((back - x).abs().max()) <= CLOSED_FORM * largest
        torch.testing.assert_close(inverse_log_det, -log_det, atol=0, rtol=CLOSED_FORM)
        z = random_batch(12, 8, 8)
        assert float((chain(chain.inverse(z)) - z).abs().max()) <= CLOSED_FORM * largest


class TestHouseholder:
    @pytest.mark.parametrize("positions", POSITIONS)
    @pytest.mark.parametrize("reflections", [1, 2, 5])
    def test_it_is_the_product_of_its_reflections(self, positions, reflections):
        layer = Householder((3, *positions), reflections=reflections).double()
        product = torch.eye(3, dtype=torch.float64)
        for v in layer.vectors.detach():
            product = product @ (torch.eye(3, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v))
        found = matrix_of(layer, (3, *[1] * len(positions)))
        torch.testing.assert_close(found, product, atol=CLOSED_FORM, rtol=0)
        assert torch.linalg.det(found).item() == pytest.approx((-1) ** reflections, abs=CLOSED_FORM)
        x = random_batch(3, *positions)
        torch.testing.assert_close(layer.inverse(layer(x)), x, atol=CLOSED_FORM, rtol=0)

    @pytest.mark.parametrize("length", [0.0, 1e-45, 1e-30, 1e-17, 1e-3, 1e20, 1e38])
    def test_only_the_direction_of_a_vector_counts(self, length):
        layer = Householder((3,), reflections=3)
        same = copy.deepcopy(layer)
        with torch.no_grad():
            layer.vectors[1] *= length / layer.vectors[1].abs().max()
        if length < 1e-18:  # it reflects nothing
            same.vectors = torch.nn.Parameter(same.vectors.detach()[[0, 2]])
        x = torch.randn(4, 3)
        y = layer(x)
        torch.testing.assert_close(layer.inverse(y), x, atol=SINGLE, rtol=0)
        torch.testing.assert_close(y, same(x), atol=SINGLE, rtol=0)
        torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), atol=SINGLE, rtol=0)
        y.square().sum().backward()
        assert layer.vectors.grad.isfinite().all()

    def test_equal_vectors_cancel(self):
        layer = Householder((5,), reflections=2).double()
        with torch.no_grad():
            layer.vectors[1] = -3 * layer.vectors[0]
        x = random_batch(5)
        torch.testing.assert_close(layer(x), x, atol=CLOSED_FORM, rtol=0)

    def test_it_is_that_of_nflows(self):
        other = pytest.importorskip("nflows.transforms.orthogonal").HouseholderSequence(5, 4).double()
        layer = Householder((5,), reflections=4).double()
        with torch.no_grad():
            other.q_vectors.copy_(layer.vectors.flip(0))  # theirs come in the order in which they are applied
        x = random_batch(5)
        torch.testing.assert_close(layer(x), other(x)[0], atol=PEER, rtol=0)
        torch.testing.assert_close(layer.inverse(x), other.inverse(x)[0], atol=PEER, rtol=0)


class TestRotation:
    @pytest.mark.parametrize("channels", [1, 2, 3, 40])
    @pytest.mark.parametrize("seed", range(4))
    def test_it_is_a_rotation(self, channels, seed):
        q = matrix_of(Rotation((channels,), seed=seed).double(), (channels,))
        torch.testing.assert_close(q @ q.T, torch.eye(channels, dtype=torch.float64), atol=CLOSED_FORM, rtol=0)
        assert torch.linalg.det(q).item() == pytest.approx(1, abs=CLOSED_FORM)

    def test_a_seed_means_the_same_everywhere(self):
        source = random.Random(7)
        (a, _), (c, _) = ([source.gauss(0, 1) for _ in range(2)] for _ in range(2))
        column = torch.tensor([a, c], dtype=torch.float64) / math.hypot(a, c)
        q = matrix_of(Rotation((2,), seed=7).double(), (2,))
        # The first column is that of the drawn matrix; to be no reflection, the first row may have the other sign.
        torch.testing.assert_close(q[:, 0] * torch.tensor([(q[0, 0] / column[0]).sign(), 1]), column)
        torch.testing.assert_close(q[:, 1], torch.stack([-q[1, 0], q[0, 0]]))

    def test_no_parameters_and_no_loss_in_casts(self):
        layer = Rotation((6,), seed=3)
        assert not list(layer.parameters())
        q = matrix_of(copy.deepcopy(layer).double(), (6,))
        assert torch.equal(matrix_of(layer.half().float().double(), (6,)), q)

    def test_loaded_entries_are_those_that_act(self):
        layer, x = Rotation((6,), seed=3), torch.randn(4, 6)
        with torch.device("meta"):
            other = Rotation((6,), seed=4)
        assert torch.equal(copy.deepcopy(other).to_empty(device="cpu")(x), Rotation((6,), seed=4)(x))
        other.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(other(x), layer(x))

    def test_what_is_no_rotation_is_refused(self):
        layer = Rotation((3,))
        state = layer.state_dict()
        state["entries"] = state["entries"] // 2
        with pytest.raises(InvflowError, match=r"rotation expects an orthogonal matrix, got entries .* by 0\.75"):
            layer.load_state_dict(state)

    def test_the_mean_rotation_is_zero(self):
        """Of 400, with a standard deviation of 1 / sqrt(2 * 400) an entry: a bias in sign would show."""
        mean = sum(matrix_of(Rotation((2,), seed=seed).double(), (2,)) for seed in range(400)) / 400
        assert mean.abs().max() < 5 / math.sqrt(800)


class TestHaar:
    @pytest.mark.parametrize("sides", [(2,), (2, 2), (2, 2, 2)])
    def test_the_signs_of_each_band(self, sides):
        count = 2 ** len(sides)
        signs = torch.tensor(
            [[(-1.0) ** (band & place).bit_count() for place in range(count)] for band in range(count)]
        )
        found = matrix_of(Haar(), (1, *sides))
        torch.testing.assert_close(found, signs.double() / math.sqrt(count), atol=CLOSED_FORM, rtol=0)

    def test_an_image_by_hand(self):
        image = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 8.0]]).reshape(1, 1, 2, 4)
        assert Haar()(image).reshape(4, 2).tolist() == [[5, 4], [-1, -4], [-2, -4], [0, 4]]

    def test_a_sequence_by_hand(self):
        y = Haar()(torch.tensor([[[1.0, 3.0, 5.0, -5.0]]])).reshape(2, 2) * math.sqrt(2)
        torch.testing.assert_close(y, torch.tensor([[4.0, 0.0], [-2.0, 10.0]]))

    @pytest.mark.parametrize("layout", ["block", "channel"])
    @pytest.mark.parametrize("shape", [(3, 4), (2, 4, 2), (2, 2, 4, 2)])
    def test_it_is_orthonormal(self, layout, shape):
        matrix = matrix_of(Haar(layout=layout), shape)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-12, rtol=0)
        x = random_batch(*shape)
        y, log_det = Haar(layout=layout).forward_and_log_det(x)
        assert log_det.tolist() == [0.0] * 3
        torch.testing.assert_close(Haar(layout=layout).inverse(y), x, atol=CLOSED_FORM, rtol=0)

    @pytest.mark.parametrize("layout", ["block", "channel"])
    def test_bands_lie_where_psi_puts_places(self, layout):
        x = torch.ones(1, 3, 4, 4) * torch.arange(1, 4).reshape(3, 1, 1)
        y = Haar(layout=layout)(x)
        averages = y[:, :3] if layout == "block" else y[:, ::4]
        assert torch.equal(averages, 2 * x[:, :, ::2, ::2])
        assert y.count_nonzero() == averages.numel()
        assert Haar(layout=layout).output_shape((3, 4, 4)) == Psi(2, layout=layout).output_shape((3, 4, 4))

    @pytest.mark.parametrize(("layout", "by_wavelet"), [("block", True), ("channel", False)])
    def test_it_is_that_of_freia(self, layout, by_wavelet):
        modules = pytest.importorskip("FrEIA.modules")
        other = modules.HaarDownsampling([(3, 4, 6)], order_by_wavelet=by_wavelet).double()
        x = random_batch(3, 4, 6)
        (expected,), log_det = other([x])
        torch.testing.assert_close(Haar(layout=layout)(x), expected, atol=PEER, rtol=0)
        assert float(log_det) == 0

    def test_an_odd_side_is_refused(self):
        with pytest.raises(ShapeError, match="haar expects a height and a width that 2 divides, got 3 x 4"):
            Haar().output_shape((1, 3, 4))
        with pytest.raises(ShapeError, match="the inverse of haar expects channels that 8 divides, got 4"):
            Haar().inverse(torch.zeros(1, 4, 1, 1, 1))


class TestConvExponential:
    @pytest.mark.parametrize("shape", [(2, 5), (2, 4, 3), (2, 2, 3, 2)])
    @pytest.mark.parametrize("size", [0.1, 10.0])
    def test_it_is_the_exponential_of_a_convolution(self, shape, size):
        layer = ConvExponential(shape).double()
        with torch.no_grad():
            layer.kernel.copy_(size * torch.randn_like(layer.kernel))
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(shape) - 2]
        kernel = layer.kernel.detach()
        inputs, outputs = (kernel.abs().flatten(2).sum(2).sum(dim) for dim in (0, 1))
        kernel = kernel / max(1.0, float(inputs.max()), float(outputs.max()))
        m = matrix_of(lambda x: convolve(x, kernel, padding=1), shape)
        torch.testing.assert_close(matrix_of(layer, shape), torch.matrix_exp(m), atol=CLOSED_FORM, rtol=0)
        x = random_batch(*shape)
        y, log_det = layer.forward_and_log_det(x)
        torch.testing.assert_close(log_det, m.trace().expand(3), atol=CLOSED_FORM, rtol=0)
        torch.testing.assert_close(layer.inverse(y), x, atol=CLOSED_FORM, rtol=0)

    @pytest.mark.parametrize("scale", [0.0, 1.0, 1e6, 1e30])
    @pytest.mark.parametrize("bound", [0.5, 4.0])
    def test_no_weights_make_it_singular(self, scale, bound):
        layer = ConvExponential((3, 5, 4), kernel_size=5, bound=bound)
        with torch.no_grad():
            layer.kernel.copy_(scale * torch.randn_like(layer.kernel))
        values = torch.linalg.svdvals(matrix_of(copy.deepcopy(layer).double(), (3, 5, 4)))
        forward, inverse = layer.lipschitz_bounds()
        assert float(values[0]) <= forward * (1 + 1e-6)  # float32
        assert float(values[-1]) * inverse >= 1 - 1e-6
        assert max(forward, inverse) <= math.exp(bound) * (1 + 1e-6)
        x = torch.randn(2, 3, 5, 4)
        y, log_det = layer.forward_and_log_det(x)
        # Roundings of float32 in y, which the inverse may multiply by exp(bound).
        torch.testing.assert_close(layer.inverse(y), x, atol=4e-6 * math.exp(bound), rtol=0)
        (y.sum() + log_det.sum()).backward()
        assert layer.kernel.grad.isfinite().all()

    def test_the_number_of_terms(self):
        """Of the bound 1: 1 / 12! and 1 / 20! are below a quarter of a rounding of exp(-1)."""
        for dtype, count in ((torch.float32, 11), (torch.float64, 18)):
            allowed = torch.finfo(dtype).eps / 4 / math.e
            assert 1 / math.factorial(count + 1) <= allowed < 1 / math.factorial(count)
            assert _terms(1.0, dtype) == count

    def test_vectors_and_other_dimensions_are_refused(self):
        with pytest.raises(ShapeError, match="conv_exponential expects a shape"):
            ConvExponential((3,))
        with pytest.raises(ShapeError, match="conv_exponential expects 3 dimensions besides the batch"):
            ConvExponential((3, 4, 4))(torch.zeros(1, 3, 4))


@pytest.mark.parametrize("parametrization", ["plu", "lu", "plain"])
def test_weights_are_contiguous(parametrization):
    """As `torch.nn.utils.parameters_to_vector` needs them; factorisations return columns."""
    layer = Linear1x1(shape=(5, 2, 2), parametrization=parametrization)
    assert all(weight.is_contiguous() for weight in layer.parameters())
