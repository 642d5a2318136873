"""Registration: the fields are derived from the constructor, without a second declaration."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

import invflow
from invflow import registry


@pytest.fixture(autouse=True)
def forget_what_a_test_registers(monkeypatch):
    for one in (registry.bijections, registry.nets, registry.heads):
        monkeypatch.setattr(one, "_classes", dict(one._classes))
        monkeypatch.setattr(one, "_fields", dict(one._fields))


def make_scale():
    class Scale(invflow.Bijection):
        """y = factor * x, elementwise.

        Args:
            factor: what to multiply by.
        """

        examples = [({}, (2,))]

        def __init__(self, factor: PositiveFloat = 2.0) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x * self.factor

        def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
            return y / self.factor

        def forward_and_log_det(self, x, context=None):
            return self(x), x.new_full((len(x),), math.log(self.factor) * x[0].numel())

        def inverse_and_log_det(self, y, context=None):
            return self.inverse(y), y.new_full((len(y),), -math.log(self.factor) * y[0].numel())

    return Scale


def spec_of(*layers, shape=(2,)):
    return {"input": {"shape": list(shape)}, "layers": list(layers)}


def test_one_class_is_all_it_takes():
    scale = invflow.register("acme.scale")(make_scale())
    assert invflow.registered()["acme.scale"] is scale
    chain = invflow.build(spec_of({"type": "acme.scale", "factor": 3}))
    assert chain(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]
    assert invflow.to_spec(chain)["layers"] == [{"type": "acme.scale", "factor": 3.0}]
    assert registry.bijections.fields(scale).fields["factor"].description == "what to multiply by."
    nested = {"type": "inverse", "layer": {"type": "sequential", "layers": [{"type": "acme.scale"}]}}
    assert invflow.build(spec_of(nested))(torch.ones(1, 2)).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("factor", [-1, 0, "3", True, float("nan"), None])
def test_python_and_json_refuse_the_same(factor):
    scale = invflow.register("acme.scale")(make_scale())
    with pytest.raises(ValueError, match=r"Scale: factor: input should be"):
        scale(factor)
    with pytest.raises(invflow.SpecError):
        invflow.build(spec_of({"type": "acme.scale", "factor": factor}))


def test_the_same_class_again_replaces_and_another_is_an_error():
    invflow.register("acme.scale")(make_scale())
    again = invflow.register("acme.scale")(make_scale())
    assert invflow.registered()["acme.scale"] is again
    with pytest.raises(ValueError, match=r"'psi' is held by invflow.bijections.psi.Psi"):
        invflow.register("psi")(make_scale())


@pytest.mark.parametrize("tag", ["", "Scale", "a b", "repeat", "1x", "acme."])
def test_malformed_tags_are_refused(tag):
    with pytest.raises(ValueError, match="cannot be a layer's tag"):
        invflow.register(tag)


def test_what_cannot_be_registered():
    with pytest.raises(TypeError, match="it is not a Bijection"):
        invflow.register("acme.linear")(nn.Linear)

    class Bare(make_scale()):
        def __init__(self, factor=1.0):
            super().__init__(factor)

    with pytest.raises(TypeError, match="parameter 'factor' needs a type annotation"):
        invflow.register("acme.bare")(Bare)

    class Typed(make_scale()):
        def __init__(self, type: str) -> None:
            super().__init__()

    with pytest.raises(TypeError, match="'type' has another meaning in a document"):
        invflow.register("acme.typed")(Typed)


def test_a_subclass_is_not_its_registered_parent():
    class Child(make_scale()):
        pass

    invflow.register("acme.scale")(Child.__mro__[1])
    with pytest.raises(invflow.SpecError, match="Child is not a registered layer"):
        invflow.to_spec(invflow.Sequential(Child()), input_shape=(2,))


def test_any_module_is_a_net_but_only_a_registered_one_goes_into_a_spec():
    chain = invflow.Sequential(invflow.bijections.AdditiveCoupling(nn.Linear(2, 2)))
    with pytest.raises(invflow.SpecError, match=r"Linear is not a registered net.*invflow.register_net\('acme.name'\)"):
        invflow.to_spec(chain, input_shape=((2,), (2,)))


def test_registered_nets_and_heads_build():
    @invflow.register_net("acme.times")
    class Times(nn.Module):
        def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...], factor: float = 1.0) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * x

    @invflow.register_head("acme.sum")
    class Sum(nn.Module):
        def __init__(self, classes: int, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.classes = classes

        def forward(self, state: Tensor) -> Tensor:
            return state[0].sum(1, keepdim=True).expand(-1, self.classes)

    coupling = {"type": "additive_coupling", "net": {"type": "acme.times", "factor": 2.0}}
    model = invflow.build_model(
        {**spec_of({"type": "split"}, coupling, shape=(4,)), "head": {"type": "acme.sum", "classes": 3}}
    )
    assert model(torch.ones(1, 4)).tolist() == [[6.0, 6.0, 6.0]]
    assert invflow.load_spec(invflow.to_spec(model)).hash


def test_registered_is_read_only():
    with pytest.raises(TypeError):
        invflow.registered()["x"] = make_scale()


def test_a_class_without_a_constructor_registers():
    @invflow.register("acme.negate")
    class Negate(invflow.Bijection):
        """y = -x."""

        volume_preserving = True
        examples = [({}, (2,))]

        def forward(self, x, context=None):
            return -x

        def inverse(self, y, context=None):
            return -y

    chain = invflow.build(spec_of({"type": "acme.negate"}))
    assert chain(torch.ones(1, 2)).tolist() == [[-1.0, -1.0]]
    assert invflow.to_spec(chain)["layers"] == [{"type": "acme.negate"}]
    with pytest.raises(TypeError, match=r"Negate\(\) got an unexpected keyword argument"):
        Negate(factor=2)


def test_a_wrapped_part_is_written_as_it_was_given():
    @invflow.register("acme.backwards")
    class Backwards(invflow.Bijection):
        """The layer, run backwards."""

        volume_preserving = True
        examples = [({"layer": {"type": "permute", "order": [1, 2, 0]}}, (3,))]

        def __init__(self, layer: invflow.Bijection) -> None:
            super().__init__()
            self.layer = invflow.Inverse(layer)

        def forward(self, x, context=None):
            return self.layer(x, context)

        def inverse(self, y, context=None):
            return self.layer.inverse(y, context)

    inner = {"type": "permute", "order": [1, 2, 0]}
    chain = invflow.build(spec_of({"type": "acme.backwards", "layer": inner}, shape=(3,)))
    x = torch.tensor([[0.0, 1.0, 2.0]])
    assert torch.equal(invflow.build(invflow.to_spec(chain))(x), chain(x))


def test_repr_and_spec_show_what_a_coupling_holds_now():
    coupling = invflow.bijections.AdditiveCoupling(invflow.nets.MLP((2,), (2,), hidden=[5]))
    coupling.net = invflow.nets.MLP((2,), (2,), hidden=[7])
    assert "hidden=[7]" in repr(coupling)
    document = invflow.to_spec(invflow.Sequential(coupling), input_shape=((2,), (2,)))
    assert document["layers"][0]["net"]["hidden"] == [7]


def test_a_constructor_that_changes_its_argument_changes_nothing_else():
    @invflow.register("acme.greedy")
    class Greedy(make_scale()):
        def __init__(self, values: list[int] = [1]) -> None:  # noqa: B006
            super().__init__(2.0)
            values.append(9)

    for _ in range(2):
        chain = invflow.build(spec_of({"type": "acme.greedy", "values": [3]}))
        assert invflow.to_spec(chain)["layers"] == [{"type": "acme.greedy", "values": [3]}]


@pytest.mark.parametrize("part", [None, "x", nn.Linear])
def test_a_part_that_is_none(part):
    with pytest.raises(ValueError, match="AdditiveCoupling: net: expected a Module"):
        invflow.bijections.AdditiveCoupling(part)
    with pytest.raises(ValueError, match="Inverse: layer: expected a Bijection"):
        invflow.Inverse(nn.Linear(2, 2) if part is nn.Linear else part)


def test_a_type_without_a_json_form_is_named():
    class Holder(make_scale()):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__(2.0)

    with pytest.raises(TypeError, match="Holder: a parameter's type has no JSON form"):
        invflow.register("acme.tensor")(Holder)
    assert "acme.tensor" not in invflow.registered()
