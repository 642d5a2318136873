"""Constant-memory training: the gradients of plain training, whatever happens inside."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import invflow
from invflow import Sequential
from invflow.bijections import ActNorm, AdditiveCoupling, AffineCoupling, Inverse, Linear1x1, Merge, Permute, Psi, Split
from invflow.context import each_entry, entries, make_context
from invflow.nets import MLP, Conv
from invflow.state import leaves, make_state, map_state
from invflow.testing import chain_cases

GRADIENT = 1e-10
"""Relative, float64: inverting loses some units of eps per layer, times the gain of a dozen layers."""


def flat(values):
    made = [torch.zeros(1).double() if value is None else value.flatten().double() for value in values]
    return torch.cat([torch.zeros(1).double(), *made])


def gradients(chain, x, context=None, *, policy, log_det=True, weights_seed=0):
    """Outputs, gradients and buffers after one backward through a copy of a chain under a policy."""
    chain = copy.deepcopy(chain)
    chain.backprop = policy
    x = map_state(lambda leaf: leaf.clone().requires_grad_(), x)
    context = each_entry(lambda entry: entry.clone().requires_grad_(), context)
    torch.manual_seed(1)
    if log_det:
        y, determinant = chain.forward_and_log_det(x, context)
    else:
        y, determinant = chain(x, context), torch.zeros(())
    generator = torch.Generator().manual_seed(weights_seed)
    loss = determinant.sum() * 0.7 + sum(
        (leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum() + leaf.square().sum()
        for leaf in leaves(y)
    )
    loss.backward()
    inputs = [*leaves(x), *entries(context)]
    return {
        "output": flat([leaf.detach() for leaf in leaves(y)]),
        "input": flat([leaf.grad for leaf in inputs]),
        "weights": flat([weight.grad for weight in chain.parameters()]),
        "buffers": flat(list(chain.buffers())),
    }


def assert_equal_training(chain, x, context=None, tolerance=GRADIENT, policies=("reversible", "checkpoint"), **options):
    expected = gradients(chain, x, context, policy="stored", **options)
    for policy in policies:
        found = gradients(chain, x, context, policy=policy, **options)
        for name, value in expected.items():
            scale = max(1.0, float(value.abs().max()))
            error = float((found[name] - value).abs().max()) / scale
            assert error <= tolerance, f"{policy}: {name} differs by {error:.1e}"


class Dropping(nn.Sequential):
    """A conditioner that draws random numbers and keeps statistics."""

    def __init__(self, channels):
        super().__init__(
            nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.4),
            nn.Conv2d(6, channels, 3, padding=1),
        )  # fmt: skip


def convolutional(depth=4, net=Dropping):
    layers = [layer for _ in range(depth) for layer in (AdditiveCoupling(net(2)),)]
    return Sequential(Psi(2), ActNorm(shape=(4, 3, 3)), Linear1x1(shape=(4, 3, 3)), Split(), *layers, Merge()).double()


@pytest.fixture
def images():
    return torch.randn(5, 1, 6, 6, dtype=torch.float64)


@given(data=st.data())
def test_random_chains_train_as_plain_ones_do(data):
    case = data.draw(chain_cases(max_depth=8))
    chain = case.chain(seed=data.draw(st.integers(0, 99))).double().train()
    # Ordinary numbers: at the kink of a ReLU, where zeros and repeated values put many, rounding decides the gradient.
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = make_state(lambda leaf: torch.randn((5, *leaf), generator=generator, dtype=torch.float64), case.shape)
    context = make_context(lambda one: torch.randn(5, *one, dtype=torch.float64), case.context_shape)
    assert_equal_training(chain, x, context, log_det=chain.surjective and data.draw(st.booleans()))


def every_example():
    for tag, cls in sorted(invflow.registered().items()):
        for fields, shape in cls.examples:
            yield pytest.param({"type": tag, **fields}, shape, id=f"{tag}-{shape}")


@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.parametrize(("layer", "shape"), list(every_example()))
def test_every_registered_bijection(layer, shape, log_det):
    """There and back again: the last layer that trains is plain, so that the one before it is what is tested."""
    as_lists = json.loads(json.dumps(shape))
    torch.manual_seed(0)
    surjective = invflow.registered()[layer["type"]].surjective is not False
    behind = [{"type": "inverse", "layer": layer}] if surjective else [{"type": "sequential", "layers": []}]
    chain = invflow.build({"input": {"shape": as_lists}, "layers": [layer, *behind]})
    draw = torch.randn if chain[0].domain == "reals" else torch.rand
    x = make_state(lambda leaf: draw((9, *leaf), dtype=torch.float64), shape)
    assert_equal_training(chain.double().train(), x, log_det=log_det and surjective)


def test_dropout_and_batch_norm(images):
    chain = convolutional().train()
    assert_equal_training(chain, images)
    assert_equal_training(chain, images, log_det=False)


def test_affine_couplings(images):
    net = lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Dropout(0.2))  # noqa: E731
    chain = Sequential(Psi(2), Split(), *(AffineCoupling(net()) for _ in range(4))).double().train()
    assert_equal_training(chain, images)


def test_batch_statistics_move_once(images):
    chain = convolutional().train()
    for policy in ("reversible", "checkpoint"):
        one = copy.deepcopy(chain)
        one.backprop = policy
        one(images).sum().backward()
        counts = [int(value) for name, value in one.state_dict().items() if name.endswith("num_batches_tracked")]
        assert counts == [1] * 4


def test_the_generator_goes_on_as_in_plain_training(images):
    after = []
    for policy in ("stored", "reversible", "checkpoint"):
        chain = convolutional().train()
        chain.backprop = policy
        torch.manual_seed(0)
        chain(images).sum().backward()
        after.append(torch.rand(1).item())
    assert after[0] == after[1] == after[2]


def test_an_input_that_needs_no_gradient(images):
    chain = convolutional().train()
    chain.backprop = "reversible"
    chain(images).square().sum().backward()
    assert all(weight.grad is not None for weight in chain.parameters())


def test_nothing_is_kept_without_gradients(images):
    chain = convolutional().eval()
    chain.backprop = "reversible"
    with torch.no_grad():
        y = chain(images)
    assert y.grad_fn is None


def test_the_callers_tensors_stay_his(images):
    before = images.clone()
    x = images.requires_grad_()
    chain = convolutional().train()
    chain.backprop = "reversible"
    y = chain(x)
    made = y.detach().clone()
    y.square().sum().backward()
    assert torch.equal(x, before)
    assert torch.equal(y, made)


def test_frozen_and_shared_parameters(images):
    net = Conv((2, 3, 3), (2, 3, 3))
    shared = AdditiveCoupling(net)
    chain = Sequential(Psi(2), Split(), shared, AdditiveCoupling(Conv((2, 3, 3), (2, 3, 3))), shared, Merge()).double()
    chain[3].net[0].weight.requires_grad_(False)
    assert_equal_training(chain, images)


def test_two_backwards_and_accumulation(images):
    chain = convolutional(net=lambda channels: Conv((channels, 3, 3), (channels, 3, 3)))
    chain.backprop = "reversible"
    loss = chain(images).square().sum()
    loss.backward(retain_graph=True)
    once = [weight.grad.clone() for weight in chain.parameters()]
    loss.backward()
    assert all(torch.allclose(weight.grad, 2 * grad) for weight, grad in zip(chain.parameters(), once, strict=True))


def test_unused_outputs(images):
    chain = Sequential(Psi(2), Split(), AdditiveCoupling(Conv((2, 3, 3), (2, 3, 3)))).double()
    found = []
    for policy in ("stored", "reversible"):
        chain.backprop = policy
        chain.zero_grad()
        x = images.clone().requires_grad_()
        _, untouched = chain(x)
        untouched.sum().backward()
        found.append(x.grad.clone())
        assert all(weight.grad is None or not weight.grad.any() for weight in chain.parameters())
    assert torch.equal(*found)


def test_autograd_grad(images):
    chain = convolutional().train()
    found = []
    for policy in ("stored", "reversible"):
        chain.backprop = policy
        torch.manual_seed(0)
        x = images.clone().requires_grad_()
        found.append(flat(torch.autograd.grad(copy.deepcopy(chain)(x).square().sum(), x)))
    assert (found[0] - found[1]).abs().max() <= GRADIENT * found[0].abs().max()


@pytest.mark.parametrize("policy", ["reversible", "checkpoint"])
def test_double_backward(policy):
    chain = Sequential(Split(), *(AffineCoupling(MLP((2,), (4,), hidden=[5], activation="tanh")) for _ in range(3)))
    chain = chain.double()
    x = torch.randn(4, 4, dtype=torch.float64)
    found = []
    for each in ("stored", policy):
        chain.backprop = each
        point = x.clone().requires_grad_()
        y, log_det = chain.forward_and_log_det(point)
        loss = sum(leaf.pow(3).sum() for leaf in y) + log_det.square().sum()
        (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        found.append(flat(torch.autograd.grad(slope.square().sum(), [point, *chain.parameters()])))
    assert (found[0] - found[1]).abs().max() <= GRADIENT * max(1.0, found[0].abs().max())


def test_chains_nest(images):
    inner = convolutional(net=lambda channels: Conv((channels, 3, 3), (channels, 3, 3)))
    for policy in ("stored", "reversible", "checkpoint"):
        nested = Sequential(copy.deepcopy(inner), Permute(seed=0, shape=(4, 3, 3)), Inverse(Psi(2))).double()
        nested[0].backprop = policy
        assert_equal_training(nested, images)


def test_activations_do_not_grow_with_depth():
    """What backward keeps, in numbers: tensors saved outside of parameters."""

    def saved(depth, policy):
        net = Conv((2, 8, 8), (2, 8, 8), hidden=[4])
        chain = Sequential(Split(), *(AdditiveCoupling(copy.deepcopy(net)) for _ in range(depth)), backprop=policy)
        weights = {weight.untyped_storage().data_ptr() for weight in chain.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = chain(torch.randn(3, 4, 8, 8, requires_grad=True))
        assert y is not None
        return sum(kept.values())

    assert saved(32, "reversible") == saved(3, "reversible")
    assert saved(32, "stored") > 8 * saved(3, "stored")


def test_from_a_spec():
    coupling = {"type": "additive_coupling", "net": {"type": "mlp"}}
    inner = {"type": "sequential", "layers": [coupling, coupling], "backprop": "checkpoint"}
    spec = {"input": {"shape": [4]}, "layers": [{"type": "split"}, inner], "backprop": "reversible"}
    chain = invflow.build(spec)
    assert (chain.backprop, chain[1].backprop) == ("reversible", "checkpoint")
    assert invflow.build(invflow.to_spec(chain)).backprop == "reversible"
    plain = {"input": {"shape": [4]}, "layers": [{"type": "split"}, {"type": "sequential", "layers": [coupling] * 2}]}
    assert invflow.load_spec(spec).hash == invflow.load_spec(plain).hash
    with pytest.raises(invflow.SpecError, match="backprop: input should be 'stored', 'reversible' or 'checkpoint'"):
        invflow.build({**spec, "backprop": "revertible"})


@pytest.mark.parametrize("log_det", [False, True])
def test_vmap_over_jacrev(log_det):
    chain = Sequential(Split(), *(AffineCoupling(MLP((2,), (4,), hidden=[5], activation="tanh")) for _ in range(2)))
    chain = Sequential(*chain, Merge()).double()
    x = torch.randn(3, 4, dtype=torch.float64)

    def call(point):
        y, determinant = chain.forward_and_log_det(point[None])
        return determinant if log_det else y[0]

    found = []
    for policy in ("stored", "reversible", "checkpoint"):
        chain.backprop = policy
        found.append(torch.func.vmap(torch.func.jacrev(call))(x))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
