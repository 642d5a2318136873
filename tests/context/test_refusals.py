"""Contexts, and documents of them, that are refused."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow.errors import InvflowError, ShapeError, SpecError
from invflow.models import ContextNet
from invflow.nets import Embedding

from .documents import BATCH, CONV, EVERYTHING, a_context, an_x, coupling, document, model_of


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"class": None}, "expected a dict with 'class', 'image', 'size', got one with 'image', 'size'"),
            ({"more": torch.zeros(5, 1)}, "got one with 'class', 'image', 'size', 'more'"),
            (
                {"size": torch.zeros(3, 1, dtype=torch.float64)},
                r"entries of as many rows, or of one, got \[3, 5\] rows",
            ),
            ({"size": torch.zeros(5, 2, dtype=torch.float64)}, r"'size' expects a batch of states of shape \(1,\)"),
            ({"size": torch.zeros(5, 1)}, "'size' expects torch.float64, which its weights have, got torch.float32"),
            ({"size": [1.0]}, "'size' .* got list; pass a tensor"),
        ],
    )
    @pytest.mark.parametrize("spec", [document(), EVERYTHING], ids=["plain", "with nets"])
    def test_another_context(self, spec, change, message):
        context = {name: entry for name, entry in {**a_context(), **change}.items() if entry is not None}
        with pytest.raises(ShapeError, match=message):
            model_of(spec)(an_x(), context)

    @pytest.mark.parametrize("given", [None, torch.zeros(BATCH, 3, dtype=torch.float64)])
    @pytest.mark.parametrize("spec", [document(), EVERYTHING], ids=["plain", "with nets"])
    def test_none_or_a_tensor(self, spec, given):
        with pytest.raises(ShapeError, match="expect"):
            model_of(spec)(an_x(), given)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (document([coupling(context="klass")]), r"layers.1.context: expected a context with 'klass', got one with"),
            (document([coupling(net={**CONV, "context": "klass"})]), r"layers.1.net.context: expected a context with"),
            (document([coupling(context=[])]), "layers.1.context: context: expected the name of an entry"),
            (document([coupling(context=["size", "size"])]), "a list of different ones"),
            (document([coupling(context=3)]), "got 3"),
            (
                document([{"type": "sequential", "context": "size", "layers": [coupling(context="class")]}]),
                "expected a context with 'class', got one without names",
            ),
            (document(prior={"type": "gaussian_mixture", "by": "context"}), "expects one"),
            (document(context_net={"type": "mlp", "out_shape": [3]}), 'takes one entry .* name it, as "context"'),
            (document(context_net={"size": {"type": "mlp", "context": "size"}}), "context_net.size: .* its out_shape"),
            (document(context_net={"size": {"type": "mlp", "context": "size", "out_shape": [0]}}), "out_shape, a list"),
            (document(context_net={"a b": {"type": "mlp", "context": "size", "out_shape": [1]}}), "letters, digits"),
            (document(context_net={"type": "mpl", "out_shape": [1]}), "did you mean 'mlp'"),
            (document(context_net=[]), "expected a net"),
            (
                document(context_net={"size": {"type": "mlp", "context": "size", "out_shape": []}}),
                "needs its out_shape",
            ),
            (
                document([{"type": "inverse", "context": "size", "layer": {"type": "inverse", "layer": coupling()}}]),
                "the inverse of an inverse is the layer inside",
            ),
            (document(prior=None, context_net={"type": "mlp", "out_shape": [1]}), "belongs to a model"),
            (
                document(input={"shape": [4, 4, 4]}, context_net={"type": "mlp", "out_shape": [1]}),
                "expects a context: give the input a context_shape",
            ),
            (document(input={"shape": [4, 4, 4], "context_shape": {}}), "has 1 to 100"),
            (document(input={"shape": [4, 4, 4], "context_shape": {"a": [2**40]}}), "the limit is"),
            (
                document(input={"shape": [4, 4, 4], "context_shape": {f"c{i}": [2**22] for i in range(99)}}),
                "a context of 415236096 numbers, the limit is",
            ),
            (document(input={"shape": [4, 4, 4], "context_shape": {"a-b": [2]}}), "letters, digits"),
            (document(input={"shape": [4, 4, 4], "context_shape": {"a": [0]}}), "positive whole numbers"),
            (document(input={"shape": [4, 4, 4], "context_shape": [[2]]}), "positive whole numbers"),
            (document(input={"shape": [4, 4, 4], "context_shape": {"a": [2, 3, 3]}}), "a multiple or a divisor"),
        ],
    )
    def test_a_document(self, spec, message):
        with pytest.raises(SpecError, match=message) as raised:
            invflow.build_model({key: value for key, value in spec.items() if value is not None})
        assert len(raised.value.errors) == 1

    def test_a_context_net_in_exact_numerics(self):
        spec = document(
            [{"type": "additive_coupling", "net": {"type": "conv", "hidden": [4]}}],
            input={"shape": [4, 4, 4], "context_shape": [2]},
            context_net={"type": "mlp", "out_shape": [2]},
            numerics={"mode": "exact"},
        )
        with pytest.raises(SpecError, match="exact numerics cannot have a context_net"):
            invflow.build_model(spec)


class TestNetsOfAContext:
    @pytest.mark.parametrize(
        ("nets", "out_shapes"),
        [({"a": 1}, {"b": (2,)}), ({"a.b": 1}, {"a.b": (2,)}), ({"": 1, "a": 1}, {"": (2,), "a": (2,)}), ({}, {})],
    )
    def test_names_that_do_not_fit(self, nets, out_shapes):
        with pytest.raises(InvflowError, match="a context_net expects"):
            ContextNet({name: Embedding((3,), (2,)) for name in nets}, out_shapes, (3,))
