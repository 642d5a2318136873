"""Contexts with names: what each layer sees of them, and the nets that make them."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import invflow
from invflow.cli import main
from invflow.context import each_entry
from invflow.errors import InvflowError, ShapeError, SpecError
from invflow.models import ContextNet
from invflow.nets import MLP, Conv, Embedding
from invflow.spec.diff import diff_specs

CLASSES, BATCH = 3, 5
SHAPES = {"class": [CLASSES], "image": [2, 4, 4], "size": [1]}
CONV = {"type": "conv", "hidden": [4], "activation": "tanh"}
GRADIENTS = 1e-10
"""Of the largest gradient: the promise for float64."""


def coupling(**fields):
    return {"type": "affine_coupling", "net": CONV, **fields}


def document(layers=None, **top_level):
    chain = [{"type": "split"}, *(layers or [coupling(), coupling()]), {"type": "merge"}]
    return {
        "input": {"shape": [4, 4, 4], "context_shape": SHAPES},
        "layers": chain,
        "prior": {"type": "standard_normal"},
        **top_level,
    }


EVERYTHING = document(
    [
        coupling(),
        coupling(context="class"),
        coupling(context=["image", "size"], net={**CONV, "context": "image"}),
        coupling(context=None),
        {"type": "sequential", "context": ["class", "image"], "layers": [coupling(), coupling(context="class")]},
        {"type": "inverse", "layer": coupling(context="size")},
        {"type": "exchange", "order": [1, 0]},
    ],
    context_net={
        "class": {"type": "embedding", "context": "class", "out_shape": [2]},
        "image": {"type": "conv", "context": "image", "out_shape": [3, 4, 4], "hidden": [4], "activation": "tanh"},
    },
    prior={"type": "gaussian_mixture", "by": "context", "context": "class"},
)
"""Each way to say what is seen, with a net for two entries."""


def model_of(spec, seed=0):
    torch.manual_seed(seed)
    return invflow.build_model(spec).double()


def a_context(batch=BATCH):
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()
    }
    return {**drawn, "class": torch.eye(CLASSES, dtype=torch.float64)[torch.arange(batch) % CLASSES]}


def an_x(batch=BATCH):
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def gradients(model, context, run=None):
    """Those of every weight and of every entry of the context, by name."""
    model.zero_grad()
    given = each_entry(lambda entry: entry.clone().requires_grad_(), context)
    (model if run is None else run)(an_x(len(context["class"])), given).sum().backward()
    of_weights = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return of_weights | {f"context {name}": entry.grad for name, entry in given.items()}


def assert_alike(found, right):
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        scale = gradient.abs().max().clamp(min=1)
        assert (found[name] - gradient).abs().max() <= GRADIENTS * scale, name
        assert gradient.abs().max() > 0, name  # each matters


class TestGradients:
    @pytest.mark.parametrize("policy", ["reversible", "checkpoint"])
    def test_are_those_of_plain_training(self, policy):
        model = model_of(EVERYTHING)
        right = gradients(model, a_context())
        assert sum(name.startswith("context_net") for name in right) == 5
        model.bijection.backprop = policy
        assert_alike(gradients(model, a_context()), right)

    @pytest.mark.parametrize("policy", ["reversible", "checkpoint"])
    def test_are_right_backwards_too(self, policy):
        model, context = model_of(EVERYTHING), a_context()

        def inverted():
            given = each_entry(lambda entry: entry.clone().requires_grad_(), context)
            model.zero_grad()
            model.inverse(an_x(), given).square().sum().backward()
            return {name: entry.grad for name, entry in given.items()}

        right = inverted()
        model.bijection.backprop = policy
        assert_alike(inverted(), right)

    def test_of_an_entry_under_two_names_are_those_of_both(self):
        shapes = {"a": [2], "b": [2]}
        spec = {**document(), "input": {"shape": [4, 4, 4], "context_shape": shapes}}
        model, row = model_of(spec), torch.randn(BATCH, 2, dtype=torch.float64)

        def gradient(policy, differentiable):
            model.bijection.backprop = policy
            one = row.clone().requires_grad_()
            total = model(an_x(), {"a": one, "b": one}).sum()
            (found,) = torch.autograd.grad(total, one, create_graph=differentiable)
            return found.detach()

        for differentiable in (False, True):
            found, right = (gradient(policy, differentiable) for policy in ("reversible", "stored"))
            assert (found - right).abs().max() < GRADIENTS

    def test_of_second_order(self):
        model, context = model_of(EVERYTHING), a_context(2)

        def second(policy):
            model.bijection.backprop = policy
            given = each_entry(lambda entry: entry.clone().requires_grad_(), context)
            total = model(an_x(2), given).sum()
            first = torch.autograd.grad(total, list(given.values()), create_graph=True)
            norm = sum(gradient.square().sum() for gradient in first)
            return dict(zip(given, torch.autograd.grad(norm, list(given.values())), strict=True))

        assert_alike(second("reversible"), second("stored"))

    @pytest.mark.parametrize("policy", ["stored", "reversible", "checkpoint"])
    def test_compiled(self, policy):
        linear = {"type": "mlp", "context": "image", "out_shape": [2]}
        layers = [coupling(context="class"), coupling(context=["image", "size"], net={**CONV, "context": "image"})]
        model = model_of(document([*layers, coupling(context="size")], context_net={"image": linear}))
        right = gradients(model, a_context())
        model.bijection.backprop = policy
        assert_alike(
            gradients(model, a_context(), torch.compile(model, fullgraph=policy != "checkpoint", backend="aot_eager")),
            right,
        )


def train_in_a_process(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/group", rank=rank, world_size=2)
    for policy in ("stored", "reversible", "checkpoint"):
        model = model_of(EVERYTHING)
        model.bijection.backprop = policy
        parallel = nn.parallel.DistributedDataParallel(model)
        half = each_entry(lambda entry: entry[3 * rank : 3 * rank + 3], a_context(6))
        given = each_entry(lambda entry: entry.clone().requires_grad_(), half)
        parallel(an_x(6)[3 * rank : 3 * rank + 3], given).sum().backward()
        if rank == 0:
            torch.save({name: weight.grad for name, weight in model.named_parameters()}, f"{path}/{policy}.pt")
    del parallel  # it holds the group, whose threads would end with the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_gradients_in_two_processes_are_the_mean(tmp_path):
    torch.multiprocessing.spawn(train_in_a_process, (str(tmp_path),), nprocs=2)
    both = gradients(model_of(EVERYTHING), a_context(6))
    right = {name: gradient / 2 for name, gradient in both.items() if not name.startswith("context ")}
    for policy in ("stored", "reversible", "checkpoint"):
        assert_alike(torch.load(tmp_path / f"{policy}.pt"), right)


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


def test_a_difference_in_what_is_seen_or_in_the_numerics_is_one(tmp_path):
    plain = document([coupling()])
    shapes = {**SHAPES, "all": [1]}
    named = {**plain, "input": {"shape": [4, 4, 4], "context_shape": shapes}}
    narrowed = copy.deepcopy(named)
    narrowed["layers"][1]["context"] = "all"
    assert diff_specs(named, narrowed) == ['layers.1.context: all -> "all"']
    assert diff_specs(plain, {**plain, "numerics": {"mode": "snap"}})[0].startswith("numerics")


class TestData:
    TRAINING = {"epochs": 2, "batch_size": 16, "optimizer": {"type": "adam", "lr": 0.01}}
    SPEC = {
        "input": {"shape": [2], "context_shape": {"class": [2], "more": [3]}},
        "context_net": {"class": {"type": "embedding", "context": "class", "out_shape": [4]}},
        "layers": [
            {"type": "split"},
            {"type": "affine_coupling", "net": {"type": "mlp", "hidden": [8]}},
            {"type": "affine_coupling", "context": "class", "net": {"type": "mlp", "hidden": [8]}},
            {"type": "merge"},
        ],
        "prior": {"type": "standard_normal"},
    }

    @staticmethod
    def arrays(count=64):
        generator = torch.Generator().manual_seed(0)
        x, more = (torch.randn(count, size, generator=generator) for size in (2, 3))
        return x, torch.arange(count) % 2, more

    def test_from_arrays_in_python(self, tmp_path):
        x, y, more = self.arrays()
        both = {"more": more, "class": torch.eye(2)[y]}
        first = invflow.fit(self.SPEC, (x, y, both), tmp_path / "a", progress=False, **self.TRAINING)
        given = (x, y, {"more": more})
        other = invflow.fit(
            self.SPEC, given, tmp_path / "b", context={"class": "labels"}, progress=False, **self.TRAINING
        )
        for name, weight in first.model.state_dict().items():
            assert torch.equal(weight, other.model.state_dict()[name])
        start = model_of(self.SPEC).float().context_net.of("class").weight
        assert not torch.equal(first.model.context_net.of("class").weight, start)  # it was trained along

    @pytest.mark.parametrize("kind", ["arrays", "table"])
    def test_from_a_file(self, tmp_path, capsys, kind):
        x, y, more = self.arrays()
        if kind == "arrays":
            np.savez(tmp_path / "data.npz", x=x.numpy(), y=y.numpy(), more=more.numpy())
            source = {"name": "arrays", "path": "data.npz", "context": {"class": "labels", "more": "more"}}
        else:
            rows = [
                f"{a},{b},{'uv'[c]},{','.join(map(str, d))}"
                for (a, b), c, d in zip(x.tolist(), y.tolist(), more.tolist(), strict=True)
            ]
            (tmp_path / "data.csv").write_text("\n".join(["a,b,kind,p,q,r", *rows]) + "\n")
            source = {"name": "table", "path": "data.csv", "features": ["a", "b"]}
            source["context"] = {"class": "kind", "more": ["p", "q", "r"]}
        spec = {**self.SPEC, "training": {**self.TRAINING, "data": source}}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        run = invflow.train(tmp_path / "spec.json", tmp_path / "run", progress=False)
        assert run.model.context_shape == {"class": (2,), "more": (3,)}
        for words, code in (("class=0,1;more=0,1,2", 0), ("class=1", 2)):
            with pytest.raises(SystemExit) as ended:
                main(["sample", str(run.folder), "--context", words, "--count", "4", "--json"])
            assert ended.value.code == code
            printed = capsys.readouterr()
            if code:
                assert printed.err == "invflow: --context expects 'class=...; more=...', got 'class=1'\n"
            else:
                assert json.loads(printed.out)["context"] == {"class": [[0.0, 1.0]] * 4, "more": [[0.0, 1.0, 2.0]] * 4}
        with pytest.raises(SystemExit):
            main(["sample", str(run.folder), "--context", "class=0,1;more=0,1,2", "--out", str(tmp_path / "drawn.png")])
        assert (tmp_path / "drawn.png").exists()

    def test_other_names_are_refused(self, tmp_path):
        x, y, more = self.arrays()
        with pytest.raises(SpecError, match=r'gives a context of shape \{"class": \[2\], "other": \[3\]\}'):
            invflow.fit(self.SPEC, (x, y, {"class": torch.eye(2)[y], "other": more}), tmp_path / "run", progress=False)
