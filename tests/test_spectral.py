"""Spectral normalisation: the norm is that of the map itself and follows every change of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import invflow
from invflow import ShapeError
from invflow.nets import LipschitzConv, LipschitzMLP, SpectralConv, SpectralLinear
from invflow.nets import lipschitz as lipschitz_module
from invflow.nets.spectral import gram_bound, top_singular_pair

DECLARED = 1.001
"""The largest norm of a map whose norm is declared to be 1."""

VALUE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Relative error of a converged norm: the square of the residual, over a gap that is not too small, plus rounding."""

GRADIENT = 1e-6
"""Relative to its largest entry, in float64: the residual over a gap of 1e-4."""

HOSTILE = ("as drawn", "twentyfold", "rank one", "ill-conditioned", "clustered", "tiny", "huge")


def dense(layer, weight=None):
    """The matrix of a layer's linear map, in float64."""
    weight = (layer.weight if weight is None else weight).detach().double()
    size = torch.Size(layer.in_shape).numel()
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *layer.in_shape)
    return layer.linear(basis, weight).flatten(1).T


def true_norm(layer, weight=None):
    return float(torch.linalg.matrix_norm(dense(layer, weight), 2))


def hostile(kind, shape, seed):
    """Weights for which iterations converge slowly or fail."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    flat = weight.flatten(1)
    if kind == "twentyfold":
        flat = 20 * flat
    elif kind == "rank one":
        flat = flat[:, :1] @ flat[:1]
    elif kind in ("ill-conditioned", "clustered"):
        u, values, v = torch.linalg.svd(flat, full_matrices=False)
        steps = torch.arange(len(values), dtype=torch.float64)
        flat = (u * (10.0 ** -(2 * steps) if kind == "ill-conditioned" else 1 - 1e-4 * steps)) @ v
    elif kind in ("tiny", "huge"):
        flat = flat * (1e-12 if kind == "tiny" else 1e12)
    return flat.reshape(shape)


@st.composite
def layers(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        return SpectralLinear(draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    kernel = draw(st.integers(1, 4))
    size = draw(st.sampled_from([2, 2, 1, 3]).flatmap(lambda dims: st.tuples(*dims * [st.integers(4, 8 - dims)])))
    padding = draw(st.none() | st.integers(0, 3))
    return SpectralConv(*draw(st.tuples(*2 * [st.integers(1, 6)])), kernel, size, draw(st.integers(1, 3)), padding)


@given(layer=layers(), kind=st.sampled_from(HOSTILE), dtype=st.sampled_from(list(VALUE)), seed=st.integers(0, 999))
def test_the_norm_is_that_of_the_dense_map_for_hostile_weights(layer, kind, dtype, seed):
    assert true_norm(layer, layer.normalized_weight()) <= DECLARED  # as initialised
    layer = layer.to(dtype)
    with torch.no_grad():
        layer.weight.copy_(hostile(kind, layer.weight.shape, seed))
    expected = true_norm(layer)
    for training in (True, False, True):
        layer.training = training  # without train(), which would update the singular vectors
        assert float(layer.norm().detach()) == pytest.approx(expected, rel=VALUE[dtype])
        assert true_norm(layer, layer.normalized_weight()) <= DECLARED
    assert float(layer.certified_norm()) >= expected * (1 - VALUE[dtype])
    if expected < 1 - VALUE[dtype]:
        assert torch.equal(layer.normalized_weight(), layer.weight)


@given(layer=layers(), bound=st.floats(0.1, 1), seed=st.integers(0, 999))
def test_a_norm_above_the_bound_becomes_the_bound(layer, bound, seed):
    layer.double().bound = bound
    with torch.no_grad():
        layer.weight.copy_(hostile("as drawn", layer.weight.shape, seed))
    before = true_norm(layer)
    assert true_norm(layer, layer.normalized_weight()) == pytest.approx(min(before, bound), rel=VALUE[torch.float64])


@pytest.mark.parametrize("largest", [1e-20, 1.0, 1e30])
def test_neither_the_iteration_nor_its_square_under_or_overflows(largest):
    layer = SpectralConv(1, 1, 3, (1, 1))  # whose outer weights only meet the padding
    with torch.no_grad():
        layer.weight.fill_(largest)[..., 1, 1] = 1e-15 * largest
    assert float(layer.norm().detach()) == pytest.approx(1e-15 * largest, rel=1e-5)


def test_the_pair_of_a_1x1_convolution_is_one_of_the_whole_map():
    layer = SpectralConv(5, 3, 1, (4, 6)).double().eval()
    image = layer.linear(layer.v[None], layer.weight)[0]
    assert torch.allclose(image, layer.norm() * layer.u, atol=1e-10)
    assert float(layer.norm().detach()) == pytest.approx(true_norm(layer), rel=VALUE[torch.float64])
    assert float((layer.v != 0).sum()) == 5


@pytest.mark.parametrize(("channels", "stride"), [((1, 12), 1), ((12, 1), 1), ((2, 40), 2), ((40, 2), 2)])
def test_the_pair_of_few_channels_is_one_of_the_whole_map(channels, stride):
    torch.manual_seed(0)
    layer = SpectralConv(*channels, 3, (6, 5), stride).double().eval()
    assert float(layer.norm().detach()) == pytest.approx(true_norm(layer), rel=VALUE[torch.float64])
    assert torch.allclose(layer.linear(layer.v[None], layer.weight)[0], layer.norm() * layer.u, atol=1e-10)
    assert torch.allclose(layer.transposed(layer.u[None], layer.weight)[0], layer.norm() * layer.v, atol=1e-9)
    reduced, after, before = layer._fewer_channels(layer.weight.detach())
    assert reduced.numel() < layer.weight.numel()
    assert (after is None) == (before is not None)


def test_where_values_cluster_at_full_size():
    layer = SpectralConv(8, 32, 3, (9, 9))
    with torch.no_grad():
        layer.weight.copy_(20 * hostile("clustered", layer.weight.shape, seed=0))
    assert true_norm(layer, layer.normalized_weight()) <= DECLARED
    assert float(layer.margin) <= DECLARED


@pytest.mark.parametrize("make", [lambda: SpectralLinear(7, 5), lambda: SpectralConv(3, 4, 3, (5, 6))])
def test_the_gradient_of_the_norm_is_that_of_the_dense_map(make):
    torch.manual_seed(0)
    layer = make().double()
    size = torch.Size(layer.in_shape).numel()
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *layer.in_shape)
    exact = torch.linalg.matrix_norm(layer.linear(basis, layer.weight).flatten(1).T, 2)
    (expected,) = torch.autograd.grad(exact, layer.weight)
    (found,) = torch.autograd.grad(layer.norm(), layer.weight)
    assert float((found - expected).abs().max() / expected.abs().max()) <= GRADIENT


def test_the_constant_moves_with_the_weights_and_with_nothing_else():
    torch.manual_seed(0)
    layer = SpectralConv(2, 3, 3, (5, 5))
    x = torch.randn(4, 2, 5, 5)

    def moved(change):
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        change()
        first = layer(x)
        for mode in (True, False, True):
            assert torch.equal(layer.train(mode)(x), first)
        return any(not torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())

    def step():
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        layer(x).square().sum().backward()
        optimizer.step()

    layer.train()
    assert not moved(lambda: None)
    assert not moved(lambda: layer(2 * x))
    assert moved(step)
    assert moved(lambda: layer.weight.data.mul_(20))
    assert moved(lambda: layer.weight.data[0].fill_(0))
    assert moved(lambda: layer.load_state_dict(SpectralConv(2, 3, 3, (5, 5)).state_dict()))
    assert true_norm(layer, layer.normalized_weight()) <= DECLARED


def test_a_singular_vector_that_is_not_the_top_one_any_more_is_left():
    layer = SpectralLinear(40, 40)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.linspace(2, 1, 40)))
        layer.train()
        assert float(layer.norm()) == pytest.approx(2.0)
        for vector in (layer.u, layer.v):  # without rounding errors, which would leave it
            vector.copy_(torch.eye(40)[0])
        layer.weight.copy_(torch.diag(torch.linspace(1, 3, 40)))  # the old vector is still singular
        assert float(layer.norm()) == pytest.approx(3.0, rel=1e-5)


def test_in_eval_mode_a_hand_edit_moves_no_buffer_and_counts_all_the_same():
    layer = SpectralLinear(6, 6).eval()
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        layer.weight.mul_(50)
    assert true_norm(layer, layer.normalized_weight()) <= DECLARED
    assert all(torch.equal(layer.state_dict()[name], before[name]) for name in ("u", "v", "margin", "fingerprint"))


def test_reloaded_weights_have_the_same_constants(tmp_path):
    chain = invflow.build({"input": {"shape": [2, 4, 4]}, "layers": [{"type": "residual"}] * 2})
    with torch.no_grad():
        for weight in chain.parameters():
            weight.mul_(20)
    x = torch.randn(3, 2, 4, 4)
    for settled in (False, True):
        if settled:
            chain.train()
        invflow.save(chain, tmp_path)
        again = invflow.load(tmp_path)
        assert torch.equal(again(x), chain(x))
        for layer in again.modules():
            if isinstance(layer, SpectralConv):
                assert true_norm(layer, layer.normalized_weight()) <= DECLARED


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_weights_without_a_norm_do_not_hang(value):
    layer = SpectralConv(2, 2, 3, (4, 4))
    with torch.no_grad():
        layer.weight.fill_(value)
    y = layer(torch.ones(1, 2, 4, 4))
    assert y.isfinite().all() == (value == 0)


def test_a_kernel_that_meets_nothing_but_the_border_has_the_norm_0():
    layer = SpectralConv(2, 1, 3, (1, 1))
    with torch.no_grad():
        layer.weight[:, :, 1, 1] = 0
    assert float(layer.norm().detach()) == 0
    assert torch.equal(layer(torch.ones(1, 2, 1, 1)), layer.bias.reshape(1, 1, 1, 1))


def test_half_precision_weights_are_normalised_in_single():
    layer = SpectralLinear(30, 30).bfloat16()
    with torch.no_grad():
        layer.weight.mul_(100)
    assert float(layer.norm().detach()) == pytest.approx(true_norm(layer), rel=torch.finfo(torch.bfloat16).eps)


def test_construction_does_not_iterate():
    """It would cost many times the weights; the first call, or a change of mode, finds the pair."""
    layer = SpectralConv(3, 3, 3, (6, 6))
    assert int(layer.fingerprint) == 0
    fresh = copy.deepcopy(layer).eval()
    assert int(fresh.fingerprint) != 0
    assert torch.equal(layer.norm(), fresh.norm())


def test_what_stops_short_is_covered_by_the_certified_bound(monkeypatch):
    monkeypatch.setattr("invflow.nets.spectral.STEPS", 2)
    monkeypatch.setattr("invflow.nets.spectral.RESTARTS", 1)
    torch.manual_seed(0)
    layer = SpectralConv(3, 3, 3, (6, 6)).train()
    assert float(layer.margin) > 1
    assert true_norm(layer) <= float(layer.norm().detach()) <= float(layer.certified_norm()) * DECLARED


@given(seed=st.integers(0, 999), rows=st.integers(1, 12), columns=st.integers(1, 12))
def test_top_singular_pair_and_gram_bound_on_matrices(seed, rows, columns):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    start = torch.randn(columns, generator=generator, dtype=torch.float64)
    u, v, norm, residual = top_singular_pair(lambda x: matrix @ x, lambda y: matrix.T @ y, start, 1e-12)
    expected = float(torch.linalg.matrix_norm(matrix, 2))
    assert norm == pytest.approx(expected, rel=1e-12)
    assert residual <= 1e-10 * norm
    assert float((matrix @ v - norm * u).norm()) <= 1e-10 * norm
    assert expected * (1 - 1e-12) <= float(gram_bound(matrix[None])) <= 1.02 * expected


@given(
    kind=st.sampled_from(HOSTILE),
    activation=st.sampled_from(sorted(lipschitz_module._CONTRACTIONS)),
    seed=st.integers(0, 999),
    hidden=st.lists(st.integers(1, 9), max_size=2),
    positions=st.sampled_from([(), (5,), (4, 3), (2, 3, 2)]),
)
def test_the_dense_jacobian_of_a_net_is_at_most_one(kind, activation, seed, hidden, positions):
    torch.manual_seed(seed)
    if positions:
        net = LipschitzConv((2, *positions), (3, *positions), hidden=hidden, activation=activation).double()
    else:
        net = LipschitzMLP((5,), (4,), hidden=hidden, activation=activation).double()
    with torch.no_grad():
        for number, layer in enumerate(net.maps):
            layer.weight.copy_(hostile(kind, layer.weight.shape, seed + number))
    x = torch.randn(2 if positions else 5, *positions, dtype=torch.float64)
    matrix = torch.func.jacrev(lambda x: net(x[None])[0].flatten())(x).flatten(1)
    assert float(torch.linalg.matrix_norm(matrix.detach(), 2)) <= DECLARED
    assert net.lipschitz_bound() == 1.0


@pytest.mark.parametrize(("cls", "shape"), [(LipschitzMLP, (5,)), (LipschitzConv, (2, 4, 3))])
def test_the_bound_of_a_net_is_the_product_of_those_of_its_maps(cls, shape):
    torch.manual_seed(0)
    net = cls(shape, shape, hidden=[4, 4], bound=0.8).double()
    with torch.no_grad():
        for layer in net.maps:
            layer.weight.mul_(20)
    net.train()
    assert net.lipschitz_bound() == pytest.approx(0.8**3)
    norms = [true_norm(layer, layer.normalized_weight()) for layer in net.maps]
    assert norms == pytest.approx([0.8] * 3, rel=1e-8)


@pytest.mark.parametrize("name", sorted(lipschitz_module._CONTRACTIONS))
def test_no_activation_is_steeper_than_one(name):
    activation = lipschitz_module._CONTRACTIONS[name]().double()
    for beta in (0.5, -5.0, 20.0):
        if name == "lipswish":
            nn.init.constant_(activation.beta, beta)
        x = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
        slope = activation(x[None])[0].detach().diff() / x.diff()
        steepest = float(slope.abs().max()) if name != "maxmin" else 1.0
        assert steepest <= 1 + 1e-9
        assert steepest > 0.2  # not needlessly flat
    a, b = torch.randn(2, 100, 6, dtype=torch.float64)
    assert ((activation(a) - activation(b)).norm(dim=1) <= (a - b).norm(dim=1) * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectralConv(1, 1, 3, (5, 5))(torch.zeros(1, 1, 6, 5)), "its norm would differ"),
        (lambda: SpectralConv(1, 1, 5, (2, 2), padding=0), "larger inputs than 2 x 2"),
        (lambda: LipschitzConv((2, 4, 4), (2, 4, 4), kernel_sizes=[3]), "expects as many kernel_sizes"),
        (lambda: LipschitzConv((2, 4, 4), (2, 2, 2)), "keeps the positions"),
        (lambda: LipschitzMLP((3,), (3,))(torch.zeros(1, 4)), "lipschitz_mlp expects the shape"),
        (lambda: LipschitzMLP((3,), (3,), (2,))(torch.zeros(1, 3)), "expects a context of shape"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ShapeError if "kernel_sizes" not in message else ValueError, match=message):
        call()
