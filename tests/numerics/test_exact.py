"""Order-free conditioners: their bounds are proved, and every way to compute them gives the same bits."""

from __future__ import annotations

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

import invflow
from invflow import CheckpointError, Classifier, NumericsError, Sequential
from invflow.bijections import AdditiveCoupling, Merge, Psi, Split
from invflow.measures import same_bits
from invflow.models import LinearHead
from invflow.models.freezing import freeze
from invflow.nets import MLP, Conv
from invflow.nets.orderfree import make_order_free
from invflow.numerics import Exact, Float, Grid, backend
from invflow.numerics.integer import SUM_BITS, FixedPoint, Quantize, Requantize, Table
from invflow.numerics.verify import computed_otherwise, onednn_off
from tests.testing.faults.numerics import honest, integer_weights

EXACT = Exact(mode="exact")
NO_SHIFT = torch.zeros(1, dtype=torch.int64)
FINE = 0.01
"""Activations of 10 bits with a range of 8 are 2^-7 apart, and a few rounding errors add up."""
ACTIVATIONS = ["relu", "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid"]


def trained(net):
    """Gives a net random running statistics, as if it had been trained."""
    torch.manual_seed(0)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 2)
            nn.init.normal_(part.bias)
    return net.eval()


def pixels(*shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)) / 256


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("kind", ["conv", "mlp", "conv with context", "mlp with context"])
def test_an_order_free_net_computes_the_same_function(kind, activation, final):
    """The same up to the resolution; the result counts steps of the grid."""
    context_shape = (2,) if "context" in kind else None
    options = {"hidden": [6, 5], "activation": activation, "norm": "batch", "final_activation": final}
    shape = (3, 4, 5)
    net = trained((Conv if kind.startswith("conv") else MLP)(shape, shape, context_shape, **options))
    x = pixels(9, *shape)
    given = (x,) if context_shape is None else (x, torch.randn(9, 2))
    with torch.no_grad():
        expected = net(*given)
        made = copy.deepcopy(net)
        make_order_free(made, EXACT)
        found = made(*given)
    assert torch.equal(found, found.round())
    # The assumed range of 8 has 10 bits; the three layers amplify the rounding errors.
    torch.testing.assert_close(found / 2**16, expected, rtol=0.0, atol=0.1)
    assert float((found / 2**16 - expected).abs().mean()) < FINE * 2


def test_every_way_of_summing_gives_the_same_bits():
    """Float32, float64 and integers; term by term, in reverse, and by the library."""
    torch.manual_seed(0)
    net = Conv((3, 5, 5), (4, 5, 5), kernel_size=3)
    make_order_free(net, EXACT)
    quantize, layer, _ = net
    q = quantize(torch.randn(7, 3, 5, 5) * 10)
    assert float(q.abs().max()) == layer.limit
    expected = layer(q)
    unit = 2.0 ** layer.shift.double()
    weight = (layer.weight.double() * unit[:, None, None, None]).long()
    padded = nn.functional.pad(q, (1, 1, 1, 1)).long()
    terms = [
        torch.einsum("bij,o->boij", padded[:, c, i : i + 5, j : j + 5], weight[:, c, i, j])
        for c, i, j in itertools.product(range(3), range(3), range(3))
    ]
    bias = (layer.bias.double() * unit).long()[:, None, None]
    for order in (terms, terms[::-1]):
        assert torch.equal((sum(order) + bias).double() / unit[:, None, None], expected.double())
        total = layer.bias[:, None, None]
        for term in order:
            total = total + (term.double() / unit[:, None, None]).float()
        assert torch.equal(total, expected)
    assert torch.equal(copy.deepcopy(layer).double()(q.double()), expected.double())


def test_the_bound_is_tight_and_proved_in_integers():
    """The weights use all 24 bits, larger ones are refused."""
    torch.manual_seed(0)
    net = Conv((3, 5, 5), (4, 5, 5), kernel_size=3)
    make_order_free(net, EXACT)
    layer = net[1]
    unit = 2.0 ** layer.shift.double()
    norm = (layer.weight.double().flatten(1) * unit[:, None]).abs().sum(1)
    worst = layer.limit * norm + (layer.bias.double() * unit).abs()
    assert bool((worst <= 2**SUM_BITS).all())
    assert bool((worst > 2 ** (SUM_BITS - 1)).all())  # one more shift would exceed the bound
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] *= 4000
    with pytest.raises(NumericsError, match=r"expects sums of at most 2\^24, which float32 holds; these weights"):
        layer.prove()


@pytest.mark.parametrize("limit", [1, 3])
def test_the_bound_counts_to_the_unit(limit):
    largest = 2**SUM_BITS // limit
    weight, rest = torch.tensor([[float(largest)]]), float(2**SUM_BITS - largest * limit)
    FixedPoint(weight, torch.tensor([rest]), NO_SHIFT, limit, nn.Linear(1, 1))
    with pytest.raises(NumericsError, match="can reach 16777217"):
        FixedPoint(weight, torch.tensor([rest + 1]), NO_SHIFT, limit, nn.Linear(1, 1))


@pytest.mark.parametrize("value", [0.3, float("nan"), float("inf"), 2.0**25])
def test_weights_that_are_no_integers_are_refused(value):
    with pytest.raises(NumericsError, match="expects integers up to 16777216"):
        FixedPoint(torch.tensor([[value]]), torch.zeros(1), NO_SHIFT, 1, nn.Linear(1, 1))
    with pytest.raises(NumericsError, match="a table of an order-free net expects integers"):
        Table(torch.tensor([0.0, value, 1.0]), 1023)


@pytest.mark.parametrize("scale", [3.0, 0.0, -2.0, float("nan"), 2.0**100])
def test_scales_are_powers_of_two(scale):
    with pytest.raises(NumericsError, match="expects scales that are powers of two"):
        Quantize(torch.tensor(scale), 1023)


def test_an_honest_kernel_is_exact_where_the_planted_one_is_not():
    coupling = honest()
    state = (pixels(18, 2, 8, 8) * 4, pixels(18, 2, 8, 8))
    with torch.no_grad():
        expected = coupling(state)
        for way, found in computed_otherwise(coupling, state, None):
            assert same_bits(expected, found), way


def test_nnpack_is_kept_off():
    """If oneDNN is off, PyTorch computes batches of 16 by FFT and Winograd: the reason for `exact_kernels`."""
    if not torch.backends.nnpack.is_available():
        pytest.skip("needs NNPACK")
    torch.manual_seed(0)
    layer = FixedPoint(
        integer_weights(), torch.zeros(2), torch.zeros(2, dtype=int), 1023, nn.Conv2d(2, 2, 3, padding=1)
    )
    q = torch.randint(-1023, 1024, (64, 2, 8, 8)).float()
    with torch.no_grad(), onednn_off():
        found = layer(q)
        plain = nn.functional.conv2d(q, layer.weight, padding=1)
    wide = copy.deepcopy(layer).double()(q.double())
    assert torch.equal(found.double(), wide)
    assert torch.backends.nnpack.set_flags(True) == (True,)  # and restored
    if not torch.equal(plain.double(), wide):
        return
    pytest.skip("this build's NNPACK computes plain sums")


def reset_precision():
    """PyTorch's defaults of the newer settings."""
    for one in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv, torch.backends.cuda.matmul, torch.backends):
        one.fp32_precision = "none"
    for one in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        one.fp32_precision = "tf32"


PRECISIONS = {
    "older": lambda: torch.set_float32_matmul_precision("medium"),
    "generic tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "generic ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "CUDA's products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "oneDNN's products": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "oneDNN's convolutions": lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
}


@pytest.mark.parametrize("setting", PRECISIONS)
def test_every_setting_of_precision_gives_the_same_bits_or_a_line(setting):
    """Once a newer setting was used, PyTorch refuses to tell the older ones."""
    chain, x = invflow.build(SPEC).eval(), pixels(2, 1, 8, 8)
    with torch.no_grad():
        expected = chain(x)
        try:
            PRECISIONS[setting]()
            with exact_kernels_on_cuda():
                pass
            try:
                assert same_bits(chain(x), expected)
            except NumericsError as error:
                exec(str(error).split("products: ")[1].replace(" and ", "; "))  # the fix that it tells
                assert same_bits(chain(x), expected)
        finally:
            torch.set_float32_matmul_precision("highest")
            reset_precision()
        assert torch.get_float32_matmul_precision() == "highest"
        assert same_bits(chain(x), expected)


def exact_kernels_on_cuda():
    return backend.exact_kernels(SimpleNamespace(dtype=torch.float32, device=torch.device("cuda")))


def test_cudnn_is_kept_off():
    before = torch.backends.cudnn.enabled
    with exact_kernels_on_cuda():
        assert not torch.backends.cudnn.enabled
    assert torch.backends.cudnn.enabled == before


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_stays_so(activation):
    """In a context, which is on no grid, or in a graph, which cannot raise.

    Infinity is clamped as all large numbers are.
    """
    torch.manual_seed(0)
    net = MLP((2,), (2,), (1,), hidden=[4], activation=activation)
    chain = Sequential(Split(), AdditiveCoupling(net), Merge(), numerics=EXACT).eval()
    x, context = pixels(3, 4), torch.tensor([[1.0], [torch.nan], [-torch.inf]])
    with pytest.raises(NumericsError, match=r"additive_coupling: expected numbers on the grid of 2\^-16, got nan"):
        chain(x, context)
    infinite, large = torch.tensor([[0.0], [torch.inf], [-torch.inf]]), torch.tensor([[0.0], [1e9], [-1e9]])
    assert torch.equal(chain(x, infinite), chain(x, large))
    with torch.no_grad():
        assert torch.equal(chain(x, infinite), chain(x, large))

    def one(row, given):
        return chain(row[None], given[None])[0]

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            rows = torch.func.vmap(one)(x, context)
            assert rows.isnan().any(1).tolist() == [False, True, False]


def test_a_device_that_rounds_is_not_trusted(monkeypatch):
    """Kernels that round their factors, as with TF32 and bfloat16, fail the sums that each device is tested with."""
    convolve = nn.functional.conv2d

    def rounds(x, weight, *rest, **options):
        return convolve(x.bfloat16().to(x.dtype), weight, *rest, **options)

    monkeypatch.setattr(nn.functional, "conv2d", rounds)
    backend._what_is_wrong.cache_clear()
    chain = invflow.build(SPEC)
    with pytest.raises(NumericsError, match="but a convolution with a kernel of 3 is not"):
        chain(pixels(2, 1, 8, 8))
    monkeypatch.undo()
    backend._what_is_wrong.cache_clear()
    chain(pixels(2, 1, 8, 8))


NET = {"type": "conv", "hidden": [6], "norm": "batch"}
SPEC = {
    "input": {"shape": [1, 8, 8]},
    "numerics": {"mode": "exact"},
    "layers": [
        {"type": "psi", "block_size": 2},
        {"type": "split"},
        {"type": "additive_coupling", "net": NET},
        {"type": "additive_coupling", "net": {**NET, "activation": "gelu"}},
        {"type": "merge"},
    ],
}


def test_a_spec_builds_an_exact_chain():
    chain = invflow.build(SPEC)
    x = pixels(70, 1, 8, 8)
    assert chain.exactness == "exact"
    with torch.no_grad():
        y = torch.cat([chain(part) for part in x.split(64)])
        for size in (1, 7, 50):
            assert torch.equal(torch.cat([chain.inverse(part) for part in y.split(size)]), x)


def test_exact_checkpoints_come_back(tmp_path):
    torch.manual_seed(0)
    chain = invflow.build({**SPEC, "numerics": {"mode": "float"}})
    trained(chain)
    frozen = freeze(chain, pixels(50, 1, 8, 8), EXACT)
    invflow.save(frozen, tmp_path)
    again = invflow.load(tmp_path)
    x = pixels(9, 1, 8, 8)
    with torch.no_grad():
        assert again.exactness == "exact"
        assert torch.equal(again(x), frozen(x))
    weights = [value for name, value in again.state_dict().items() if name.endswith("weight")]
    shifts = [value for name, value in again.state_dict().items() if name.endswith("shift")]
    for weight, shift in zip(weights, shifts, strict=True):
        counted = weight * 2.0 ** shift.reshape(-1, 1, 1, 1)
        assert torch.equal(counted, counted.round())


@pytest.mark.parametrize("entry", ["1.weight", "1.shift", "0.scale", "2.values"])
def test_a_checkpoint_whose_bounds_do_not_hold_is_refused(tmp_path, entry):
    """Even if the digest is correct."""
    chain = invflow.build(SPEC)
    invflow.save(chain, tmp_path)
    document = json.loads((tmp_path / "spec.json").read_text())
    tensors = safetensors.torch.load_file(tmp_path / document["checkpoint"]["weights"])
    name = next(name for name in tensors if name.endswith(f"net.{entry}"))
    tensors[name] = tensors[name] + 5 if entry == "1.shift" else tensors[name] * 1.5
    if entry == "1.weight":
        tensors[name] = tensors[name] * 4
    invflow.spec.checkpoint.write_checkpoint(document, tensors, tmp_path)
    with pytest.raises(CheckpointError, match=r"weights-.*: .*order-free"):
        invflow.load(tmp_path)


def test_freezing_keeps_the_function_and_the_original():
    torch.manual_seed(0)
    nets = [trained(Conv((2, 4, 4), (2, 4, 4), hidden=[8], norm="batch", final_activation=True)) for _ in range(4)]
    chain = Sequential(Psi(2), Split(), *map(AdditiveCoupling, nets), Merge())
    model = Classifier(chain, LinearHead(3, shape=(4, 4, 4)))
    before = copy.deepcopy(model.state_dict())
    x = pixels(100, 1, 8, 8)
    frozen = freeze(model, x, EXACT)
    assert same_bits(tuple(before.values()), tuple(model.state_dict().values()))
    with torch.no_grad():
        real = model.eval()(x)
        torch.testing.assert_close(frozen(x), real, rtol=0.0, atol=0.05)
        assert torch.equal(frozen.bijection.inverse(frozen.features(x)), x)
        on_grid = freeze(model, x, Grid(mode="grid"))
        torch.testing.assert_close(on_grid(x), real, rtol=0.0, atol=1e-3)
        assert torch.equal(freeze(on_grid, x, EXACT)(x), frozen(x))
        assert torch.equal(freeze(on_grid, x, Float(mode="float"))(x), real)
    assert invflow.to_spec(frozen.bijection, (1, 8, 8))["numerics"] == {"mode": "exact"}
    with pytest.raises(NumericsError, match="not exact yet"):
        freeze(frozen, x, EXACT)


def test_ranges_are_read_off_the_data():
    """Without observed ranges, large data are clamped."""
    net = MLP((2,), (2,), hidden=[4])
    chain = Sequential(AdditiveCoupling(net))
    x = (pixels(20, 2) * 100, pixels(20, 2))
    with torch.no_grad():
        expected = chain(x)[0]
        seen = (freeze(chain, x, EXACT)(x)[0] - expected).abs().max()
        unseen = (Sequential(AdditiveCoupling(copy.deepcopy(net)), numerics=EXACT)(x)[0] - expected).abs().max()
    assert seen < 0.5 < unseen


def test_gradients_pass_an_order_free_net():
    """They are close to those of the original net."""
    torch.manual_seed(0)
    net = MLP((3,), (3,), hidden=[16], activation="tanh")
    made = copy.deepcopy(net)
    make_order_free(made, Exact(mode="exact", activation_bits=12))
    x = pixels(9, 3).requires_grad_()
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    (found,) = torch.autograd.grad(made(x).sum() / 2**16, x)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.05)


def test_half_precision_is_refused():
    chain = invflow.build(SPEC).half()
    with pytest.raises(NumericsError, match=r"expect float32 or float64, got torch\.float16|float16 holds"):
        chain(torch.zeros(1, 1, 8, 8, dtype=torch.float16))


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "LayerNorm is not known to be order-free"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Softmax(1)), "Softmax is not known to be order-free"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), "ReLU does not follow"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "without an activation between"),
        (nn.Sequential, "has no convolution or linear layer"),
        (lambda: nn.Bilinear(2, 2, 2), "a Bilinear, is not a plain stack"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "is not a plain stack"),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), "ParametrizedLinear"),
    ],
)  # fmt: skip
def test_what_is_not_order_free_is_refused_with_the_reason(net, why):
    layer = AdditiveCoupling(net())
    assert layer.limit.level == "grid"
    with pytest.raises(NumericsError, match=f"layer 0 of 1: additive_coupling cannot be exact: its net.*{why}"):
        Sequential(layer, numerics={"mode": "exact"})


def test_weights_that_are_not_finite_are_refused():
    net = MLP((2,), (2,))
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="weights are not finite"):
        make_order_free(net, EXACT)


def test_channels_that_are_zero_stay_zero():
    net = MLP((2,), (2,))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    make_order_free(net, EXACT)
    assert torch.equal(net(torch.ones(1, 2)), torch.zeros(1, 2))


def test_requantize_is_relu_where_it_starts_at_zero():
    assert Requantize(0, 5)(torch.tensor([-3.2, 0.5, 1.5, 9.0])).tolist() == [0.0, 0.0, 2.0, 5.0]


def test_reversible_gradients_pass_order_free_nets():
    """The gradient of the input is that of plain training."""
    torch.manual_seed(0)
    found = {}
    for backprop in ("stored", "reversible"):
        chain = invflow.build({**SPEC, "backprop": backprop})
        chain.load_state_dict(found["weights"] if found else chain.state_dict())
        found["weights"] = chain.state_dict()
        x = pixels(5, 1, 8, 8).requires_grad_()
        chain(x).square().sum().backward()
        found[backprop] = x.grad
    torch.testing.assert_close(found["reversible"], found["stored"], rtol=1e-5, atol=1e-5)
