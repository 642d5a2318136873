"""A state on a grid: exact, or refused before a bit is lost."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import invflow
from invflow import NumericsError, Sequential
from invflow.bijections import AdditiveCoupling, Inverse, Merge, Permute, Psi, Split
from invflow.nets import MLP, Conv
from invflow.numerics import Grid, grid, same_batch

DTYPES = {torch.float32: 24, torch.float64: 53}


class Constant(nn.Module):
    """Returns one number everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, context=None):
        return torch.full_like(x, self.value)


def coupled(*nets, mode="grid", **options):
    return Sequential(
        Split(), *(AdditiveCoupling(net) for net in nets), Merge(), numerics={"mode": mode, **options}
    ).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0, 8, 16])
def test_the_range_ends_where_the_dtype_holds_no_grid(dtype, bits):
    """The last state is exact, and the first beyond it, which rounds on to the bound itself, is refused."""
    step, bound = 2.0**-bits, 2.0 ** (DTYPES[dtype] - bits)
    assert grid.limit(dtype, bits) == bound
    x = torch.tensor([[0.0, bound - step]], dtype=dtype)
    still = coupled(Constant(-step), frac_bits=bits).to(dtype)
    assert torch.equal(still.inverse(still(x)), x)
    for much in (step, 2 * step):  # bound, and bound + step, which is no float: it rounds to the bound
        beyond = coupled(Constant(much), frac_bits=bits).to(dtype)
        with pytest.raises(NumericsError, match="layer 1 of 3: additive_coupling: reaches"):
            beyond(x)


def test_a_refusal_says_who_and_what_to_do():
    x = torch.tensor([[0.0, 200.0]])
    chain = coupled(Constant(0.5), Constant(100.0))
    with pytest.raises(NumericsError) as raised:
        chain(torch.tensor([[200.0, 0.0]]))
    assert str(raised.value) == (
        "layer 2 of 4: additive_coupling: reaches 300, but float32 holds multiples of 2^-16 below 256 only; "
        "use frac_bits 15 or float64"
    )
    assert torch.equal(chain.double().inverse(chain(x.double())), x.double())
    assert coupled(Constant(100.0), frac_bits=15)(x).max() == 300.0


@pytest.mark.parametrize("value", [0.3, 1 / 255, 2.0**-17, 1e-30, math.nan, math.inf, -math.inf])
def test_what_is_off_the_grid_is_refused_by_name(value):
    x = torch.tensor([[0.5, value]])
    for call in (coupled(Constant(0.5)), coupled(Constant(0.5)).inverse):
        with pytest.raises(NumericsError, match=r"expects multiples of 2\^-16, got .* and 0 other such numbers"):
            call(x)


def test_snap_at_entry_rounds_to_the_nearest():
    chain = coupled(Constant(0.5), entry="snap", frac_bits=2)
    assert chain.inverse(chain(torch.tensor([[0.3, -0.9]]))).tolist() == [[0.25, -1.0]]
    with pytest.raises(NumericsError, match="expected numbers on the grid"):
        chain(torch.tensor([[math.nan, 0.0]]))


@pytest.mark.parametrize("value", [1e6, 256.0, -256.0])
def test_what_is_too_large_is_refused_at_entry(value):
    with pytest.raises(NumericsError, match="the state that enters: reaches"):
        coupled(Constant(0.5))(torch.tensor([[value, 0.0]]))


def test_whole_numbers_are_no_state():
    with pytest.raises(NumericsError, match=r"expects floating-point states, got torch\.int64"):
        coupled(Constant(0.5))(torch.ones(1, 2, dtype=torch.int64))


def test_the_sign_of_zero_changes_nothing():
    """Not even where the net divides by its input."""

    class Reciprocal(nn.Module):
        def forward(self, x, context=None):
            return (1 / x).clamp(-3, 3)

    chain = coupled(Reciprocal(), Reciprocal(), Reciprocal())
    x = torch.tensor([[-0.0, 0.0], [0.0, -0.0], [-0.0, -0.0]])
    assert torch.equal(chain.inverse(chain(x)), x)
    assert torch.equal(chain(x), chain(x + 0.0))


@pytest.mark.parametrize("makes", [math.nan, math.inf, -math.inf, 1e38])
def test_a_conditioner_that_overflows_is_refused(makes):
    with pytest.raises(NumericsError, match="additive_coupling"):
        coupled(Constant(makes))(torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_a_thousand_couplings_are_exact_or_refused(dtype, batch):
    """Gain 1: each net is a rotation of its input, so that states grow, and at last leave the range of float32."""
    torch.manual_seed(0)
    layers = []
    for _ in range(1000):
        net = nn.Linear(4, 4, bias=False)
        nn.init.orthogonal_(net.weight)
        layers.append(AdditiveCoupling(net))
    x = (torch.randint(256, (batch, 4)).to(dtype) / 256, torch.randint(256, (batch, 4)).to(dtype) / 256)
    exact = []
    with torch.no_grad():
        for depth in (1, 10, 30, 100, 300, 1000):
            chain = Sequential(*layers[:depth], numerics={"mode": "grid"}).to(dtype)
            try:
                y = chain(x)
            except NumericsError:
                break
            back = chain.inverse(y)
            assert torch.equal(back[0], x[0])
            assert torch.equal(back[1], x[1])
            exact.append(depth)
    assert exact[-1] in (10, 30, 100)


def test_a_thousand_couplings_that_do_not_grow_are_exact():
    torch.manual_seed(0)
    couplings = [AdditiveCoupling(MLP((4,), (4,), hidden=[8], activation="tanh")) for _ in range(1000)]
    for coupling in couplings:
        with torch.no_grad():
            coupling.net[-1].weight.mul_(0.02)
    chain = Sequential(Split(), *couplings, Merge(), numerics={"mode": "grid"})
    x = torch.randint(256, (7, 8)) / 256
    with torch.no_grad():
        assert torch.equal(chain.inverse(chain(x)), x)
    plain = Sequential(*copy.deepcopy(chain))
    for layer in plain:
        layer.set_numerics(invflow.numerics.Float(mode="float"))
    with torch.no_grad():
        assert not torch.equal(plain.inverse(plain(x)), x)


NETS = {
    "batch norm": lambda: Conv((4, 3, 3), (4, 3, 3), hidden=[6], norm="batch"),
    "dropout": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Dropout(0.5)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
}


@pytest.mark.parametrize("name", NETS)
def test_an_inverse_by_another_function_is_refused(name):
    chain = coupled(NETS[name]())
    x = torch.randint(256, (6, 8, 3, 3)) / 256
    y = chain(x)
    assert torch.equal(chain.inverse(y), x)
    chain.train()
    y = chain(x)  # for gradients, as in training
    for inverse in (chain.inverse, chain.inverse_and_log_det):
        with pytest.raises(NumericsError, match=r"so that its inverse need not be exact; call eval\(\) first"):
            inverse(y[:3])


def test_the_whole_batch_goes_back_in_train_mode():
    chain = coupled(NETS["batch norm"]()).train()
    x = torch.randint(256, (6, 8, 3, 3)) / 256
    with torch.no_grad(), same_batch():
        assert torch.equal(chain.inverse(chain(x)), x)
        assert not torch.equal(chain.inverse(chain(x)[:3]), x[:3])  # what the refusal is about


def test_batch_norm_without_statistics_is_float():
    layer = AdditiveCoupling(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    assert layer.limit.level == "float"
    with pytest.raises(NumericsError, match="layer 0 of 1: additive_coupling cannot be grid: its net's batch norm"):
        Sequential(layer, numerics={"mode": "grid"})


def test_autocast_changes_no_bit():
    chain = coupled(Conv((4, 3, 3), (4, 3, 3), hidden=[6]), Conv((4, 3, 3), (4, 3, 3)))
    x = torch.randint(256, (6, 8, 3, 3)) / 256
    with torch.no_grad():
        y = chain(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(chain(x), y)
            assert torch.equal(chain.inverse(y), x)


def test_a_conditioner_in_float64_trains_as_one_in_float32():
    torch.manual_seed(0)
    chain = coupled(Conv((4, 3, 3), (4, 3, 3), hidden=[6], norm="batch"), conditioner_dtype="float64").train()
    plain = coupled(Conv((4, 3, 3), (4, 3, 3), hidden=[6], norm="batch")).train()
    plain.load_state_dict(copy.deepcopy(chain.state_dict()))
    x = torch.randint(256, (6, 8, 3, 3)) / 256
    for one in (chain, plain):
        one(x).square().sum().backward()
    for (name, a), b in zip(chain.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)  # a step of the grid apart
    for a, b in zip(chain.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert chain[1].net[1].num_batches_tracked == 1


@pytest.mark.parametrize("mode", ["grid", "snap"])
def test_gradients_are_straight_through(mode):
    """Those of the chain in real numbers, at the states that rounding leads to."""
    torch.manual_seed(0)
    chain = coupled(MLP((2,), (2,), hidden=[8], activation="tanh"), mode=mode, frac_bits=20).double()
    plain = Sequential(*copy.deepcopy(chain))
    for layer in plain:
        layer.set_numerics(invflow.numerics.Float(mode="float"))
    x = (torch.randint(256, (6, 4)) / 256).double()
    for call in ("forward", "inverse"):
        found = []
        for one in (chain, plain):
            start = x.clone().requires_grad_()
            getattr(one, call)(start).square().sum().backward()
            found.append([start.grad, *(weight.grad.clone() for weight in one.parameters())])
            one.zero_grad()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_reversible_training_on_a_grid_reconstructs_every_bit(norm):
    """So its gradients are those of plain training to the bit, in float32, however deep."""
    torch.manual_seed(0)
    nets = [Conv((4, 3, 3), (4, 3, 3), hidden=[6], norm=norm) for _ in range(12)]
    x = torch.randint(256, (6, 8, 3, 3)) / 256
    found = {}
    for backprop in ("stored", "reversible"):
        couplings = [AdditiveCoupling(net) for net in copy.deepcopy(nets)]
        chain = Sequential(Split(), *couplings, Merge(), backprop=backprop, numerics={"mode": "grid"}).train()
        start = x.clone().requires_grad_()
        chain(start).square().sum().backward()
        found[backprop] = [start.grad, *(weight.grad for weight in chain.parameters()), *chain.buffers()]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_graph_that_cannot_raise_spreads_not_a_number():
    chain = coupled(Constant(300.0))
    y = torch.func.vmap(lambda row: chain(row[None])[0])(torch.tensor([[0.0, 0.5], [0.0, -100.0]]))
    assert y[:, 0].isnan().tolist() == [True, False]
    off = torch.func.vmap(lambda row: chain(row[None])[0])(torch.tensor([[0.3, -100.0]]))
    assert off.isnan().any()


class RoundsOtherwise(torch.fx.Interpreter):
    """Runs a graph as a compiler may that rounds products in another order."""

    def call_function(self, target, args, kwargs):
        made = super().call_function(target, args, kwargs)
        return made * (1 + 2**-20) if target is torch._C._nn.linear else made


@pytest.mark.parametrize("backprop", ["stored", "reversible"])
@pytest.mark.parametrize("couplings", [2, 10])  # more than recompile_limit
@pytest.mark.filterwarnings("ignore")
def test_one_direction_may_be_compiled(couplings, backprop):
    torch.manual_seed(0)
    chain = coupled(*(MLP((2,), (2,), hidden=[8]) for _ in range(couplings)), frac_bits=20)
    chain.backprop = backprop
    x = torch.randint(256, (6, 4)) / 256
    torch.compiler.reset()

    def compiled(call):
        return torch.compile(call, backend=lambda graph, _: RoundsOtherwise(graph).run)

    y = chain(x)
    assert torch.equal(compiled(chain)(x), y)
    with torch.no_grad():
        assert torch.equal(compiled(chain)(x), y)
        assert torch.equal(compiled(chain.inverse)(y), x)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="grid numerics need the same bits in both directions"):
            torch.compile(chain, fullgraph=True, backend="eager")(x)
    assert not chain.traceable
    torch.compiler.reset()


def test_snapping_brings_every_pixel_back():
    torch.manual_seed(0)
    nets = [Conv((8, 3, 3), (8, 3, 3), hidden=[8]) for _ in range(6)]
    layers = [Psi(4), Split(), *map(AdditiveCoupling, nets), Merge(), Permute(seed=0, shape=(16, 3, 3))]
    x = torch.arange(256).repeat(5)[: 7 * 144].reshape(7, 1, 12, 12) / 256
    plain, snapping = Sequential(*layers), Sequential(*layers, numerics={"mode": "snap"})
    with torch.no_grad():
        y = snapping(x)
        assert torch.equal(y, plain(x))
        assert not torch.equal(plain.inverse(y), x)
        assert torch.equal(snapping.inverse(y), x)
        assert torch.equal(snapping.inverse_and_log_det(y)[0], x)


def test_slices_of_a_chain_that_snaps():
    """Data lie on their grid where the chain begins, and nowhere else."""
    chain = coupled(MLP((2,), (2,)), MLP((2,), (2,)), mode="snap", frac_bits=1)
    y = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(chain[::-1](y), chain.inverse(y))
        assert torch.equal(chain[:2].inverse(chain[2:].inverse(y)), chain.inverse(y))
        assert torch.equal(chain[2::-1](chain[:2:-1](y)), chain.inverse(y))


def test_slices_and_inverses_keep_the_grid():
    chain = coupled(MLP((2,), (2,)), MLP((2,), (2,)))
    x = torch.randint(256, (5, 4)) / 256
    with torch.no_grad():
        assert torch.equal(chain[::-1](chain(x)), x)
        assert chain[::-1].exactness == chain[1:3].exactness == Inverse(chain).exactness == "grid"
        assert chain[1:3].numerics == chain.numerics == Grid(mode="grid")


def test_levels_of_chains():
    psi, coupling = Psi(2), AdditiveCoupling(MLP((2,), (2,)))
    assert Sequential().limit.level == Sequential(psi).limit.level == Sequential(coupling).limit.level == "exact"
    assert Sequential(psi, AdditiveCoupling(nn.Bilinear(2, 2, 2))).limit.level == "grid"
    assert Sequential(psi, coupling).exactness == "float"
    assert Sequential(psi).exactness == "exact"
    assert Sequential(psi, numerics={"mode": "snap"}).limit.level == "float"
    with pytest.raises(NumericsError, match="sequential has numerics of its own"):
        Sequential(Inverse(Sequential(psi, numerics={"mode": "snap"})), numerics={"mode": "grid"})


@pytest.mark.parametrize("backprop", ["reversible", "checkpoint"])
@pytest.mark.parametrize(
    "inside", [{"mode": "snap", "frac_bits": 2}, {"mode": "grid", "frac_bits": 2, "entry": "snap"}]
)
def test_a_chain_inside_keeps_its_ends_under_every_policy(backprop, inside):
    """Training takes chains apart, but not one that rounds."""
    torch.manual_seed(0)
    couplings = [AdditiveCoupling(MLP((2,), (2,))) for _ in range(2)]
    inner = Sequential(Split(), *couplings, Merge(), numerics=inside)
    chain = Sequential(inner, Permute(seed=0, shape=(4,)), backprop=backprop)
    state = torch.randn(5, 4)
    for call in (chain, chain.inverse):
        with torch.no_grad():
            expected = call(state)
        torch.testing.assert_close(call(state.clone().requires_grad_()), expected, rtol=0.0, atol=1e-6)


def test_snapping_brings_every_pixel_back_through_residual_blocks():
    """They are inverted by iteration, so that nothing else could."""
    torch.manual_seed(0)
    block = {"type": "residual", "coefficient": 0.7, "net": {"type": "lipschitz_conv", "hidden": [8]}}
    layers = [{"type": "psi", "block_size": 2}, block, block]
    chain = invflow.build({"input": {"shape": [1, 8, 8]}, "numerics": {"mode": "snap"}, "layers": layers}).eval()
    x = ((torch.arange(256)[:, None] + 7 * torch.arange(64)) % 256).reshape(
        256, 1, 8, 8
    ) / 256  # every value everywhere
    with torch.no_grad():
        y = chain(x)
        assert torch.equal(chain.inverse(y), x)
        assert not torch.equal(Sequential(*chain).inverse(y), x)
