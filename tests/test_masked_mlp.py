"""The net `masked_mlp`: its degrees and masks, and that of a peer with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import invflow
from invflow import InvflowError, SpecError
from invflow.nets import MaskedMLP
from invflow.nets.masked import MaskedLinear
from tests.test_autoregressive import PEER, copy_weights, masked


def degrees(net):
    return [list(part.after) for part in net.modules() if isinstance(part, MaskedLinear)]


class TestNet:
    def test_sequential_degrees(self):
        assert degrees(masked(3, hidden=[4]))[0] == [1, 2, 1, 2]
        assert degrees(masked(3, hidden=[4, 3])) == [[1, 2, 1, 2], [1, 2, 1], [1, 2, 3, 1, 2, 3]]
        assert degrees(masked(3, context_shape=(2,), hidden=[4]))[0] == [0, 1, 2, 0]
        assert degrees(masked(1, hidden=[3]))[0] == [0, 0, 0]

    def test_random_degrees_are_between_the_least_before_and_the_number_of_features(self):
        net = masked(6, hidden=[50, 50], degrees="random", seed=3)
        first, second, _ = degrees(net)
        assert set(first) == {1, 2, 3, 4, 5}
        assert min(second) >= min(first)
        assert max(second) <= 5
        few = degrees(masked(6, hidden=[1, 50], degrees="random", seed=3))  # a single unit: nothing below its degree
        assert set(few[1]) == set(range(few[0][0], 6))

    def test_random_degrees_depend_on_the_seed_alone(self):
        state = torch.get_rng_state()
        made = [
            degrees(MaskedMLP((6,), (6,), hidden=[8], degrees="random", seed=seed, zero_last=True))
            for seed in (1, 1, 2)
        ]
        assert made[0] == made[1] != made[2]
        torch.set_rng_state(state)
        assert degrees(masked(4, hidden=[6], degrees="random", seed=0))[0] == [3, 3, 2, 1, 2, 2]  # on every machine

    @pytest.mark.parametrize("context_shape", [None, (2,), (2, 3)])
    @pytest.mark.parametrize("order", ["sequential", "random"])
    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("features", [1, 2, 5])
    def test_the_jacobian_is_strictly_lower_triangular_to_the_bit(self, context_shape, order, residual, features):
        net = masked(features, 3, context_shape, degrees=order, residual=residual)
        x = torch.randn(4, features)
        given = () if context_shape is None else (torch.randn(4, *context_shape),)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda *one: net(*(v[None] for v in one))[0]))(x, *given)
        jacobian = jacobian.unflatten(1, (3, features))
        assert (jacobian.triu() == 0).all()
        if order == "sequential":  # nothing that may depend is cut off
            assert (jacobian.abs().amax((0, 1)) > 0).equal(torch.ones(features, features, dtype=torch.bool).tril(-1))

    @pytest.mark.parametrize("fields", [{}, {"residual": True}, {"hidden": []}])
    def test_all_outputs_depend_on_the_context(self, fields):
        net = masked(4, 2, (3,), **fields)
        x = torch.randn(2, 4)
        assert ((net(x, torch.randn(2, 3)) - net(x, torch.randn(2, 3))) != 0).all()

    def test_masks_are_neither_weights_nor_saved(self):
        net = masked(4)
        assert {name.rpartition(".")[2] for name in net.state_dict()} == {"weight", "bias"}
        assert all(weight.dtype == torch.bfloat16 for weight in net.bfloat16().parameters())
        assert net[0].mask.dtype == torch.bfloat16  # so that its product with the weights needs no cast
        on_meta = masked(4).to("meta").to_empty(device="cpu")
        assert on_meta[0].mask.equal(net[0].mask)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: MaskedMLP((3,), (4,)), "as many outputs for each feature, got 4 for 3"),
            (lambda: MaskedMLP((3, 2), (6,)), r"expects a shape \(features,\)"),
            (lambda: MaskedMLP((3,), (6,), hidden=[4], residual=True), r"expects their width and one of each block"),
            (lambda: MaskedMLP((3,), (6,), seed=1), 'a seed with degrees "random" only'),
            (lambda: MaskedMLP((3,), (6,), degrees="other"), "degrees: input should be 'sequential' or 'random'"),
            (lambda: masked(3)(torch.zeros(1, 3), torch.zeros(1, 2)), "built without a context"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, call, message):
        with pytest.raises(InvflowError, match=message):
            call()

    def test_in_a_coupling_for_exact_numerics_it_is_refused_by_name(self):
        coupling = {"type": "additive_coupling", "net": {"type": "masked_mlp"}}
        layers = [{"type": "split"}, coupling, {"type": "merge"}]
        document = {"input": {"shape": [4]}, "layers": layers, "numerics": {"mode": "exact"}}
        with pytest.raises(SpecError, match=r"layers.1: .* a MaskedMLP, is not a plain stack"):
            invflow.build(document)


class TestSize:
    """A document says a width in ten letters; its degrees would be a list."""

    @pytest.mark.parametrize("degrees", ["sequential", "random"])
    @pytest.mark.parametrize(
        ("shapes", "hidden"),
        [(((3,), (6,)), [10**9]), (((3,), (6,)), [2**20] * 5), (((10**9,), (10**9,)), []), (((2,), (2 * 10**9,)), [])],
    )
    def test_more_units_than_can_be_listed(self, shapes, hidden, degrees):
        with torch.device("meta"), pytest.raises(InvflowError, match=r"at most 4,194,304 inputs, .* got "):
            MaskedMLP(*shapes, hidden=hidden, degrees=degrees)

    def test_a_context_counts(self):
        with torch.device("meta"), pytest.raises(InvflowError, match="at most 4,194,304"):
            MaskedMLP((3,), (6,), (10**9,))

    def test_many_large_nets(self):
        net = {"type": "masked_mlp", "hidden": [2**20]}
        layers = [{"type": "repeat", "times": 100, "layers": [{"type": "autoregressive", "net": net}]}]
        with pytest.raises(SpecError, match="operations up to here"):
            invflow.build({"input": {"shape": [1]}, "layers": layers})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("residual", [False, True])
def test_made_of_nflows_with_the_same_weights(residual):
    made = pytest.importorskip("nflows.transforms.made")
    torch.manual_seed(0)
    theirs = made.MADE(5, 13, num_blocks=2, output_multiplier=3, use_residual_blocks=residual).double()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.5)  # its blocks start near zero
    ours = masked(5, 3, hidden=[13, 13, 13], activation="relu", residual=residual).double()
    inside = [part for part in theirs.blocks.modules() if isinstance(part, made.MaskedLinear)]
    outputs = torch.arange(15).reshape(5, 3).T.flatten()  # theirs has all numbers of a feature in turn
    copy_weights(ours, [theirs.initial_layer, *inside, theirs.final_layer], outputs, range(5))
    x = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x)[:, outputs], rtol=PEER, atol=PEER)
