"""The reference of the site is complete: what a spec can name, why one would, and links that lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

import invflow
from invflow import registry
from invflow.bijection import Bijection

ROOT = Path(__file__).parent.parent
EXPLAINED = {
    f"{kind.noun} {tag}": cls
    for kind in (registry.bijections, registry.nets, registry.heads, registry.priors)
    for tag, cls in kind.registered().items()
    if cls.__module__.startswith("invflow.")
}


@pytest.fixture
def extension(monkeypatch):
    """Imports an extension of the site."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "extensions"))
    return __import__


@pytest.mark.parametrize("name", EXPLAINED)
def test_a_class_says_why_one_would_use_it(name):
    assert "Use it " in (inspect.getdoc(EXPLAINED[name]) or "")


def test_each_picture_of_the_plane_is_drawn(extension, tmp_path):
    pictures = extension("plane_pictures")
    for tag in pictures.DRAWN:
        path = pictures.plane_picture(tag, tmp_path)
        assert path.read_text().count("<path") > 2 * 2 * pictures.LINES, tag
    assert pictures.plane_picture("psi", tmp_path) is None


def test_each_layer_has_a_row_of_shapes(extension):
    pages = extension("registry_pages")
    for tag, cls in registry.bijections.registered().items():
        if cls.__module__.startswith("invflow."):
            assert issubclass(cls, Bijection)
            assert list(pages._shapes(tag, cls)), tag


def test_a_dead_link_is_found(extension, tmp_path):
    (tmp_path / "a.html").write_text('<p id="here"><a href="b.html#there">b</a> <a href="#here">a</a>')
    (tmp_path / "b.html").write_text(
        '<a href="a.html#gone">a</a> <a href="c.html">c</a> <img src="d.png"> <a href="https://x.y/z">'
    )
    found = extension("checked_links").dead_links(tmp_path)
    assert found == ["a.html: b.html#there", "b.html: a.html#gone", "b.html: c.html", "b.html: d.png"]


def documented():
    """What the page about Python names, by name."""
    found = {}
    for name in re.findall(r"auto(?:function|class):: (\S+)", (ROOT / "docs" / "python.md").read_text()):
        module, _, rest = name.rpartition(".")
        found[name] = getattr(importlib.import_module(module), rest)
    return found


@pytest.mark.parametrize("name", documented())
def test_what_a_program_imports_has_an_example(name):
    """Results are described by their attributes; what one derives from has a whole file in docs/extending.md."""
    one = documented()[name]
    if dataclasses.is_dataclass(one) or name.split(".")[-1] in (ROOT / "docs" / "extending.md").read_text():
        assert inspect.getdoc(one)
    else:
        assert ">>>" in (inspect.getdoc(one) or "")


def test_everything_that_the_package_exports_is_documented():
    classes = {cls for kind in registry.REGISTRIES for cls in kind.registered().values()}
    pages = {id(one) for one in documented().values()}
    for name in invflow.__all__:
        one = getattr(invflow, name)
        if inspect.isroutine(one):
            assert any(one == other for other in documented().values()), name
        elif inspect.isclass(one) and one not in classes and one.__module__ != "invflow.errors":
            assert id(one) in pages, name
