"""The contract: what an author has to say, what is refused with a sentence, and what is safe by default."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import invflow
from invflow import Bijection, Flow, Sequential, ShapeError, SpecError
from invflow.bijections import AdditiveCoupling, Merge, Parallel, Psi, Split
from invflow.models import StandardNormal
from invflow.nets import MLP
from invflow.state import leaves
from invflow.testing import check_bijection
from invflow.wires import Wired

from .authors import Doubling, spec_of

pytestmark = pytest.mark.usefixtures("forget_what_a_test_registers")


class TestVolume:
    def test_a_class_without_log_determinants_is_refused_when_it_is_defined(self):
        with pytest.raises(TypeError, match="Double has no forward_and_log_det and no inverse_and_log_det"):

            class Double(Bijection):
                def forward(self, x, context=None):
                    return 2 * x

                def inverse(self, y, context=None):
                    return y / 2

    def test_one_of_the_two_is_not_enough(self):
        with pytest.raises(TypeError, match="Half has no inverse_and_log_det: override both, or, if"):

            class Half(Bijection):
                forward = Doubling.forward
                inverse = Doubling.inverse
                forward_and_log_det = Doubling.forward_and_log_det

    def test_who_preserves_volume_says_so(self):
        class Negative(Bijection):
            volume_preserving = True

            def forward(self, x, context=None):
                return -x

            def inverse(self, y, context=None):
                return -y

        y, log_det = Negative().forward_and_log_det(torch.ones(3, 2))
        assert (y.tolist(), log_det.tolist()) == ([[-1.0, -1.0]] * 3, [0.0] * 3)
        assert check_bijection(Negative(), (2,), skip=["compiles", "pickles"]).ok

    def test_what_is_still_abstract_may_leave_it_open(self):
        class Family(Bijection):
            """What some layers share."""

            def forward(self, x, context=None):
                return 2 * x

        with pytest.raises(TypeError, match="abstract"):
            Family()

    def test_a_subclass_inherits(self):
        class Child(Doubling):
            pass

        assert Flow(Sequential(Child()), StandardNormal((2,))).log_prob(torch.zeros(1, 2)) == pytest.approx(
            2 * 0.6931471805599453 - 1.8378770664093453
        )

    def test_a_property_says_nothing_when_a_class_is_defined(self):
        with pytest.raises(TypeError, match="Maybe has no forward_and_log_det"):

            class Maybe(Bijection):
                factor = 3

                @property
                def volume_preserving(self):
                    return self.factor == 1

                forward = Doubling.forward
                inverse = Doubling.inverse

    @pytest.mark.parametrize("wrong", [lambda log_det: log_det[:, None], lambda log_det: log_det.sum()])
    def test_log_determinants_of_another_shape(self, wrong):
        class Wrong(Doubling):
            def forward_and_log_det(self, x, context=None):
                y, log_det = super().forward_and_log_det(x)
                return y, wrong(log_det)

        if wrong(torch.zeros(5)).dim():  # one number for all counts for each
            with pytest.raises(ShapeError, match=r"log-determinants of shape \(batch,\)"):
                Flow(Sequential(Wrong()), StandardNormal((2,))).log_prob(torch.zeros(5, 2))
        invflow.register("acme.wrong")(Wrong)
        with pytest.raises(SpecError, match=r"layers.0: acme.wrong must return log-determinants of shape \(batch,\)"):
            invflow.build(spec_of({"type": "acme.wrong"}))

    def test_a_subclass_with_another_map_is_not_retraced_as_its_base(self):
        class Scaled(AdditiveCoupling):
            def forward(self, x, context=None):
                u, a = super().forward(x, context)
                return 2 * u, a

            def inverse(self, y, context=None):
                return super().inverse((y[0] / 2, y[1]), context)

        torch.manual_seed(0)
        layers = [Scaled(MLP((2,), (2,), hidden=[4], activation="tanh")) for _ in range(3)]
        x = torch.randn(5, 2).double(), torch.randn(5, 2).double()

        def gradients(policy):
            chain = Sequential(*copy.deepcopy(layers), backprop=policy).double()
            sum(leaf.square().sum() for leaf in chain(x)).backward()
            return torch.cat([weight.grad.flatten() for weight in chain.parameters()])

        assert (gradients("reversible") - gradients("stored")).abs().max() < 1e-10


class TestShapes:
    def test_an_elementwise_layer_behind_a_split_is_refused_at_its_place(self):
        invflow.register("acme.double")(Doubling)
        with pytest.raises(SpecError, match=r"layers.1: acme.double expects one tensor, got a tuple state"):
            invflow.build(spec_of({"type": "split"}, {"type": "acme.double"}))
        each = invflow.build(spec_of({"type": "split"}, {"type": "each", "layer": {"type": "acme.double"}}))
        assert each.output_shape((4,)) == ((2,), (2,))
        backwards = invflow.build(spec_of({"type": "inverse", "layer": {"type": "acme.double"}}, shape=(2, 3)))
        assert backwards.output_shape((2, 3)) == (2, 3)

    def test_another_shape_than_it_says(self):
        @invflow.register("acme.flat")
        class Flat(Doubling):
            def forward(self, x, context=None):
                return x.flatten(1)

        with pytest.raises(SpecError, match=r"layers.0: acme.flat declares that it turns \(2, 3\) into \(2, 3\)"):
            invflow.build(spec_of({"type": "acme.flat"}, shape=(2, 3)))

    def test_a_layer_that_does_not_run(self):
        @invflow.register("acme.broken")
        class Broken(Doubling):
            def forward(self, x, context=None):
                return x @ torch.ones(3, 3)

        with pytest.raises(SpecError, match=r"layers.0: acme.broken does not run on a state of shape \(4,\): Runt"):
            invflow.build(spec_of({"type": "acme.broken"}))

    def test_the_inverse_needs_its_context(self):
        class Shifted(Psi):
            def __init__(self):
                super().__init__(2)

            input_shape = Bijection.input_shape

            def inverse(self, y, context=None):
                return super().inverse(y) - context

        with pytest.raises(ShapeError, match=r"does not run on zeros of shape \(4, 2, 2\) without a context"):
            Shifted().input_shape((4, 2, 2))


class TestAuthorsMistakes:
    """Each is one sentence at its place, and no traceback."""

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (lambda self, shape: shape[1], "IndexError"),
            (lambda self, shape: dict([shape]), "ValueError|TypeError"),
            (lambda self, shape: 4, "expected the shape of a state"),
            (lambda self, shape: [4], "expected the shape of a state"),
            (lambda self, shape: None, "expected the shape of a state"),
        ],
    )
    def test_in_output_shape(self, method, message):
        @invflow.register("acme.shapes")
        class Shapes(Doubling):
            output_shape = method

        with pytest.raises(SpecError, match=rf"layers.0: .*({message})"):
            invflow.build(spec_of({"type": "acme.shapes"}))

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            (lambda cls, shape: {"net": (shape, shape)}, "TypeError"),
            (lambda cls, shape, fields: {"net": shape}, "a pair of shapes"),
            (lambda cls, shape, fields: (shape, shape), "must return a dict, got tuple"),
            (lambda cls, shape, fields: fields["bins"], "KeyError"),
        ],
    )
    def test_in_net_shapes(self, method, message):
        @invflow.register("acme.nets")
        class Nets(Doubling):
            def __init__(self, net: nn.Module) -> None:
                super().__init__()
                self.net = net

            net_shapes = classmethod(method)

        with pytest.raises(SpecError, match=rf"layers.0: .*({message})"):
            invflow.build(spec_of({"type": "acme.nets", "net": {"type": "mlp"}}))

    def test_in_a_nets_constructor(self):
        @invflow.register_net("acme.images")
        class Images(nn.Module):
            def __init__(self, in_shape: tuple[int, ...]) -> None:
                super().__init__()
                self.size = in_shape[1]

        @invflow.register_net("acme.conditional")
        class Conditional(nn.Module):
            def __init__(self, context_shape: tuple[int, ...]) -> None:
                super().__init__()
                self.size = context_shape[0]

        for tag, message in (("acme.images", "IndexError"), ("acme.conditional", "TypeError")):
            coupling = {"type": "additive_coupling", "net": {"type": tag}}
            with pytest.raises(SpecError, match=rf"layers.1.net: {tag} cannot be made: {message}"):
                invflow.build(spec_of({"type": "split"}, coupling))

    def test_a_net_that_broadcasts(self):
        @invflow.register_net("acme.narrow")
        class Narrow(nn.Module):
            def __init__(self, in_shape: tuple[int, ...]) -> None:
                super().__init__()

            def forward(self, a):
                return a[:, :1]

        coupling = {"type": "additive_coupling", "net": {"type": "acme.narrow"}}
        with pytest.raises(SpecError, match=r"layers.1.net: acme.narrow must map \(2,\) to \(2,\), but"):
            invflow.build(spec_of({"type": "split"}, coupling))

    def test_nets_and_heads_with_parts(self):
        class Wrapping(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()

        for register in (invflow.register_net, invflow.register_head):
            with pytest.raises(TypeError, match="has no layers or nets of its own, as 'inner' is"):
                register("acme.wrapping")(Wrapping)

    def test_a_field_without_a_json_schema(self):
        class Function(Doubling):
            def __init__(self, f: Callable[..., int] = len) -> None:
                super().__init__()

        class Endless(Doubling):
            def __init__(self, f: float = math.inf) -> None:
                super().__init__()

        for cls in (Function, Endless):
            with pytest.raises(TypeError, match=r"cannot be registered: a field has no JSON schema|has no JSON form"):
                invflow.register("acme.field")(cls)

    def test_wires_that_leave_a_layer_out(self):
        @invflow.register("acme.lonely")
        class Lonely(Parallel):
            @classmethod
            def wiring(cls, count, shape, fields):
                return [(0, (0,))]

        layers = [{"type": "affine"}, {"type": "affine"}]
        with pytest.raises(SpecError, match=r"layers.0: wiring of acme.lonely must place each of its 2 layers"):
            invflow.build(spec_of({"type": "acme.lonely", "layers": layers}, shape=((2,), (2,))))

    def test_a_domain_check_does_not_stop_saving(self, tmp_path):
        @invflow.register("acme.checked")
        class Checked(Doubling):
            def forward(self, x, context=None):
                if (x < 0).any():
                    raise ValueError("acme.checked expects positive numbers")
                return super().forward(x)

        chain = invflow.build(spec_of({"type": "acme.checked"}))
        invflow.save(chain, tmp_path / "chain")
        assert isinstance(invflow.load(tmp_path / "chain")[0], Checked)


class TestInnerLayers:
    def test_two_fields_of_a_wired_bijection(self):
        @invflow.register("acme.branches")
        class Branches(Wired):
            """(a, b) -> (f(a), g(b)).

            Args:
                left: f.
                right: g.
            """

            examples = [({"left": {"type": "affine"}, "right": {"type": "split"}}, ((2,), (4,)))]

            def __init__(self, left: Bijection, right: Bijection) -> None:
                super().__init__()
                self.left = left
                self.right = right

            def named_layers(self):
                return [("left", self.left), ("right", self.right)]

            @classmethod
            def wiring(cls, count, shape, fields):
                return [(0, (0,)), (1, (1,))]

        inner = {"type": "sequential", "layers": [{"type": "psi", "block_size": 2}, {"type": "actnorm"}]}
        document = spec_of(
            {"type": "acme.branches", "left": inner, "right": {"type": "affine"}}, shape=((1, 4, 4), (3,))
        )
        chain = invflow.build(document)
        assert chain.output_shape(((1, 4, 4), (3,))) == ((4, 2, 2), (3,))
        assert [step.name for step in chain.steps()] == [
            "layers.0.left.layers.0",
            "layers.0.left.layers.1",
            "layers.0.right",
        ]
        backwards = invflow.build(spec_of({"type": "inverse", "layer": document["layers"][0]}, shape=((4, 2, 2), (3,))))
        assert backwards.output_shape(((4, 2, 2), (3,))) == ((1, 4, 4), (3,))
        assert invflow.to_spec(chain)["layers"] == document["layers"]

    def test_a_wrapper_that_says_nothing_of_wires(self):
        @invflow.register("acme.scaled")
        class Scaled(Doubling):
            """y = 2 f(x).

            Args:
                layer: f.
            """

            def __init__(self, layer: Bijection) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x, context=None):
                return 2 * self.layer(x, context)

            def inverse(self, y, context=None):
                return self.layer.inverse(y / 2, context)

        chain = invflow.build(spec_of({"type": "acme.scaled", "layer": {"type": "permute", "seed": 0}}))
        x = torch.randn(3, 4)
        assert torch.equal(chain(x), 2 * chain[0].layer(x))
        assert [step.layer for step in chain.steps()] == [chain[0]]


class TestRegistration:
    def test_an_abstract_class(self):
        class Family(Bijection):
            def forward(self, x, context=None):
                return x

        with pytest.raises(TypeError, match=r"Family cannot be registered: it does not override inverse"):
            invflow.register("acme.family")(Family)

    def test_constructors_that_no_document_can_call(self):
        class Positional(Doubling):
            def __init__(self, factor: int = 2, /) -> None:
                super().__init__()

        class Mixed(Doubling):
            def __init__(self, shape: tuple[int, ...], *layers: Bijection) -> None:
                super().__init__()

        with pytest.raises(TypeError, match="'factor' is positional-only"):
            invflow.register("acme.positional")(Positional)
        with pytest.raises(TypeError, match=r"other parameters than \*layers are passed by name"):
            invflow.register("acme.mixed")(Mixed)

    def test_a_class_without_a_constructor_registers_after_a_compilation(self):
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))  # which replaces nn.Module.__init__

        class Twice(Doubling):
            pass

        class Again(invflow.register("acme.twice")(Twice)):
            pass

        invflow.register("acme.again")(Again)
        chain = invflow.build(spec_of({"type": "acme.twice"}, {"type": "acme.again"}))
        assert invflow.to_spec(chain)["layers"] == [{"type": "acme.twice"}, {"type": "acme.again"}]

    def test_the_tag_is_written_on_the_class(self):
        class Twice(Doubling):
            pass

        assert Twice.tag == "Twice"
        assert invflow.register("acme.twice")(Twice).tag == "acme.twice"

        class Child(Twice):
            pass

        assert Child.tag == "Child"
        assert Psi(2).tag == "psi"


def test_a_coupling_computes_its_scale_once(monkeypatch):
    calls = []
    original = torch.tanh
    monkeypatch.setattr(torch, "tanh", lambda x: calls.append(1) or original(x))
    coupling = invflow.bijections.AffineCoupling(nn.Linear(2, 4))
    y, _ = coupling.forward_and_log_det((torch.randn(3, 2), torch.randn(3, 2)))
    coupling.inverse_and_log_det(y)
    assert len(calls) == 2


def test_every_part_of_the_contract_is_declared():
    """Nothing is asked of a layer that the base class does not have."""
    asked = {"net_shapes", "input_shape", "output_shape", "domain", "codomain", "cheap_inverse", "limit",
             "exactness", "inverse_tolerance", "log_det_is_estimated", "traceable", "surjective", "lipschitz_bounds",
             "may_be_flat", "awaits_data", "initialize", "examples", "volume_preserving", "tag"}  # fmt: skip
    assert all(hasattr(Doubling, name) for name in asked)
    chain = Sequential(Split(), AdditiveCoupling(MLP((2,), (2,))), Merge())
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves(chain(torch.zeros(1, 4))))
