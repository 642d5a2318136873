"""The documentation is correct: its specs build, and its tables name all registered classes."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import invflow
from invflow import registry
from invflow.spec.training import Augmentation, Data, Elastic, RandomAffine, Stroke, Training
from invflow.testing.properties import PROPERTIES

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/spec.md", "docs/data.md"]
RUN = ["tutorial", "howto_loop", "howto_conditional", "howto_export", "mathematics", "faq"]
BY_SECTION = "coming_from"  # each of its sections is about one library and stands alone
PEERS = {
    "FrEIA": ["FrEIA.framework", "FrEIA.modules"],
    "nflows": ["nflows.flows", "nflows.transforms"],
    "normflows": ["normflows", "normflows.flows"],
    "zuko": ["zuko.flows", "zuko.transforms"],
    "memcnn": ["memcnn"],
}
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LINKED = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


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


def run_blocks(page, text, folder, first_line=0):
    """Write the files that the text names, and run its Python from top to bottom, in one namespace."""
    for name, content in re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(content)
    (folder / "specs").symlink_to(ROOT / "specs")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    names = {"__name__": page}
    for block in blocks:
        line = first_line + text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + block.group(1), f"docs/{page}.md", "exec"), names)  # a failure names its line
    return len(blocks)


# What Lightning advises about small examples, and deprecations that are its own.
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*does not have many workers", "ignore:.*log_every_n_steps"
)
@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert run_blocks(page, (ROOT / "docs" / f"{page}.md").read_text(), tmp_path)


def sections(page):
    """(heading, first line, text) of each section with Python."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    starts = [match.start() for match in re.finditer(r"^## ", text, re.MULTILINE)]
    for start, end in pairwise([*starts, len(text)]):
        if "```python" in text[start:end]:
            yield text[start:end].splitlines()[0][3:], text.count("\n", 0, start), text[start:end]


def peer(name):
    """The modules of another library, or a test that is skipped; what it says as it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(name, reason=f"{name}, of the extra `bench`, is not installed")
        return [importlib.import_module(module) for module in PEERS[name]]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # of PyTorch, for MemCNN
@pytest.mark.parametrize(("line", "text"), [pytest.param(*rest, id=heading) for heading, *rest in sections(BY_SECTION)])
def test_a_peer_and_we_side_by_side(line, text, tmp_path, monkeypatch):
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)) & PEERS.keys()
    assert imported, "no other library is in this section"
    for name in sorted(imported):
        peer(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert run_blocks(BY_SECTION, text, tmp_path, line)


@pytest.mark.parametrize("column", range(2, 7))
def test_the_table_of_words_names_what_there_is(column):
    rows = re.findall(r"^\|.*\|$", (ROOT / "docs" / f"{BY_SECTION}.md").read_text(), re.MULTILINE)
    heading, _, *cells = [row.split("|")[column].strip() for row in rows]
    (name,) = [name for name in PEERS if name.lower() == heading.lower()]
    modules = peer(name)
    words = {word for cell in cells for word in re.findall(r"`([A-Z]\w+)", cell)} - {"Fm", "Gm"}  # two parameters
    assert words
    assert not {word for word in words if not any(hasattr(module, word) for module in modules)}


def slugs(path):
    """The anchors of a page: its headings as GitHub and MyST turn them into anchors."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.MULTILINE):
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
        found.append(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", LINKED)
def test_links_between_pages_resolve(page):
    path = ROOT / page
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", path.read_text())):
        if re.match(r"\w+:|generated/", target):  # another site, or a page that the build makes and checks
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name) if name else path
        if not other.exists():
            broken.append(f"{target}: no such file")
        elif anchor and (other.suffix != ".md" or anchor not in slugs(other)):
            broken.append(f"{target}: no such heading")
    assert not broken


def test_the_citation_names_this_version():
    assert f"version = {{{invflow.__version__}}}" in (ROOT / "docs" / "citation.md").read_text()


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
