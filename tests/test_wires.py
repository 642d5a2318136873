"""Wires: which part of the state each layer acts on, and that whatever looks into a chain follows them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import invflow
from invflow import Bijection, Inverse, Sequential, ShapeError, SpecError
from invflow.bijections import (
    ActNorm,
    AdditiveCoupling,
    Affine,
    AffineCoupling,
    Each,
    Exchange,
    Linear1x1,
    Logit,
    Merge,
    On,
    Parallel,
    Permute,
    Psi,
    Split,
)
from invflow.diagnostics.check import check
from invflow.diagnostics.conditioning import conditioning
from invflow.diagnostics.memory import activation_memory
from invflow.diagnostics.reconstruction import reconstruction_errors
from invflow.nets import MLP
from invflow.state import leaf_paths, leaves, map_state, part_of, shape_of, with_part
from invflow.steps import steps_of
from invflow.testing.thorough import check_thoroughly
from invflow.wires import Wired

GRADIENT = 1e-10
"""Relative, float64: inverting loses some units of eps per layer, times the gain of a dozen layers."""

COUPLING = {"type": "additive_coupling", "net": {"type": "conv", "hidden": [3]}}


def chain_document(couplings):
    return {"type": "sequential", "layers": [{"type": "split"}, *[COUPLING] * couplings, {"type": "merge"}]}


def wrapped(how, couplings):
    """A spec in which a wrapper holds a chain, or two, of couplings."""
    inner = chain_document(couplings)
    documents = {
        "each": ([[4, 6, 6], [4, 6, 6]], [{"type": "each", "layer": inner}]),
        "parallel": ([[4, 6, 6], [4, 6, 6]], [{"type": "parallel", "layers": [inner, inner]}]),
        "on": ([[4, 6, 6], [4, 6, 6]], [{"type": "on", "index": 0, "layers": inner["layers"]}]),
        "inverse": ([4, 6, 6], [{"type": "inverse", "layer": inner}]),
        "sequential": ([4, 6, 6], [inner]),
        "all of them": (
            [[4, 6, 6], [4, 6, 6]],
            [
                {"type": "on", "index": -1, "layers": [{"type": "inverse", "layer": inner}]},
                {"type": "exchange", "order": [1, 0]},
                {"type": "parallel", "layers": [inner, {"type": "inverse", "layer": inner}]},
                {"type": "each", "layer": inner},
            ],
        ),
    }
    shape, layers = documents[how]
    return {"input": {"shape": shape}, "layers": layers, "backprop": "reversible"}


WRAPPERS = ("each", "parallel", "on", "inverse", "sequential", "all of them")


def kept_bytes(chain, x):
    """What a forward keeps for backward, weights not counted."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*chain.parameters(), *leaves(x))}
    sizes, alive = [], []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            known.add(tensor.untyped_storage().data_ptr())
            sizes.append(tensor.untyped_storage().nbytes())
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = chain(x)
    del y
    return sum(sizes)


def inputs(chain, batch=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return invflow.state.make_state(
        lambda shape: torch.randn((batch, *shape), generator=generator, dtype=dtype), chain.declared_shape
    )


@pytest.mark.parametrize("how", WRAPPERS)
def test_constant_memory_is_kept_within_wrappers(how):
    shallow, deep = (invflow.build(wrapped(how, couplings)) for couplings in (4, 64))
    kept = [kept_bytes(chain, inputs(chain, dtype=torch.float32)) for chain in (shallow, deep)]
    assert kept[1] <= 1.1 * kept[0]
    stored = copy.deepcopy(deep)
    stored.backprop = "stored"
    assert kept_bytes(stored, inputs(deep, dtype=torch.float32)) > 5 * kept[1]
    tables = [activation_memory(chain, 5).kept["reversible"] for chain in (shallow, deep)]
    assert tables[1] <= 1.1 * tables[0]


def gradients(chain, x, policy, *, log_det, backwards=False):
    chain = copy.deepcopy(chain)
    chain.backprop = policy
    x = map_state(lambda leaf: leaf.clone().requires_grad_(), x)
    call = chain.inverse_and_log_det if backwards else chain.forward_and_log_det
    y, total = call(x) if log_det else ((chain.inverse(x) if backwards else chain(x)), torch.zeros(()))
    loss = total.sum() + sum((leaf**2 * (1 + place)).sum() for place, leaf in enumerate(leaves(y)))
    loss.backward()
    return torch.cat([tensor.grad.flatten() for tensor in (*leaves(x), *chain.parameters())])


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("log_det", [False, True])
@pytest.mark.parametrize("how", WRAPPERS)
def test_gradients_are_those_of_plain_training(how, log_det, backwards):
    torch.manual_seed(0)
    document = json.loads(json.dumps(wrapped(how, 3)).replace("additive_coupling", "affine_coupling"))
    chain = invflow.build(document).double()
    x = inputs(chain)
    x = chain(x) if backwards else x
    x = map_state(torch.Tensor.detach, x)
    right = gradients(chain, x, "stored", log_det=log_det, backwards=backwards)
    for policy in ("reversible", "checkpoint"):
        found = gradients(chain, x, policy, log_det=log_det, backwards=backwards)
        assert (found - right).abs().max() <= GRADIENT * right.abs().max()


@pytest.mark.parametrize("how", WRAPPERS)
def test_whatever_looks_into_a_chain_sees_every_coupling(how):
    chain = invflow.build(wrapped(how, 3))
    x = inputs(chain, dtype=torch.float32)
    steps = chain.steps(shape_of(x))
    couplings = [step for step in steps if isinstance(step.layer, AdditiveCoupling)]
    expected = 3 * {"each": 2, "parallel": 2, "on": 1, "inverse": 1, "sequential": 1, "all of them": 5}[how]
    assert len(couplings) == expected
    assert len({step.name for step in steps}) == len(steps)
    assert len(chain.trace(x)) == len(steps) + 1
    assert [shape_of(state) for state in chain.trace(x)] == chain.shapes(shape_of(x))
    for one, other in zip(leaves(chain.trace(x)[-1]), leaves(chain(x)), strict=True):
        assert torch.equal(one, other)
    names = [step.name for step in steps]
    assert [layer.name for layer in check(chain).layers] == names
    assert list(reconstruction_errors(chain.train(), x)) == names
    assert len(activation_memory(chain, 2).layers) == len(names)


def test_the_thorough_check_looks_inside_too():
    chain = invflow.build({**wrapped("parallel", 1), "backprop": "stored"})
    found = check_thoroughly(chain)
    assert found.ok
    assert len(found.layers) == len(found.error_by_depth) - 1 == len(chain.steps()) == 6


def test_conditioning_looks_inside_too():
    torch.manual_seed(0)
    inner = {"type": "sequential", "layers": [{"type": "affine"}, {"type": "permute", "order": [1, 0]}]}
    document = {"input": {"shape": [[2], [2]]}, "layers": [{"type": "each", "layer": inner}]}
    chain = invflow.build(document)
    with torch.no_grad():
        chain[0].layer[0].log_scale.copy_(torch.tensor([2.0, 0.5]).log())
    found = conditioning(chain)
    assert len(found.layers) == 4
    assert [round(layer.lipschitz, 6) for layer in found.layers] == [2, 1, 2, 1]
    assert found.condition_number == pytest.approx(4)


def test_a_monitor_names_the_step_inside_a_wrapper():
    class Unsound(Bijection):
        """y = x, and an inverse that is off."""

        volume_preserving = True
        cheap_inverse = True

        def forward(self, x, context=None):
            return x * 1.0

        def inverse(self, y, context=None):
            return y + 0.5

    chain = Sequential(
        Each(Sequential(Affine((3,)), Unsound())), Each(Affine((3,))), backprop="reversible", monitor="warn"
    )
    x = (torch.randn(99, 3), torch.randn(99, 3))
    with pytest.warns(invflow.errors.ReconstructionWarning, match=r"layers.0.layer@1.layers.1, Unsound\(\)"):
        sum(leaf.square().sum() for leaf in chain(x)).backward()
    assert chain.reconstruction.errors["layers.0.layer@0.layers.1"] > 0.1


class TestHooksAndSubclasses:
    def test_a_hooked_wrapper_is_called_as_a_whole(self):
        seen = []
        each = Each(Sequential(Affine((3,)), Permute(order=[2, 0, 1])))
        each.register_forward_hook(lambda *_: seen.append(1))
        chain = Sequential(each, backprop="reversible")
        chain((torch.randn(2, 3), torch.randn(2, 3)))
        assert seen == [1]
        assert [step.layer for step in chain.steps(((3,), (3,)))] == [each]

    def test_a_subclass_that_does_more_is_not_taken_apart(self):
        class Louder(Sequential):
            def forward(self, x, context=None):
                return 2 * super().forward(x, context)

            def inverse(self, y, context=None):
                return super().inverse(y / 2, context)

        louder = Louder(Affine((3,)), Permute(order=[2, 0, 1]))
        assert torch.equal(louder.trace(torch.ones(1, 3))[-1], louder(torch.ones(1, 3)))
        outer = Sequential(louder, Affine((3,)), backprop="reversible")
        x = torch.randn(2, 3)
        assert torch.equal(outer(x), 2 * Sequential(*louder)(x))
        assert [step.layer for step in outer.steps((3,))] == [louder, outer[1]]

    def test_a_wired_class_that_does_more_is_not_taken_apart_either(self):
        class Louder(Wired):
            def __init__(self, layer):
                super().__init__()
                self.layer = layer

            def named_layers(self):
                return [("layer", self.layer)]

            @classmethod
            def wiring(cls, count, shape, fields):
                return [(0, ())]

            def forward(self, x, context=None):
                return 2 * super().forward(x, context)

            def inverse(self, y, context=None):
                return super().inverse(y / 2, context)

        chain = Sequential(Louder(Sequential(Affine((3,)), Permute(order=[2, 0, 1]))), Affine((3,)))
        x = torch.randn(2, 3)
        assert torch.equal(chain.trace(x)[-1], chain(x))
        stored = chain(x)
        chain.backprop = "reversible"
        assert torch.equal(chain(x), stored)


def test_domains_of_what_is_made_of_others():
    ends = Inverse(Logit())
    assert (ends.domain, ends.codomain) == ("reals", "unit")
    for layer in (Sequential(ends), Each(ends), Parallel(ends, ends), On(ends)):
        assert (layer.domain, layer.codomain) == ("reals", None)
    for layer in (Sequential(Logit()), Each(Logit()), Parallel(Logit(), Affine((2,))), On(Logit())):
        assert (layer.domain, layer.codomain) == ("unit", None)
    assert Sequential(Affine((2,)), Permute(order=[1, 0])).codomain == "reals"


def test_the_inverse_of_a_built_chain_asks_no_layer_for_its_input_shape():
    class Asking(Affine):
        def input_shape(self, shape):
            raise ShapeError("it does not know")

    inner = {"type": "sequential", "layers": [{"type": "affine"}]}
    chain = invflow.build({"input": {"shape": [[3], [3]]}, "layers": [{"type": "each", "layer": inner}]})
    chain.layers.append(Parallel(Asking((3,)), Affine((3,))))
    chain.backprop = "reversible"
    x = (torch.randn(2, 3), torch.randn(2, 3))
    assert len(chain.steps(backwards=True)) == 4
    for one, other in zip(chain.inverse(chain(x)), x, strict=True):
        torch.testing.assert_close(one, other)


def test_a_state_of_too_many_tensors():
    with pytest.raises(invflow.SpecError, match="a state of 2000 tensors, the limit is 1024"):
        invflow.build({"input": {"shape": [[1]] * 2000}, "layers": []})


class TestParallel:
    def test_acts_on_each_part(self):
        a, b = torch.randn(2, 1, 4, 4), torch.randn(2, 3)
        layer = Parallel(Psi(2), Sequential(Affine((3,)), Split()))
        y = layer((a, b))
        assert torch.equal(y[0], Psi(2)(a))
        assert shape_of(y) == ((4, 2, 2), ((1,), (2,))) == layer.output_shape(((1, 4, 4), (3,)))
        assert layer.input_shape(shape_of(y)) == ((1, 4, 4), (3,))
        back = layer.inverse(y)
        assert torch.equal(back[0], a)
        assert torch.allclose(back[1], b)

    def test_the_log_determinants_add_up(self):
        layer = Parallel(Affine((2,)), Affine((3,)))
        with torch.no_grad():
            layer.layers[0].log_scale.fill_(0.5)
            layer.layers[1].log_scale.fill_(0.25)
        state = (torch.randn(4, 2), torch.randn(4, 3))
        y, log_det = layer.forward_and_log_det(state)
        assert log_det.tolist() == [1.75] * 4
        assert layer.inverse_and_log_det(y)[1].tolist() == [-1.75] * 4

    @pytest.mark.parametrize("shape", [(4,), ((4,), (4,), (4,))])
    def test_another_number_of_parts_is_refused(self, shape):
        layer = Parallel(Affine((4,)), Affine((4,)))
        with pytest.raises(ShapeError, match="parallel with 2 layers expects a tuple of 2 states"):
            layer.output_shape(shape)
        with pytest.raises(ShapeError, match="parallel with 2 layers expects a tuple of 2 states"):
            layer(invflow.state.zeros(shape))

    def test_what_is_no_list_of_layers(self):
        with pytest.raises(ShapeError, match="expects at least two layers"):
            Parallel(Psi(2))
        with pytest.raises(ShapeError, match="parallel expects bijections, got ReLU at position 1"):
            Parallel(Psi(2), nn.ReLU())

    def test_an_error_in_a_spec_names_its_place(self):
        layers = [{"type": "parallel", "layers": [{"type": "affine"}, {"type": "psi"}]}]
        with pytest.raises(invflow.SpecError, match=r"layers.0.layers.1: psi expects a shape"):
            invflow.build({"input": {"shape": [[4], [4]]}, "layers": layers})


class TestOn:
    @pytest.mark.parametrize(("index", "place"), [(0, 0), (-1, 2), (1, 1), (-3, 0)])
    def test_acts_on_one_part(self, index, place):
        layer = On(Affine((3,)), Permute(order=[2, 0, 1]), index=index)
        state = tuple(torch.randn(2, 3) for _ in range(3))
        y = layer(state)
        assert torch.equal(y[place], layer.layers[1](state[place]))
        assert all(y[i] is state[i] for i in range(3) if i != place)
        assert torch.equal(layer.inverse(y)[place], state[place])

    def test_a_single_tensor_is_the_part_itself(self):
        layer = On(Psi(2))
        x = torch.randn(2, 1, 4, 4)
        assert torch.equal(layer(x), Psi(2)(x))
        assert torch.equal(layer.inverse(layer(x)), x)
        assert layer.output_shape((1, 4, 4)) == (4, 2, 2)

    def test_a_single_tensor_has_to_stay_one(self):
        for call in (lambda: On(Split())(torch.zeros(1, 4)), lambda: On(Split()).output_shape((4,))):
            with pytest.raises(ShapeError, match="turn a single tensor into one tensor"):
                call()

    def test_no_such_part(self):
        with pytest.raises(ShapeError, match="on expects a tuple with a part 2, got one of 2"):
            On(Psi(2), index=2).output_shape(((4,), (4,)))

    def test_levels_by_repeat(self):
        """Whether anything was split off before or not, the same layers go on."""
        level = [{"type": "on", "layers": [{"type": "psi", "block_size": 2}, {"type": "actnorm"}]}]
        chain = invflow.build(
            {"input": {"shape": [1, 8, 8]}, "layers": [{"type": "repeat", "times": 2, "layers": level}]}
        )
        assert chain.output_shape((1, 8, 8)) == (16, 2, 2)


class TestExchange:
    def test_reorders_and_regroups(self):
        a, b, c = (torch.full((1, size), float(size)) for size in (1, 2, 3))
        layer = Exchange(order=[[2, 0], 1])
        assert layer((a, b, c)) == ((c, a), b)
        assert layer.inverse(((c, a), b)) == (a, b, c)
        assert layer.output_shape(((1,), (2,), (3,))) == (((3,), (1,)), (2,))
        assert layer.input_shape((((3,), (1,)), (2,))) == ((1,), (2,), (3,))

    def test_parts_may_be_tuples(self):
        a, b, c = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 2)
        assert Exchange(order=[1, 0])(((a, b), c)) == (c, (a, b))

    def test_ungroups_backwards(self):
        a, b, c = torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 2)
        assert Inverse(Exchange(order=[[0, 1], 2]))(((a, b), c)) == (a, b, c)

    @pytest.mark.parametrize("order", [[0, 0], [1, 2], [0, [1, 1]], [[0, 2]]])
    def test_what_is_no_order(self, order):
        with pytest.raises(ValueError, match=r"exchange expects an order|Exchange: order"):
            Exchange(order=order)

    @pytest.mark.parametrize("state", [torch.zeros(1, 2), (torch.zeros(1, 2),) * 3])
    def test_another_state_is_refused(self, state):
        with pytest.raises(ShapeError, match="exchange expects a tuple of 2 states, got one of shape"):
            Exchange(order=[1, 0])(state)
        with pytest.raises(ShapeError, match="exchange expects a tuple of 2 states"):
            Exchange(order=[1, 0]).output_shape(shape_of(state))

    def test_a_group_that_is_none(self):
        with pytest.raises(ShapeError, match="the inverse of exchange expects a tuple of 2 states, got one of shape"):
            Exchange(order=[[0, 1], 2]).inverse((torch.zeros(1, 2), torch.zeros(1, 2)))


GRAPH = {
    "note": "the graph of FrEIA's tutorial on graphs: two inputs and a condition, two splits, two concatenations",
    "input": {"shape": [[100], [20]], "context_shape": [42]},
    "layers": [
        {
            "type": "on",
            "index": 0,
            "layers": [
                {"type": "permute", "seed": 0},
                {"type": "split"},
                {
                    "type": "on",
                    "index": 1,
                    "layers": [{"type": "split"}, {"type": "on", "index": 1, "layers": [{"type": "actnorm"}]}],
                },
            ],
        },
        {"type": "inverse", "layer": {"type": "exchange", "order": [[0, 1], 2]}},
        {"type": "inverse", "layer": {"type": "exchange", "order": [0, [1, 2], 3]}},
        {"type": "exchange", "order": [0, 1, [2, 3]]},
        {
            "type": "on",
            "layers": [
                {"type": "merge"},
                {"type": "split"},
                {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [256]}},
                {"type": "exchange", "order": [1, 0]},
                {"type": "merge"},
            ],
        },
        {"type": "exchange", "order": [0, [1, 2]]},
        {
            "type": "parallel",
            "layers": [{"type": "sequential", "layers": []}, {"type": "merge"}],
        },
    ],
    "backprop": "reversible",
}


def test_any_graph_of_bijections_is_a_chain():
    torch.manual_seed(0)
    chain = invflow.build(GRAPH).double()
    x1, x2, context = (torch.randn(5, size, dtype=torch.float64) for size in (100, 20, 42))
    chain.initialize((x1, x2), context)
    # The same, node by node.
    permute, _, inner = chain[0].layers
    actnorm, coupling = inner.layers[1].layers[0], chain[4].layers[2]
    first, rest = permute(x1).chunk(2, dim=1)
    second, third = rest.chunk(2, dim=1)
    joined = torch.cat([actnorm(third), x2], dim=1)
    a, b = joined.split([22, 23], dim=1)
    changed, kept = coupling((a, b), context)
    by_hand = (first, torch.cat([second, kept, changed], dim=1))
    y, log_det = chain.forward_and_log_det((x1, x2), context)
    assert all(torch.equal(one, other) for one, other in zip(y, by_hand, strict=True))
    assert shape_of(y) == ((50,), (70,)) == chain.output_shape(((100,), (20,)))
    for before, after in zip((x1, x2), chain.inverse(y, context), strict=True):
        assert (before - after).abs().max() < 1e-12
    expected = actnorm.forward_and_log_det(third)[1] + coupling.forward_and_log_det((a, b), context)[1]
    torch.testing.assert_close(log_det, expected, rtol=1e-12, atol=1e-12)
    assert invflow.to_spec(invflow.build(invflow.to_spec(chain))) == invflow.to_spec(chain)


def test_the_graph_trains_in_constant_memory():
    torch.manual_seed(0)
    chain = invflow.build({**GRAPH, "input": {"shape": [[100], [20]]}}).double()
    x = inputs(chain)
    chain.initialize(x)
    right = gradients(chain, x, "stored", log_det=True)
    assert (gradients(chain, x, "reversible", log_det=True) - right).abs().max() <= GRADIENT * right.abs().max()


def test_data_dependent_initialisation_follows_the_wires():
    chain = Sequential(
        Parallel(Sequential(Affine((2,)), ActNorm((2,))), ActNorm((3,))),
        On(Permute(order=[1, 0]), ActNorm((2,)), index=0),
    )
    with torch.no_grad():
        chain[0].layers[0][0].log_scale.fill_(1.0)
    x = (torch.randn(50, 2) * 3 + 1, torch.randn(50, 3) * 5)
    assert chain.awaits_data
    chain.initialize(x)
    assert not chain.awaits_data
    for leaf in leaves(chain(x)):
        torch.testing.assert_close(leaf.mean(0), torch.zeros(leaf.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(leaf.std(0, correction=0), torch.ones(leaf.shape[1]))


def test_numerics_reach_every_layer():
    for document in (wrapped(how, 2) for how in WRAPPERS):
        chain = invflow.build({**document, "numerics": {"mode": "exact"}})
        assert chain.exactness == "exact"
        x = map_state(lambda leaf: (leaf * 8).round() / 8, inputs(chain, dtype=torch.float32))
        for before, after in zip(leaves(x), leaves(chain.inverse(chain(x))), strict=True):
            assert torch.equal(before, after)


def test_a_layer_that_is_not_exact_is_found_within_wrappers():
    layers = [{"type": "parallel", "layers": [{"type": "affine"}, {"type": "permute", "seed": 0}]}]
    with pytest.raises(invflow.SpecError, match=r"layers.0.layers.0: affine cannot be grid"):
        invflow.build({"input": {"shape": [[4], [4]]}, "layers": layers, "numerics": {"mode": "grid"}})


def test_paths():
    state = (torch.zeros(1, 8), (torch.zeros(1, 2), torch.zeros(1, 3)))
    assert leaf_paths(shape_of(state)) == [(0,), (1, 0), (1, 1)]
    assert part_of(state, (1, 1)) is state[1][1]
    assert with_part(state, (1, 0), "x") == (state[0], ("x", state[1][1]))
    assert part_of(state, ()) is state
    with pytest.raises(ShapeError, match=r"expected a state with a part at \[0, 0\], got one of shape"):
        part_of(state, (0, 0))


def test_steps_of_what_is_no_chain():
    psi = Psi(2)
    (step,) = steps_of(psi, (1, 4, 4))
    assert (step.layer, step.path, step.backwards) == (psi, (), False)
    (step,) = steps_of(Inverse(psi), (4, 2, 2))
    assert step.shape_after((4, 2, 2)) == (1, 4, 4)
    first, second = steps_of(Inverse(Sequential(psi, Affine((4, 2, 2)))), (4, 2, 2))
    assert (second.layer, second.backwards, second.name) == (psi, True, "layer.layers.0")
    assert first.backwards
    with pytest.raises(ShapeError, match="depend on the shape of the state"):
        Sequential(Each(Sequential(psi))).steps()


class TestEachOverSeveralShapes:
    """One layer for parts of several shapes: built for the first of them, it has to fit every other."""

    @staticmethod
    def build(first, second, net):
        layers = [{"type": "split"}, {"type": "additive_coupling", "net": net}, {"type": "merge"}]
        layer = {"type": "each", "layer": {"type": "sequential", "layers": layers}}
        return invflow.build({"input": {"shape": [first, second]}, "layers": [layer]})

    def test_weights_that_fit_one_part_only_are_refused_at_their_place(self):
        with pytest.raises(SpecError, match=r"layers.0.layer: .* \(2, 4, 4\) and \(2, 2, 4\).* its own layer"):
            self.build([2, 4, 4], [2, 2, 4], {"type": "mlp"})

    def test_weights_that_fit_every_part_are_shared(self):
        torch.manual_seed(0)
        chain = self.build([4, 6, 6], [4, 3, 5], {"type": "conv", "hidden": [3]}).double().eval()
        x = torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.randn(3, 4, 3, 5, dtype=torch.float64)
        back = chain.inverse(chain(x))
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(back, x, strict=True))

    def test_parts_of_one_shape_share_any_layer(self):
        assert self.build([4], [4], {"type": "mlp"}).output_shape(((4,), (4,))) == ((4,), (4,))


def test_context_reaches_every_layer():
    net = MLP((2,), (4,), context_shape=(3,))
    inner = Sequential(Split(), AffineCoupling(net), Merge())
    chain = Sequential(
        Each(inner), Parallel(inner, Linear1x1((4,))), On(inner, index=1), backprop="reversible"
    ).double()
    x = (torch.randn(5, 4).double(), torch.randn(5, 4).double())
    context = torch.randn(5, 3).double()
    y = chain(x, context)
    for before, after in zip(leaves(x), leaves(chain.inverse(y, context)), strict=True):
        assert (before - after).abs().max() < 1e-12
    assert not torch.allclose(chain(x, context + 1)[0], y[0])


def test_a_chain_shows_what_its_layers_hold_with_the_shapes_of_their_parts():
    inner = [{"type": "psi", "block_size": 2}, {"type": "split"}]
    layers = [{"type": "on", "index": 0, "layers": inner}, {"type": "parallel", "layers": [{"type": "merge"}] * 2}]
    chain = invflow.build({"input": {"shape": [[1, 4, 4], [[2], [3]]]}, "layers": [layers[0]]})
    lines = [line.split() for line in repr(chain).splitlines()]
    assert [line[0] for line in lines] == ["Sequential(", "(0):", "(0):", "(1):", ")", ")"]
    assert "On(index=0" in repr(chain)
    assert " ".join(lines[2][2:]) == "(4, 2, 2)"
    assert " ".join(lines[3][2:]) == "((2, 2, 2), (2, 2, 2))"
    both = invflow.build({"input": {"shape": [[[1], [2]], [[2], [3]]]}, "layers": [layers[1]]})
    assert [line.split("  ")[-1].strip() for line in repr(both).splitlines()[2:4]] == ["(3,)", "(5,)"]
    assert repr(invflow.Sequential(*both)).count("Merge()") == 2  # without a shape too
