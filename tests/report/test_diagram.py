"""The diagram of a chain is well-formed, says what is in the chain, and nothing in it overlaps."""

from __future__ import annotations

import functools
import itertools
import random
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given

import invflow
from invflow import Sequential
from invflow.bijection import Rearrangement
from invflow.bijections import ActNorm, Exchange, Merge, On, Parallel, Permute, Psi, Scale, Split
from invflow.report.blocks import Columns, Group, blocks_in
from invflow.report.canvas import width_of
from invflow.report.diagram import diagram
from invflow.report.layout import layers_in
from invflow.report.reading import MOST_BLOCKS, picture_of
from invflow.state import leaf_shapes
from invflow.testing.strategies import chain_cases
from tests.test_wires import WRAPPERS, wrapped

ROOT = Path(__file__).parent.parent.parent
SPECS = sorted((ROOT / "specs").rglob("*.json"))
SVG = "{http://www.w3.org/2000/svg}"
BOXES = frozenset({"layer", "widens", "net", "end", "more"})
ADVANCE = 0.602
"""The width of a letter by its size in DejaVu Sans Mono and Menlo, the widest of the fonts that the style names."""
SLACK = 0.2
"""Of lengths, in units of the drawing: they are written with one digit after the point."""


class Rect(NamedTuple):
    kind: str
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Rect) -> bool:
        return (
            self.left < other.right - SLACK
            and other.left < self.right - SLACK
            and self.top < other.bottom - SLACK
            and other.top < self.bottom - SLACK
        )

    def holds(self, other: Rect) -> bool:
        return (
            self.left <= other.left + SLACK
            and other.right <= self.right + SLACK
            and self.top <= other.top + SLACK
            and other.bottom <= self.bottom + SLACK
        )


class Drawn:
    """The elements of a diagram with their places."""

    def __init__(self, svg: str) -> None:
        self.root = ET.fromstring(svg)
        _, _, width, height = map(float, self.root.get("viewBox").split())
        self.whole = Rect("all", 0, 0, width, height)
        self.rects = [self._rect(one) for one in self.root.iter(f"{SVG}rect")]
        self.texts = [(one.text, self._text(one)) for one in self.root.iter(f"{SVG}text")]
        self.wires = [self._wire(one) for one in self.root.iter(f"{SVG}path")]

    @staticmethod
    def _rect(one):
        x, y, width, height = (float(one.get(name)) for name in ("x", "y", "width", "height"))
        return Rect(one.get("class"), x, y, x + width, y + height)

    @staticmethod
    def _text(one):
        kind, x, y = one.get("class"), float(one.get("x")), float(one.get("y"))
        size = {"title": 13, "name": 16}.get(kind, 12)
        width = one.get("textLength")
        return Rect(kind, x, y - 0.8 * size, x + (len(one.text) * size * ADVANCE if width is None else float(width)), y)

    @staticmethod
    def _wire(one):
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", one.get("d"))]
        xs, ys = numbers[::2], numbers[1::2]
        return Rect(one.get("class"), min(xs), min(ys), max(xs), max(ys))

    def of(self, *kinds):
        return [rect for rect in self.rects if rect.kind in kinds]

    def written(self, kind):
        return [text for text, place in self.texts if place.kind == kind]


def require_legible(svg: str) -> Drawn:
    """Fails if a diagram is malformed, or if something in it overlaps or stands out."""
    drawn = Drawn(svg)
    assert drawn.root.tag == f"{SVG}svg"
    assert drawn.root.get("role") == "img"
    assert [child.tag for child in drawn.root][:2] == [f"{SVG}title", f"{SVG}desc"]
    assert all(child.text for child in [*drawn.root][:2])
    assert not any("id" in one.attrib for one in drawn.root.iter()), "two diagrams in one page would share it"
    for rect in [*drawn.rects, *drawn.wires, *(place for _, place in drawn.texts)]:
        assert drawn.whole.holds(rect), rect
    boxes, frames = drawn.of(*BOXES, "header"), drawn.of("frame")
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (one, other)
    for one, other in itertools.combinations(frames, 2):
        assert not one.overlaps(other) or one.holds(other) or other.holds(one), (one, other)
    for frame, box in itertools.product(frames, boxes):
        assert not frame.overlaps(box) or frame.holds(box), (frame, box)
    insets = drawn.of("inset")
    for one, other in itertools.combinations(insets, 2):
        assert not one.overlaps(other), (one, other)
    for (_, one), (_, other) in itertools.combinations(drawn.texts, 2):
        assert not one.overlaps(other), (one, other)
    for text, place in drawn.texts:
        around = [box for box in (*boxes, *insets) if box.overlaps(place)]
        assert all(box.holds(place) for box in around), (text, place)
        assert bool(around) is (place.kind in ("title", "fact", "about")), (text, place)
    for wire, box in itertools.product(drawn.wires, boxes):
        assert not wire.overlaps(box) or box.holds(wire), (wire, box)
    return drawn


def require_joined(items):
    """Fails if an item returns other tensors than the next one takes."""
    for one, other in itertools.pairwise(items):
        assert one.after == other.before
    for item in items:
        if isinstance(item, Group):
            require_joined(item.items)
        elif isinstance(item, Columns):
            for column in item.columns:
                if column.items is None:
                    assert column.before == column.after
                else:
                    require_joined(column.items)
                    assert (column.items[0].before, column.items[-1].after) == (column.before, column.after)


@functools.cache
def built(path):
    document = invflow.load_spec(path)
    with torch.device("meta"):
        return (invflow.build_model if document.head or document.prior else invflow.build)(document)


def chain_of(model):
    return model if isinstance(model, Sequential) else model.bijection


def named(shape):
    if len(shape) == 1:
        return "1 feature" if shape == (1,) else f"{shape[0]} features"
    return "\N{MULTIPLICATION SIGN}".join(map(str, shape))


def layers_of(chain):
    """How many layers a chain consists of; one that acts on several tensors counts once, unless it holds others.

    A chain of nothing is no step, but it is drawn.
    """
    empty = sum(type(part) is Sequential and not len(part) and part is not chain for part in chain.modules())
    return len({re.sub(r"@\d+$", "", step.name) for step in chain.steps()}) + empty


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_each_spec_is_drawn_legibly_and_completely(path):
    model = built(path)
    chain = chain_of(model)
    svg = diagram(model, name=path.stem)
    drawn = require_legible(svg)
    require_joined(picture_of(model).items)
    assert layers_in(picture_of(chain).items) == layers_of(chain)
    titles = " ".join(drawn.written("title"))
    assert {step.layer.tag for step in chain.steps()} <= set(re.findall(r"[a-z0-9_.]+", titles))
    shapes = {leaf for shape in chain.shapes(chain.declared_shape) for leaf in leaf_shapes(shape)}
    assert set(drawn.written("shape")) == {named(shape) for shape in shapes}
    assert len(svg) < 100_000


def test_the_shapes_stand_in_their_places():
    drawn = require_legible(diagram(Sequential(Psi(2), Split(), Merge()), (1, 8, 6)))
    shapes = ["1 8 6", "4 4 3", "2 4 3", "2 4 3", "4 4 3"]
    assert drawn.written("shape") == [shape.replace(" ", "\N{MULTIPLICATION SIGN}") for shape in shapes]
    assert drawn.written("title") == ["input", "psi", "split", "merge", "output"]


@pytest.mark.parametrize(
    ("name", "badges"),
    [
        ("irevnet_digits", [8]),
        ("iresnet_moons", [16]),
        ("multiscale_realnvp_mnist", [4, 4, 4, 4, 4]),
        ("glow_mnist", [8, 8, 8]),
        ("published/glow_cifar10", [32, 32, 32]),
        ("published/irevnet_imagenet", [5, 15, 71, 5]),
        ("published/cinn", [20, 2]),
    ],
)
def test_repeated_layers_are_counted(name, badges):
    drawn = Drawn(diagram(built(ROOT / "specs" / f"{name}.json")))
    found = [re.fullmatch("\N{MULTIPLICATION SIGN} (\\d+)", title) for title in drawn.written("title")]
    assert [int(one.group(1)) for one in found if one] == badges


def test_layers_that_differ_are_not_folded():
    layers = [Permute(order=[1, 0, 2]), Permute(order=[1, 0, 2]), Permute(order=[0, 2, 1])]
    blocks = [*blocks_in(picture_of(Sequential(*layers), (3,)).items)]
    assert [(block.facts, block.times) for block in blocks[1:-1]] == [
        (("order [1, 0, 2]",), 2),
        (("order [0, 2, 1]",), 1),
    ]


def test_layers_with_other_seeds_are_folded_and_no_seed_is_named():
    layers = [layer for seed in range(5) for layer in (Permute(seed=seed, shape=(3, 4, 4)), Psi(1))]
    _, group, _ = picture_of(Sequential(*layers), (3, 4, 4)).items
    assert (group.times, group.items[0].facts) == (5, ("seeds of their own",))
    alike = Sequential(*[Permute(seed=3, shape=(3,)) for _ in range(4)])
    assert picture_of(alike, (3,)).items[1].facts == ("seed 3",)


def test_what_has_no_inverse_is_said_in_words():
    drawn = require_legible(diagram(built(ROOT / "specs/published/revnet110_cifar10.json")))
    assert "stem: joint" in drawn.written("title")
    assert sum(title == "joint" for title in drawn.written("title")) == 4
    assert sum("not invertible" in fact for fact in drawn.written("fact")) == 6, "the stem, 4 joints and the head"
    assert len(drawn.of("net")) == 6 + 1, "and the legend"
    assert "adds dimensions: a left inverse only" in require_legible(
        diagram(built(ROOT / "specs/published/revvit_cifar10.json"))
    ).written("fact")


def test_what_is_done_passes_by_on_its_way_to_the_prior():
    picture = picture_of(built(ROOT / "specs" / "glow_mnist.json"))
    prior = picture.items[-1]
    assert prior.title == "prior: standard_normal"
    assert prior.before == ((2, 14, 14), (4, 7, 7), (4, 7, 7))
    passing = [item.columns[0].before for item in picture.items if isinstance(item, Columns)]
    assert passing == [((2, 14, 14),), ((2, 14, 14),), ((2, 14, 14), (4, 7, 7))]


def test_each_net_that_sees_the_context_is_joined_to_it():
    drawn = require_legible(diagram(built(ROOT / "specs" / "tarflow_digits.json")))
    assert drawn.written("fact").count("sees the context") == 2
    arrows = [wire for wire in drawn.wires if wire.kind == "context" and wire.top == wire.bottom]
    assert len(arrows) == 2 + 1, "and the legend"
    assert "context" in drawn.written("title")


def test_a_context_net_and_a_flow_of_noise_are_shown():
    document = {
        "input": {"shape": [1, 4, 4], "context_shape": {"class": [3], "other": [2]}},
        "context_net": {"class": {"type": "mlp", "context": "class", "out_shape": [5]}},
        "layers": [
            {"type": "flatten"}, {"type": "split"},
            {"type": "affine_coupling", "context": "class", "net": {"type": "mlp"}},
            {"type": "affine_coupling", "context": None, "net": {"type": "mlp"}},
            {"type": "merge"},
        ],
        "prior": {"type": "standard_normal"},
        "dequantization": {"type": "sequential", "layers": [
            {"type": "split", "dim": 2}, {"type": "affine_coupling", "net": {"type": "conv"}},
            {"type": "merge", "dim": 2},
        ]},
    }  # fmt: skip
    drawn = require_legible(diagram(invflow.build_model(document)))
    titles = drawn.written("title")
    assert titles[:2] == ["context", "context_net"]
    assert [title for title in titles if title.startswith("dequantization")] == [
        "dequantization: noise",
        "dequantization: noise added to pixels",
    ]
    sees = [fact for fact in drawn.written("fact") if fact.startswith("sees")]
    assert sees == ["sees the pixels", "sees class"]


@pytest.mark.parametrize("how", WRAPPERS)
def test_layers_within_others_are_drawn(how):
    document = wrapped(how, 3)
    chain = invflow.build(document)
    drawn = require_legible(diagram(chain))
    require_joined(picture_of(chain).items)
    assert layers_in(picture_of(chain).items) == layers_of(chain)
    titles = " ".join(drawn.written("title"))
    assert {layer["type"] for layer in document["layers"]} <= set(re.findall(r"[a-z_]+", titles))


def test_exchange_shows_which_tensor_goes_where():
    shape = ((1,), (2,), ((3,), (4,)))
    exchange = Exchange(order=[[2, 0], 1])
    _, block, _ = picture_of(Sequential(exchange), shape).items
    assert block.order == (2, 3, 0, 1)
    assert block.after == tuple(block.before[i] for i in block.order)
    require_legible(diagram(Sequential(exchange, invflow.Inverse(exchange)), shape))


@pytest.mark.parametrize("branches", [2, 3, 40, 300])
def test_branches_that_do_not_fit_side_by_side_are_drawn_below_each_other(branches):
    chain = Sequential(Parallel(*[Scale(i % 50) for i in range(branches)]), On(Psi(1), index=1))
    drawn = require_legible(diagram(chain, ((2, 4, 4),) * branches))
    assert layers_in(picture_of(chain, ((2, 4, 4),) * branches).items) == branches + 1
    assert len(drawn.rects) < 2 * MOST_BLOCKS


def test_a_deep_nest_is_closed():
    chain = Sequential(ActNorm(shape=(2,)))
    for _ in range(40):
        chain = Sequential(chain)
    drawn = require_legible(diagram(chain, (2,)))
    assert "sequential: 1 layer, nested too deeply to draw" in " ".join(drawn.written("title"))


def test_a_long_chain_has_a_picture_of_bounded_size():
    draw = random.Random(0)
    chain = Sequential(*[Scale(draw.randrange(-64, 65)) for _ in range(10_000)])
    svg, items = diagram(chain, (2,)), picture_of(chain, (2,)).items
    assert len(svg) < 100_000
    assert layers_in(items) == 10_000
    drawn = [block for block in blocks_in(items) if block.kind == "layer"]
    more = [block for block in blocks_in(items) if block.kind == "more"]
    assert len(drawn) == MOST_BLOCKS
    assert [block.times for block in more] == [10_000 - sum(block.times for block in drawn)]
    assert f"... {more[0].times:,} more layers" in require_legible(svg).written("title")


class Unregistered(Rearrangement):
    """<script>alert("&")</script> ``]]>``: the docstring of a stranger."""

    def forward(self, x, context=None):
        return x

    def inverse(self, y, context=None):
        return y


@pytest.mark.parametrize(
    "name", ["<script>alert(\"1\")</script> & 'x'", "]]> <!-- \x00\x1b\n\ud800 \ufffe", "W" * 400, "\u6587\ufdfd" * 80]
)
def test_names_are_escaped_and_fit(name):
    svg = diagram(Sequential(Unregistered()), (2,), name=name)
    require_legible(svg)
    assert "<script" not in svg
    svg.encode()


@given(chain_cases(max_depth=8))
def test_any_chain_is_drawn_legibly(case):
    chain = case.chain()
    require_legible(diagram(chain))
    require_joined(picture_of(chain).items)
    assert layers_in(picture_of(chain).items) == layers_of(chain)


def test_a_chain_without_a_shape_is_refused():
    with pytest.raises(invflow.errors.InvflowError, match="expects its input's shape"):
        diagram(Sequential(Psi(2)))


def test_letters_are_estimated_as_wide_as_they_are():
    assert width_of("letters", 12) > 7 * 12 * ADVANCE


def test_the_verb_writes_the_picture_of_the_page(call, tmp_path):
    spec = ROOT / "specs" / "irevnet_digits.json"
    status, out, _ = call("show", spec, "--diagram")
    assert (status, out) == (0, "wrote diagram.svg\n")
    written = (tmp_path / "diagram.svg").read_text()
    assert written == (ROOT / "docs" / "irevnet_digits.svg").read_text(), (
        "write it again: invflow show specs/irevnet_digits.json --diagram --out docs/irevnet_digits.svg"
    )
    assert call("show", spec, "--diagram", "--out", tmp_path / "new" / "a.svg")[0] == 0
    assert (tmp_path / "new" / "a.svg").read_text() == written


@pytest.mark.parametrize("options", [("--out", "a.svg"), ("--diagram", "--memory"), ("--diagram", "--expanded")])
def test_options_that_do_not_fit_are_refused(call, options):
    status, out, err = call("show", ROOT / "specs" / "irevnet_digits.json", *options)
    assert (status, out) == (2, "")
    assert "--diagram" in err


def test_a_block_says_everything_in_its_tip():
    svg = diagram(built(ROOT / "specs" / "irevnet_digits.json"))
    tips = [
        one.find(f"{SVG}title").text
        for one in Drawn(svg).root.iter(f"{SVG}rect")
        if one.find(f"{SVG}title") is not None
    ]
    coupling = next(tip for tip in tips if tip.startswith("additive_coupling"))
    assert coupling.splitlines()[0] == "additive_coupling, 8 times"
    assert "net: conv (hidden [64])" in coupling
