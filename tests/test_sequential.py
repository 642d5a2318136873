"""Chains: composition, slices, the inverse chain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import invflow
from invflow import Inverse, Sequential, ShapeError
from invflow.bijections import AdditiveCoupling, Each, Merge, Permute, Psi, Split
from invflow.nets import MLP, Conv


@pytest.fixture
def chain():
    return Sequential(
        Psi(2), Split(), AdditiveCoupling(Conv((2, 2, 2), (2, 2, 2))), Each(Permute(order=[1, 0])), Merge()
    ).double()


@pytest.fixture
def x():
    return torch.randn(3, 1, 4, 4, dtype=torch.float64)


def test_applies_its_layers_in_data_order(chain, x):
    a, b, c, d, e = chain
    assert torch.equal(chain(x), e(d(c(b(a(x))))))
    assert len(chain) == 5
    assert chain[0] is a
    assert chain[-1] is e


def test_nests(chain, x):
    nested = Sequential(Sequential(chain[:2], chain[2]), chain[3:])
    assert torch.equal(nested(x), chain(x))
    assert nested.output_shape((1, 4, 4)) == chain.output_shape((1, 4, 4))
    assert torch.equal(nested.inverse(chain(x)), chain.inverse(chain(x)))


def test_slices_share_their_layers(chain):
    middle = chain[1:3]
    assert isinstance(middle, Sequential)
    assert list(middle) == [chain[1], chain[2]]
    with pytest.raises(ShapeError, match="step 1 or -1"):
        chain[::2]


def test_reversed_slice_is_the_inverse_chain(chain, x):
    backwards = chain[::-1]
    y = chain(x)
    assert torch.equal(backwards(y), chain.inverse(y))
    assert torch.equal(backwards.inverse(x), y)
    assert list(backwards[::-1]) == list(chain), "the inverse of the inverse is the chain itself"
    assert backwards.output_shape(chain.output_shape((1, 4, 4))) == (1, 4, 4)


def test_inverse_of_inverse_is_the_bijection_itself():
    psi = Psi(2)
    assert Inverse(Inverse(psi)) is psi


def test_trace_holds_every_state(chain, x):
    states = chain.trace(x)
    assert len(states) == len(chain) + 1
    assert states[0] is x
    assert torch.equal(states[-1], chain(x))


def test_the_empty_chain_is_the_identity(x):
    assert Sequential()(x) is x
    assert Sequential().inverse(x) is x
    assert Sequential().forward_and_log_det(x)[1].tolist() == [0.0] * 3


def test_context_reaches_every_layer():
    coupling = AdditiveCoupling(MLP((2,), (2,), context_shape=(3,)))
    chain = Sequential(Split(), Sequential(coupling), Merge())
    x, context = torch.randn(5, 4), torch.randn(5, 3)
    y = chain(x, context)
    assert torch.allclose(chain.inverse(y, context), x, atol=1e-6)  # float32 roundings of numbers near 1
    assert not torch.allclose(chain(x, context + 1), y)


def test_a_plain_call_never_computes_the_log_determinant(chain, x, monkeypatch):
    def refuse(*_):
        raise AssertionError("a log-determinant was computed")

    for layer in chain:
        monkeypatch.setattr(type(layer), "forward_and_log_det", refuse)
        monkeypatch.setattr(type(layer), "inverse_and_log_det", refuse)
    chain.inverse(chain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_log_det_has_the_inputs_dtype_and_one_number_a_sample(chain, x, dtype):
    for call in (chain.to(dtype).forward_and_log_det, chain[::-1].inverse_and_log_det):
        log_det = call(x.to(dtype))[1]
        assert log_det.shape == (3,)
        assert log_det.dtype == dtype


def test_repr_shows_the_shapes_as_they_flow():
    chain = invflow.build(
        {"input": {"shape": [1, 4, 4]}, "layers": [{"type": "psi", "block_size": 2}, {"type": "split"}]}
    )
    lines = [line.split() for line in repr(chain).splitlines()]
    assert lines[0] == ["Sequential(", "(1,", "4,", "4)"]
    assert " ".join(lines[2]) == "(1): Split() ((2, 2, 2), (2, 2, 2))"
    assert "AdditiveCoupling(net=Linear(in_features=2" in repr(Sequential(AdditiveCoupling(nn.Linear(2, 2))))


def test_what_is_no_bijection_is_refused():
    with pytest.raises(ShapeError, match="expects bijections, got ReLU at position 1"):
        Sequential(Psi(2), nn.ReLU())


def test_a_shape_error_names_the_layer():
    with pytest.raises(ShapeError, match="layer 1 of 2: psi with block_size 4 expects"):
        Sequential(Psi(2), Psi(4)).output_shape((1, 4, 4))


class TestCouplings:
    def test_exchanges_halves_that_may_differ(self):
        net = nn.Linear(2, 3)
        a, b = torch.randn(4, 2), torch.randn(4, 3)
        u, v = AdditiveCoupling(net)((a, b))
        assert torch.equal(u, net(a) + b)
        assert v is a

    def test_a_net_that_would_broadcast_is_refused(self):
        coupling = AdditiveCoupling(nn.Linear(2, 1))
        with pytest.raises(ShapeError, match=r"net to return the shape \(4, 3\), got \(4, 1\)"):
            coupling((torch.randn(4, 2), torch.randn(4, 3)))

    def test_a_single_tensor_is_refused(self):
        with pytest.raises(
            ShapeError, match="additive_coupling expects a pair of tensors, got Tensor; put a Split before it"
        ):
            AdditiveCoupling(nn.Linear(2, 2))(torch.randn(4, 2))


class TestSplitting:
    def test_the_first_half_of_an_odd_count_is_the_smaller(self):
        assert Split().output_shape((5, 2, 2)) == ((2, 2, 2), (3, 2, 2))

    def test_sizes(self):
        x = torch.randn(2, 5)
        a, b = Split(sizes=(4, 1))(x)
        assert (a.shape[1], b.shape[1]) == (4, 1)
        assert torch.equal(Merge(sizes=(4, 1))((a, b)), x)

    def test_one_channel_cannot_be_split(self):
        with pytest.raises(ShapeError, match="at least 2 channels along dim 1 to make two parts of, got 1"):
            Split()(torch.zeros(1, 1, 4, 4))

    def test_merge_refuses_a_pair_that_its_inverse_would_not_return(self):
        with pytest.raises(ShapeError, match=r"halves, the smaller first along dim 1, got \[3, 1\]; pass sizes"):
            Merge()((torch.zeros(1, 3), torch.zeros(1, 1)))

    def test_merge_takes_its_sizes_from_the_spec(self):
        chain = invflow.build({"input": {"shape": [[3], [1]]}, "layers": [{"type": "merge"}]})
        assert chain.input_shape((4,)) == ((3,), (1,))

    def test_sizes_that_do_not_add_up(self):
        with pytest.raises(ShapeError, match="expects 6 along dim 1, got 5"):
            Split(sizes=(3, 3))(torch.zeros(1, 5))


class TestPermuting:
    def test_a_seed_means_the_same_order_everywhere(self):
        assert Permute(seed=0, shape=(6, 2, 2)).order.tolist() == [3, 5, 0, 1, 2, 4]  # random.Random(0).sample

    def test_another_width_is_refused(self):
        with pytest.raises(ShapeError, match="expects 3 channels, got 4"):
            Permute(order=[2, 0, 1])(torch.zeros(1, 4))

    @pytest.mark.parametrize("arguments", [{}, {"order": [0], "seed": 1}, {"order": [0, 0]}, {"seed": 1}])
    def test_what_is_no_permutation_is_refused(self, arguments):
        with pytest.raises(ValueError, match="permute"):
            Permute(**arguments)


class TestEach:
    def test_shares_its_parameters(self):
        class Scale(invflow.Bijection):
            def __init__(self):
                super().__init__()
                self.log_factor = nn.Parameter(torch.tensor(0.5))

            def forward(self, x, context=None):
                return x * self.log_factor.exp()

            def inverse(self, y, context=None):
                return y * (-self.log_factor).exp()

            def forward_and_log_det(self, x, context=None):
                return self(x), self.log_factor * x[0].numel() * torch.ones(len(x))

            def inverse_and_log_det(self, y, context=None):
                return self.inverse(y), -self.log_factor * y[0].numel() * torch.ones(len(y))

        each = Each(Scale())
        assert len(list(each.parameters())) == 1
        _, log_det = each.forward_and_log_det((torch.ones(2, 3), torch.ones(2, 4)))
        torch.testing.assert_close(log_det, torch.full((2,), 3.5))

    def test_nested_tuples(self):
        state = (torch.zeros(1, 1, 2, 2), (torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 2, 2)))
        shapes = Each(Psi(2)).output_shape(((1, 2, 2), ((1, 2, 2), (3, 2, 2))))
        assert shapes == ((4, 1, 1), ((4, 1, 1), (12, 1, 1)))
        assert Each(Psi(2))(state)[1][1].shape == (1, 12, 1, 1)

    def test_a_layer_that_makes_tuples_is_refused(self):
        with pytest.raises(ShapeError, match="one tensor to one tensor"):
            Each(Split()).output_shape(((2,), (2,)))
        with pytest.raises(ShapeError, match="one tensor to one tensor, got a state of shape"):
            Each(Split())((torch.zeros(1, 2), torch.zeros(1, 2)))

    def test_one_tensor_is_refused(self):
        with pytest.raises(ShapeError, match="each expects a tuple state, got one tensor"):
            Each(Psi(2))(torch.zeros(1, 1, 2, 2))
