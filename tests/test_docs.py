"""The documentation is correct: its specs build, and its tables name all registered classes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import invflow
from invflow import registry
from invflow.spec.training import Augmentation, Data, Elastic, RandomAffine, Stroke, Training
from invflow.testing.properties import PROPERTIES

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/spec.md", "docs/data.md"]


def code(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_specs_in_the_text_build(page):
    specs = code(page, "json")
    assert specs
    for text in specs:
        document = json.loads(text)
        if "layers" in document:
            invflow.build(document)
        else:
            registry.data.find(document["name"])(**Data.model_validate_json(text).of_source)


def test_python_in_the_readme_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for text in code("README.md", "python"):
        exec(text, names)
    assert isinstance(names["chain"], invflow.Sequential)


def test_python_about_flows_runs():
    torch.manual_seed(0)
    names = {}
    for text in code("docs/flows.md", "python"):
        exec(text, names)
    assert names["rank"].shape == (1, 2)


def test_the_spec_page_names_every_type_and_field():
    text = (ROOT / "docs" / "spec.md").read_text()
    for one in (registry.bijections, registry.nets, registry.heads, registry.priors, registry.data):
        for tag, cls in one.registered().items():
            rows = re.findall(rf"^\| `{tag}` \|.*$", text, re.MULTILINE)  # a net and a head may share a tag
            assert rows, f"{tag} is not in docs/spec.md"
            absent = ([name for name in one.fields(cls).fields if f"`{name}`" not in row] for row in rows)
            missing = min(absent, key=len)
            assert not missing, f"docs/spec.md says nothing of {missing} of {tag}"


@pytest.mark.parametrize("options", [Training, Data, Augmentation, RandomAffine, Elastic, Stroke])
def test_the_spec_page_names_every_training_option(options):
    section = (ROOT / "docs" / "spec.md").read_text().split("## Training")[1]
    missing = [name for name in options.model_fields if f"`{name}`" not in section and f".{name}`" not in section]
    assert not missing, f"docs/spec.md says nothing of {missing}"


def test_the_proof_names_every_property():
    text = (ROOT / "docs" / "proof.md").read_text()
    said = "\n".join(f"- **{prop.name}**: {prop.promise}" for prop in PROPERTIES)
    assert said in text, "write it again with make proof"
