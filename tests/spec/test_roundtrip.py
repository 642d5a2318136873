"""Round trips between documents and chains, and the hash that identifies their function."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter
from torch import nn

import invflow
from invflow.bijections import AdditiveCoupling, Merge, Permute, Psi, Split
from invflow.context import make_context
from invflow.fields import REQUIRED
from invflow.log_det import Estimator
from invflow.nets import MLP
from invflow.numerics import Numerics
from invflow.registry import REGISTRIES, bijections, nets, parts
from invflow.spec.nodes import _UNDECISIVE
from invflow.spec.training import Training
from invflow.state import leaves, make_state
from invflow.testing.strategies import chain_cases

GOLDEN = Path(__file__).parent / "golden"
HASHES = json.loads((GOLDEN / "hashes_v1.json").read_text())
DEFAULTS = json.loads((GOLDEN / "defaults_v2.json").read_text())


def hash_of(document):
    return invflow.load_spec(document).hash


def bits(function, shape, context_shape):
    """The exact bits that a module returns for a fixed input."""
    generator = torch.Generator().manual_seed(7)
    x = make_state(lambda leaf: torch.randn((3, *leaf), generator=generator), shape)
    context = make_context(lambda one: torch.randn((3, *one), generator=generator), context_shape)
    with torch.no_grad():
        return [leaf.tolist() for leaf in leaves(function(x, context))]


def same_function(first, second, shape, context_shape=None):
    """Whether the second module computes the same as the first, given the first one's weights."""
    second.load_state_dict(first.state_dict())
    first.eval()
    second.eval()
    return bits(first, shape, context_shape) == bits(second, shape, context_shape)


@given(chain_cases())
def test_to_spec_builds_the_same_names_shapes_and_function(case):
    chain = case.chain()
    again = invflow.build(invflow.to_spec(chain))
    assert {n: t.shape for n, t in chain.state_dict().items()} == {n: t.shape for n, t in again.state_dict().items()}
    assert again.shapes(case.shape) == chain.shapes(case.shape)
    assert same_function(chain, again, case.shape, case.context_shape)


@given(
    chain_cases(),
    st.sampled_from([{}, {"head": {"type": "linear", "classes": 3}}, {"prior": {"type": "standard_normal"}}]),
)
def test_load_dump_load_is_load(case, above):
    spec = invflow.load_spec({**case.spec, **above})
    assume("prior" not in above or case.chain().surjective)
    built = (invflow.build_model if above else invflow.build)(spec)
    dumped = invflow.to_spec(built)
    again = invflow.load_spec(json.loads(json.dumps(dumped)))
    assert again.hash == spec.hash
    assert invflow.to_spec(invflow.build(again)) == {key: value for key, value in dumped.items() if key not in above}


@given(chain_cases(max_depth=4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_the_hash_ignores_how_the_document_is_written(case, times, rng):
    assume(case.layers)
    spec = case.spec
    expected = hash_of({**spec, "layers": spec["layers"] * times})
    repeated = {**spec, "layers": [{"type": "repeat", "times": times, "layers": spec["layers"]}]}
    rewritten = dict(remarked(with_defaults(repeated), rng))
    rewritten |= {"$schema": "x", "name": "y", "spec_version": 2, "training": {"epochs": 3}, "prior": None}
    text = json.dumps(shuffled(rewritten, rng), indent=rng.choice([None, 0, 3]))
    assert hash_of(json.loads(text)) == expected


def with_defaults(value, registries=(bijections, nets)):
    """The document with every default of a plain field written out."""
    if isinstance(value, list):
        return [with_defaults(item, registries) for item in value]
    if not isinstance(value, dict):
        return value
    # A part may have the name of a net: what a tag stands for depends on where it is.
    written = {key: with_defaults(item, (parts,) if key == "parts" else registries) for key, item in value.items()}
    for registry in registries:
        if written.get("type") in registry.registered():
            fields = registry.fields(registry.find(written["type"])).fields
            defaults = {n: f.default for n, f in fields.items() if f.kind == "value" and not f.required}
            plain = {n: d.model_dump() if isinstance(d, BaseModel) else d for n, d in defaults.items()}
            written = plain | written
    return written


def remarked(value, rng):
    """The document with notes in some places."""
    if isinstance(value, list):
        return [remarked(item, rng) for item in value]
    if not isinstance(value, dict):
        return value
    # Options of a document have no notes.
    noted = {key: item if key == "log_det" else remarked(item, rng) for key, item in value.items()}
    return {**noted, "note": "n"} if "type" in noted and rng.random() < 0.5 else noted


def shuffled(value, rng):
    """The document with the keys of every object in another order."""
    if isinstance(value, list):
        return [shuffled(item, rng) for item in value]
    if not isinstance(value, dict):
        return value
    keys = list(value)
    rng.shuffle(keys)
    return {key: shuffled(value[key], rng) for key in keys}


SPEC = {
    "input": {"shape": [4, 4, 4], "context_shape": [2]},
    "vars": {"width": 6},
    "layers": [
        {"type": "permute", "seed": 3},
        {"type": "split"},
        {"type": "repeat", "times": 2, "with": {"hidden": [[5], []]}, "layers": [
            {"type": "additive_coupling", "net": {"type": "conv", "hidden": {"$item": "hidden"}}},
            {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [{"$var": "width"}], "norm": "batch"}},
        ]},
        {"type": "merge"},
        {"type": "inverse", "layer": {"type": "psi", "block_size": 2}},
    ],
    "head": {"type": "linear", "classes": 3},
}  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("input", "shape"), [4, 4, 8]),
        (("input", "context_shape"), [3]),
        (("input", "context_shape"), None),
        (("vars", "width"), 7),
        (("layers", 0, "seed"), 4),
        (("layers", 1, "dim"), 2),
        (("layers", 2, "times"), 1),
        (("layers", 2, "with", "hidden"), [[5], [5]]),
        (("layers", 2, "with", "hidden"), [[], [5]]),
        (("layers", 2, "layers", 0, "net", "activation"), "tanh"),
        (("layers", 2, "layers", 0, "net", "final_activation"), True),
        (("layers", 2, "layers", 1, "net", "norm"), None),
        (("layers", 4, "layer", "layout"), "channel"),
        (("layers", 4), {"type": "permute", "seed": 3}),
        (("layers", 4), {"type": "psi", "block_size": 2}),
        (("head", "classes"), 4),
        (("head",), None),
        (("head",), {"type": "convnet", "classes": 3, "hidden": [2]}),
    ],
    ids=str,
)
def test_the_hash_tells_functions_apart(place, value):
    changed = copy.deepcopy(SPEC)
    inner = changed
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    if place == ("layers", 2, "times"):
        inner["with"] = {"hidden": [[5]]}
    assert hash_of(changed) != hash_of(SPEC)


def test_the_hash_tells_a_flow_from_its_chain():
    chain = {key: value for key, value in SPEC.items() if key != "head"}
    assert len({hash_of(chain), hash_of(SPEC), hash_of({**chain, "prior": {"type": "standard_normal"}})}) == 3


def test_the_hash_sees_order_and_nesting():
    layers = [{"type": "permute", "seed": 1}, {"type": "psi", "block_size": 2}]
    spec = {"input": {"shape": [4, 4, 4]}, "layers": layers}
    nested = {**spec, "layers": [{"type": "sequential", "layers": layers}]}
    # A nested chain computes the same, but its weights have other names: no checkpoint fits both.
    assert len({hash_of(spec), hash_of({**spec, "layers": layers[::-1]}), hash_of(nested)}) == 3


def test_numbers_that_are_equal_hash_alike():
    class Scale(Permute):
        def __init__(self, factor: float = 2.0) -> None:
            super().__init__(order=[0])

    spec = {"input": {"shape": [1]}, "layers": [{"type": "acme.hash_scale", "factor": 3}]}
    with registered_for_now("acme.hash_scale", Scale):
        assert hash_of(spec) == hash_of({**spec, "layers": [{"type": "acme.hash_scale", "factor": 3.0}]})
        plain = {**spec, "layers": [{"type": "acme.hash_scale"}]}
        assert hash_of(plain) == hash_of({**spec, "layers": [{"type": "acme.hash_scale", "factor": 2}]})


class registered_for_now:  # noqa: N801 -- reads as a function
    """Registers a bijection within a with block."""

    def __init__(self, tag, cls):
        self.patch = pytest.MonkeyPatch()
        self.tag, self.cls = tag, cls

    def __enter__(self):
        self.patch.setattr(bijections, "_classes", dict(bijections._classes))
        self.patch.setattr(bijections, "_fields", dict(bijections._fields))
        invflow.register(self.tag)(self.cls)

    def __exit__(self, *_):
        self.patch.undo()


def test_a_new_field_with_a_default_changes_no_hash():
    class Before(Permute):
        def __init__(self, factor: float = 2.0) -> None:
            super().__init__(order=[0])

    class After(Permute):
        def __init__(self, offset: int = 0, factor: float = 2.0, names: list[str] | None = None) -> None:
            super().__init__(order=[0])

    spec = {"input": {"shape": [1]}, "layers": [{"type": "acme.grown", "factor": 3.0}]}
    hashes = set()
    for cls in (Before, After):
        with registered_for_now("acme.grown", cls):
            hashes.add(hash_of(spec))
    assert len(hashes) == 1


def test_composed_in_python():
    chain = invflow.Sequential(
        Split(), AdditiveCoupling(MLP((2,), (3,), hidden=[4])), Merge(sizes=(3, 2)), Permute(seed=0, shape=(5,)),
        invflow.Inverse(invflow.Sequential(Permute(order=[4, 3, 2, 1, 0]))),
    )  # fmt: skip
    document = invflow.to_spec(chain, input_shape=(5,))
    assert document["layers"][1] == {"type": "additive_coupling", "net": {"type": "mlp", "hidden": [4]}}
    assert same_function(chain, invflow.build(document), (5,))


def test_a_net_that_was_replaced_is_dumped_as_it_is_now():
    coupling = AdditiveCoupling(MLP((2,), (3,)))
    coupling.net = MLP((2,), (3,), hidden=[4])
    document = invflow.to_spec(invflow.Sequential(coupling), input_shape=((2,), (3,)))
    assert document["layers"] == [{"type": "additive_coupling", "net": {"type": "mlp", "hidden": [4]}}]


def test_a_chain_of_its_own_names_no_input_shape():
    with pytest.raises(invflow.SpecError, match=r"name its input, to_spec\(chain, input_shape=\(1, 28, 28\)\)"):
        invflow.to_spec(invflow.Sequential(Psi(2)))


@pytest.mark.parametrize("model", [Psi(2), nn.Linear(2, 2), None])
def test_what_is_no_chain_has_no_spec(model):
    with pytest.raises(invflow.SpecError, match="to_spec expects a Sequential or a model with one"):
        invflow.to_spec(model, input_shape=(4,))


def test_a_head_of_somebody_s_own_is_refused_with_the_way_to_register_it():
    model = invflow.Classifier(invflow.Sequential(), nn.Linear(4, 2))
    with pytest.raises(invflow.SpecError, match=r"decorate it with @invflow.register_head\('acme.name'\)"):
        invflow.to_spec(model, input_shape=(4,))


def test_a_spec_keeps_what_its_user_wrote():
    spec = invflow.load_spec(SPEC)
    assert spec.document == SPEC
    assert len(spec.expanded["layers"]) == 8
    assert spec.expanded["layers"][4]["net"]["hidden"] == []
    assert "vars" not in spec.expanded
    assert invflow.load_spec(spec) is spec
    named = spec.replace(name="other", head=None)
    assert (named.name, named.head, named.document["layers"]) == ("other", None, SPEC["layers"])


def test_references_to_items_of_an_outer_repeat():
    inner = {"type": "repeat", "times": 2, "with": {"a": [{"$item": "a"}, {"$var": "one"}]}, "layers": [
        {"type": "psi", "block_size": {"$item": "a"}}
    ]}  # fmt: skip
    spec = {
        "input": {"shape": [1, 12, 12]},
        "vars": {"one": 1},
        "layers": [{"type": "repeat", "times": 2, "with": {"a": [2, 3]}, "layers": [inner]}],
    }
    sizes = [layer["block_size"] for layer in invflow.load_spec(spec).expanded["layers"]]
    assert sizes == [2, 1, 3, 1]


def current_defaults():
    """Every default that a document may leave out, by registry, tag and field."""
    found = {
        registry.noun: {
            tag: {
                name: json.loads(json.dumps(field.default, default=lambda value: value.model_dump()))
                for name, field in registry.fields(cls).fields.items()
                if field.default is not REQUIRED
            }
            for tag, cls in sorted(registry.registered().items())
        }
        for registry in REGISTRIES
    }
    schema = Training.model_json_schema()
    options = {"training": {"Training": schema, **schema["$defs"]}}
    options["numerics"] = TypeAdapter(Numerics).json_schema()["$defs"]
    options["log_det"] = TypeAdapter(Estimator).json_schema()["$defs"]
    for group, blocks in options.items():
        found[group] = {
            name: {
                field: json.loads(json.dumps(inner["default"]))
                for field, inner in one["properties"].items()
                if "default" in inner
            }
            for name, one in sorted(blocks.items())
        }
    return found


DEFAULT_ENTRIES = [
    (group, tag, field)
    for group, tags in DEFAULTS.items()
    for tag, fields in tags.items()
    for field in fields
    if field not in _UNDECISIVE  # fields that are no part of what a spec means
]


@pytest.mark.parametrize(("group", "tag", "field"), DEFAULT_ENTRIES)
def test_no_default_ever_changes_within_a_version(group, tag, field):
    """A default is part of every spec that leaves the field out: if it changes, old specs change their meaning."""
    now = current_defaults()[group]
    assert tag in now, f"{group} {tag!r} is gone, and specs that name it no longer build"
    assert field in now[tag], f"{tag}.{field} is gone or lost its default, and specs that leave it out no longer build"
    assert now[tag][field] == DEFAULTS[group][tag][field], "raise spec_version and migrate, or leave the default"


def test_new_defaults_are_written_down():
    def ours(group, tag):
        return group in ("training", "numerics", "log_det") or "." not in tag

    new = [
        f'"{group}": {{"{tag}": {{"{field}": {json.dumps(value)}}}}}'
        for group, tags in current_defaults().items()
        for tag, fields in tags.items()
        if ours(group, tag)
        for field, value in fields.items()
        if field not in DEFAULTS.get(group, {}).get(tag, {})
    ]
    assert not new, "add to tests/spec/golden/defaults_v2.json: " + ", ".join(new)


@pytest.mark.parametrize("name", HASHES)
def test_documents_of_version_1_keep_their_hash(name):
    """These files are never changed: checkpoints of version 1 must always load."""
    path = GOLDEN / "v1" / f"{name}.json"
    spec = invflow.load_spec(path)
    assert spec.hash == HASHES[name]
    model = (invflow.build_model if spec.head or spec.prior else invflow.build)(spec)
    assert invflow.load_spec(invflow.to_spec(model)).hash == HASHES[name]


def test_every_golden_document_has_its_hash():
    assert {path.stem for path in (GOLDEN / "v1").glob("*.json")} == set(HASHES)
