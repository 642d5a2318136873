"""What each layer sees of a context with names, and what models of one do."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import invflow
from invflow.cli import main
from invflow.context import each_entry
from invflow.errors import ShapeError, SpecError
from invflow.models import ContextNet
from invflow.nets import MLP, Conv, Embedding
from invflow.spec.diff import diff_specs

from .documents import BATCH, CLASSES, CONV, EVERYTHING, SHAPES, a_context, an_x, coupling, document, model_of


class TestWhatIsSeen:
    @pytest.mark.parametrize(
        ("fields", "seen"),
        [
            ({}, {"class", "image", "size"}),
            ({"context": "class"}, {"class"}),
            ({"context": ["size", "image"]}, {"size", "image"}),
            ({"context": None}, set()),
            ({"net": {**CONV, "context": "size"}}, {"size"}),
            ({"context": ["size", "image"], "net": {**CONV, "context": ["image"]}}, {"image"}),
            ({"net": {**CONV, "context": None}}, set()),
        ],
    )
    @pytest.mark.parametrize("backprop", ["stored", "reversible"])
    def test_by_a_layer(self, fields, seen, backprop):
        model = model_of(document([coupling(**fields)], backprop=backprop))
        context = a_context()
        given = each_entry(lambda entry: entry.clone().requires_grad_(), context)
        model(an_x(), given).sum().backward()
        assert {name for name, entry in given.items() if entry.grad is not None and entry.grad.any()} == seen

    def test_the_order_of_the_names_makes_no_difference(self):
        model, context = model_of(EVERYTHING), a_context()
        shapes = dict(reversed(SHAPES.items()))
        other = model_of({**EVERYTHING, "input": {"shape": [4, 4, 4], "context_shape": shapes}}, seed=1)
        assert invflow.load_spec(EVERYTHING).hash == invflow.load_spec(invflow.to_spec(other)).hash
        other.load_state_dict(model.state_dict())
        turned = dict(reversed(context.items()))
        assert torch.equal(other(an_x(), turned), model(an_x(), context))

    @pytest.mark.parametrize("size", [2, 8, 16])
    def test_at_another_resolution(self, size):
        """A context of more positions is averaged, one of fewer is repeated: as if it had been given so."""
        spec = document()
        fine = model_of({**spec, "input": {"shape": [4, 4, 4], "context_shape": [2, size, size]}})
        same = model_of({**spec, "input": {"shape": [4, 4, 4], "context_shape": [2, 4, 4]}}, seed=1)
        same.load_state_dict(fine.state_dict())
        context = torch.randn(BATCH, 2, size, size, dtype=torch.float64)
        resized = nn.functional.adaptive_avg_pool2d(context, 4)
        torch.testing.assert_close(fine(an_x(), context), same(an_x(), resized), atol=1e-12, rtol=1e-12)

    def test_a_context_that_is_averaged_is_no_exact_net(self):
        chain = {"input": {"shape": [4, 4, 4], "context_shape": [2, 8, 8]}, "numerics": {"mode": "exact"}}
        layers = [{"type": "split"}, {"type": "additive_coupling", "net": {"type": "conv", "hidden": [4]}}]
        with pytest.raises(SpecError, match="averaged"):
            invflow.build({**chain, "layers": [*layers, {"type": "merge"}]})

    def test_one_row_of_an_entry_stands_for_all(self):
        model, context = model_of(EVERYTHING), a_context()
        one = {**context, "size": context["size"][:1]}
        all_rows = {**context, "size": context["size"][:1].expand(BATCH, -1)}
        assert torch.equal(model(an_x(), one), model(an_x(), all_rows))
        assert model.sample(2, one).shape == (2, BATCH, 4, 4, 4)
        assert model.sample(2, each_entry(lambda entry: entry[:1], context)).shape == (2, 1, 4, 4, 4)

    def test_by_the_inverse_of_an_inverse(self):
        """An inverse that sees a part does not vanish within another inverse."""
        spec = document([{"type": "inverse", "layer": coupling(), "context": "class"}])
        chain = invflow.build({key: value for key, value in spec.items() if key != "prior"}).double()
        y = chain(an_x(), a_context())
        assert (chain[::-1](y, a_context()) - an_x()).abs().max() < 1e-12
        nested = {"type": "inverse", "layer": {"type": "inverse", "context": "class", "layer": coupling()}}
        assert torch.isfinite(model_of(document([nested]))(an_x(), a_context())).all()

    def test_by_a_net_that_is_told_later(self):
        model, context = model_of(document([coupling()])), a_context()
        model.bijection[1].sees = "class"
        with pytest.raises(ShapeError, match="expects a context of shape"):  # it was built for all of it
            model(an_x(), context)


class TestModels:
    def test_round_trip(self):
        model, context = model_of(EVERYTHING), a_context()
        z = model.bijection(an_x(), model.for_layers(context))
        assert (model.inverse(z, context) - an_x()).abs().max() < 1e-12
        assert invflow.round_trip(model, an_x(), context).relative < 1e-12

    def test_a_classifier_takes_one_too(self):
        spec = {**EVERYTHING, "head": {"type": "linear", "classes": 2}}
        del spec["prior"]
        assert model_of(spec)(an_x(), a_context()).shape == (BATCH, 2)

    def test_samples_and_their_density(self):
        model, context = model_of(EVERYTHING), a_context()
        x, log_prob = model.sample_with_log_prob(3, context)
        assert x.shape == (3, BATCH, 4, 4, 4)
        again = torch.stack([model.log_prob(one, context) for one in x])
        assert (again - log_prob).abs().max() < 1e-10

    def test_a_distribution(self):
        model, context = model_of(EVERYTHING), a_context()
        given = model.distribution(context)
        assert given.batch_shape == (BATCH,)
        assert given.rsample((2, 3)).shape == (2, 3, BATCH, 4, 4, 4)
        wider = given.expand((7, BATCH))
        assert wider.sample().shape == (7, BATCH, 4, 4, 4)
        x = torch.stack([an_x()] * 7)
        assert (wider.log_prob(x) - model.log_prob(an_x(), context)).abs().max() < 1e-10

    def test_a_document_and_a_checkpoint_hold_it(self, tmp_path):
        model, context = model_of(EVERYTHING), a_context()
        assert invflow.load_spec(invflow.to_spec(model)).hash == invflow.load_spec(EVERYTHING).hash
        invflow.save(model, tmp_path / "saved")
        assert torch.equal(invflow.load(tmp_path / "saved")(an_x(), context), model(an_x(), context))

    def test_what_decides_the_function_is_in_the_hash(self):
        changed = copy.deepcopy(EVERYTHING)
        changed["layers"][2]["context"] = "size"
        bare = {key: value for key, value in EVERYTHING.items() if key != "context_net"}
        hashes = {invflow.load_spec(one).hash for one in (EVERYTHING, changed, bare)}
        assert len(hashes) == 3

    def test_a_net_for_a_context_without_names(self):
        spec = document(
            input={"shape": [4, 4, 4], "context_shape": [7]},
            context_net={"type": "mlp", "hidden": [8], "out_shape": [2, 4, 4]},
        )
        model = model_of(spec)
        assert model.bijection.declared_context_shape == (2, 4, 4)
        assert model.context_shape == (7,)
        assert model(an_x(), torch.zeros(1, 7, dtype=torch.float64)).shape == (BATCH,)

    def test_nets_in_python(self):
        chain = invflow.build({**document(), "prior": None})
        net = ContextNet(
            {"class": Embedding((9,), (CLASSES,)), "image": Conv((1, 4, 4), (2, 4, 4)), "size": MLP((4,), (1,))},
            {"class": (CLASSES,), "image": (2, 4, 4), "size": (1,)},
            {"class": (9,), "image": (1, 4, 4), "size": (4,)},
        )
        for name, one in zip(("class", "image", "size"), net.nets.values(), strict=True):
            one.sees = name
        flow = invflow.models.Flow(chain, invflow.models.StandardNormal(shape=(4, 4, 4)), net)
        context = {"class": torch.eye(9), "image": torch.zeros(9, 1, 4, 4), "size": torch.zeros(1, 4)}
        assert flow.log_prob(torch.zeros(9, 4, 4, 4), context).shape == (9,)


def test_the_verbs_that_look_into_a_chain(tmp_path, capsys):
    layers = [coupling(context="class"), {"type": "inverse", "layer": coupling(context="size")}]
    (tmp_path / "spec.json").write_text(json.dumps(document([*layers, {"type": "exchange", "order": [1, 0]}])))
    for verb in (["check", "--conditioning"], ["check", "--thorough"], ["show", "--memory"], ["show"]):
        with pytest.raises(SystemExit) as ended:
            main([verb[0], str(tmp_path / "spec.json"), *verb[1:]])
        assert ended.value.code == 0, capsys.readouterr().err


def test_a_difference_in_what_is_seen_or_in_the_numerics_is_one(tmp_path):
    plain = document([coupling()])
    shapes = {**SHAPES, "all": [1]}
    named = {**plain, "input": {"shape": [4, 4, 4], "context_shape": shapes}}
    narrowed = copy.deepcopy(named)
    narrowed["layers"][1]["context"] = "all"
    assert diff_specs(named, narrowed) == ['layers.1.context: all -> "all"']
    assert diff_specs(plain, {**plain, "numerics": {"mode": "snap"}})[0].startswith("numerics")
