"""By an independent validator, the JSON Schema agrees with the library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from jsonschema import Draft202012Validator
from pydantic import BaseModel

import invflow
from invflow.registry import REGISTRIES, bijections, data, nets, priors
from invflow.spec.schema import json_schema
from invflow.spec.training import Data, Training
from invflow.testing.strategies import chain_cases

from .faults import FAULTS, document

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "specs").glob("**/*.json"))
GOLDEN = sorted((Path(__file__).parent / "golden" / "v1").glob("*.json"))


@pytest.fixture(scope="module")
def validator():
    Draft202012Validator.check_schema(json_schema())
    return Draft202012Validator(json_schema())


def parsed(text):
    """The text as the validator's user would read it; None if it is not JSON."""

    def refuse(constant):
        raise ValueError(constant)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def test_the_file_in_docs_is_fresh():
    """Regenerate it with: python -m invflow.spec.schema > docs/spec.schema.json."""
    assert json.loads((ROOT / "docs" / "spec.schema.json").read_text()) == json_schema()


@pytest.mark.parametrize("path", [*SPECS, *GOLDEN], ids=lambda path: path.stem)
def test_shipped_specs_validate(path, validator):
    assert list(validator.iter_errors(json.loads(path.read_text()))) == []


PARSED = {name: fault for name, fault in FAULTS.items() if parsed(fault.text) is not None and "1e999" not in name}


@pytest.mark.parametrize("name", PARSED)
def test_wrong_documents_are_wrong_here_too_as_far_as_a_schema_can_tell(name, validator):
    assert validator.is_valid(parsed(PARSED[name].text)) is not PARSED[name].in_schema


def test_most_faults_show_in_an_editor():
    assert sum(fault.in_schema for fault in PARSED.values()) > 80


@given(chain_cases())
def test_whatever_loads_validates(case):
    text = json.dumps(case.spec)
    invflow.load_spec(case.spec)
    assert list(Draft202012Validator(json_schema()).iter_errors(json.loads(text))) == []


@pytest.mark.parametrize(
    "layer",
    [
        {"type": "psi", "block_size": {"$var": "two"}},
        {"type": "psi", "block_size": 2, "layout": {"$var": "layout"}, "note": {"$var": "layout"}},
        {"type": "repeat", "times": {"$var": "two"}, "note": "n", "layers": [{"type": "permute", "seed": 1}]},
        {"type": "repeat", "times": 1, "with": {"b": [1]}, "layers": [{"type": "psi", "block_size": {"$item": "b"}}]},
        {"type": "repeat", "times": 1, "with": {"layer": {"$var": "layers"}}, "layers": [{"$item": "layer"}]},
        {"type": "permute", "order": [{"$var": "two"}, 0, 1, 3]},
        {"type": "split", "sizes": [{"$var": "two"}, {"$var": "two"}]},
        {"type": "sequential", "layers": {"$var": "layers"}},
        {"type": "inverse", "layer": {"$var": "layer"}},
        {"$var": "layer"},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_references_stand_wherever_a_value_stands(layer, validator):
    psi = {"type": "psi", "block_size": 1}
    constants = {"two": 2, "layout": "channel", "layer": psi, "layers": [psi]}
    spec = json.loads(document(json.dumps(layer), more=f'"vars": {json.dumps(constants)}'))
    invflow.load_spec(spec)
    assert list(validator.iter_errors(spec)) == []


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.noun)
def test_every_field_is_explained_with_its_default(registry):
    definitions = json_schema()["$defs"]
    for tag, cls in registry.registered().items():
        described = definitions[f"{registry.noun.replace(' ', '_')}.{tag}"]
        assert described["description"]
        fields = registry.fields(cls).fields
        common = (
            Data.model_fields if registry is data else ("context",) if registry in (bijections, nets, priors) else ()
        )
        assert set(described["properties"]) == {registry.key, "note", *fields, *common}
        for name, field in fields.items():
            schema = described["properties"][name]
            assert schema.get("description"), f"say in the Args of {cls.__name__} what {name!r} is"
            assert (name in described["required"]) is field.required
            if field.kind == "value" and not field.required:
                default = list(field.default) if isinstance(field.default, tuple) else field.default
                default = default.model_dump() if isinstance(default, BaseModel) else default
                assert schema["default"] == default


def test_every_training_option_is_explained():
    definitions = json_schema()["$defs"]
    for name in ("Training", *Training.model_json_schema()["$defs"]):
        for key, schema in definitions[name]["properties"].items():
            assert key == "type" or schema.get("description"), f"{name}.{key}"


def test_ranges_and_choices_come_from_the_code():
    definitions = json_schema()["$defs"]
    psi = definitions["layer.psi"]["properties"]
    assert psi["block_size"]["anyOf"][0] == {"type": "integer", "exclusiveMinimum": 0}
    assert psi["layout"]["anyOf"][0]["enum"] == ["block", "channel"]
    assert "repeat" in definitions["entry.layers"]["properties"]["type"]["enum"]
    assert "repeat" not in definitions["layer"]["properties"]["type"]["enum"]
