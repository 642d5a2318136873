"""Lays the blocks of a chain out, from top to bottom. Lengths are in units of the drawing, 640 of them wide."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..fields import counted
from .blocks import (
    TIMES,
    Block,
    Column,
    Columns,
    Group,
    Item,
    Kind,
    Leaves,
    Picture,
    blocks_in,
    extents,
    sentences,
    shapes,
)
from .blocks import summary as summary_of
from .canvas import BOLD, LINE, Canvas, lines_of, width_of

WIDTH = 640.0
MARGIN = 12.0
PAD = 9.0
GAP = 30.0
"""Between two blocks, for a wire and the shape beside it."""
STEP = 14.0
"""Between a frame and what is in it."""
TURN = 22.0
"""For wires that move sideways."""
RAIL = 16.0
"""The width of a tensor that passes by."""
APART = 10.0
"""Between columns."""
CONTEXT = 24.0
"""The width of the context's wire."""
NARROWEST = 220.0
"""A column that would be narrower is drawn below the others, or not at all."""
CROSSING = 34.0
MOST_RAILS = 3
MOST_LINES = 7
"""Of the text of a net."""

_WORDS: dict[Kind, str] = {
    "layer": "an invertible layer",
    "widens": "a layer that adds dimensions: it has a left inverse only",
    "net": "dashes: not invertible",
    "end": "where states come from, and where they go to",
    "more": "layers that are not drawn",
}


class Region(NamedTuple):
    """Where something is drawn, and whether the wire of the context reaches it from the right."""

    left: float
    right: float
    reached: bool

    @property
    def width(self) -> float:
        return self.right - self.left

    def within(self, margin: float) -> Region:
        return Region(self.left + margin, self.right - margin, self.reached)


class Strand(NamedTuple):
    """A wire: which tensors of a state it carries, from ``start`` to before ``stop``, and where."""

    start: int
    stop: int
    x: float
    label: str

    @property
    def kind(self) -> str:
        return "wire" if self.stop - self.start == 1 else "bundle"


class Layout:
    """A drawing of a picture.

    Args:
        picture: the blocks.
        name: of the model, the heading; empty for none.
    """

    def __init__(self, picture: Picture, name: str) -> None:
        self.picture = picture
        self.name = name
        self.canvas = Canvas()
        self.context_x = WIDTH - MARGIN - 6
        self.context_end: float | None = None

    def svg(self) -> str:
        """The drawing."""
        y = MARGIN
        for line in lines_of(self.name, WIDTH - 2 * MARGIN, 16.0)[:2]:
            self.canvas.text("name", MARGIN, y + 16, line, 16.0)
            y += 26
        right = WIDTH - MARGIN
        if self.picture.context:
            y = self._sequence(self.picture.context, Region(WIDTH / 2, right, False), y)
            start, right = y, right - CONTEXT
            y += STEP
        y = self._sequence(self.picture.items, Region(MARGIN, right, bool(self.picture.context)), y)
        if self.context_end is not None:
            self.canvas.wire("context", (self.context_x, start), (self.context_x, self.context_end))
        y = self._legend(y + STEP)
        title = f"Diagram of {self.name}" if self.name else "Diagram of a chain"
        said = summary_of([*self.picture.context, *self.picture.items])
        return self.canvas.svg(WIDTH, y + MARGIN, title, f"From the input to the output. {said}")

    # ------------------------------------------------------------------ Items

    def _sequence(self, items: Sequence[Item], region: Region, y: float) -> float:
        """Draws items one below the other from ``y`` on, and returns where they end."""
        for position, item in enumerate(items):
            if position:
                y = self._gap(item.before, region, y, arrow=not isinstance(item, Columns))
            y = self._item(item, region, y)
        return y

    def _item(self, item: Item, region: Region, y: float) -> float:
        if isinstance(item, Block):
            return self._block(item, region, y)
        if isinstance(item, Group):
            return self._group(item, region, y)
        return self._columns(item, region, y)

    def _block(self, block: Block, region: Region, y: float) -> float:
        canvas, start, width = self.canvas, y, region.width - 2 * PAD
        x, tip = region.left + PAD, "\n".join(sentences(block))
        insets: list[tuple[float, float]] = []
        y = self._heading(block.title, block.facts, 1 if block.kind == "more" else block.times, region, y)
        for line in lines_of(block.about, width):
            canvas.text("about", x, y + LINE - 4, line)
            y += LINE
        for net in block.nets:
            lines = lines_of(net, width - 12)
            if len(lines) > MOST_LINES:
                lines = [*lines[: MOST_LINES - 1], "... the rest is in the spec"]
            insets.append((y + 3, LINE * len(lines) + 6))
            for line in lines:
                canvas.text("fact", x + 6, y + 3 + LINE - 2, line)
                y += LINE
            y += 11
        for line in lines_of(f"sees {block.sees}" if block.sees else "", width):
            canvas.text("fact", x, y + LINE - 4, line)
            y += LINE
        y += 6 if not block.order else CROSSING
        canvas.box(block.kind, region.left, start, region.width, y - start, tip)
        for top, height in insets:
            canvas.box("inset", x, top, width, height)
        if block.order:
            self._crossing(block, region, y)
        if block.sees and block.sees != "the pixels" and region.reached:
            self.context_end = y - 6 - LINE / 2
            canvas.wire("context", (self.context_x, self.context_end), (region.right, self.context_end), arrow=True)
        return y

    def _heading(self, title: str, facts: Sequence[str], times: int, region: Region, y: float) -> float:
        """The title of a block or a frame, with its facts, and how many there are; returns where it ends."""
        canvas, x, y = self.canvas, region.left + PAD, y + 5
        badge = f"{TIMES} {times}" if times > 1 else ""
        room = region.width - 2 * PAD - (width_of(badge, BOLD) + 14 if badge else 0)
        if badge:
            canvas.text("title", region.right - PAD - width_of(badge, BOLD), y + LINE - 4, badge, BOLD)
        said = ", ".join(facts)
        besides = width_of(title, BOLD) + 14
        for line in lines_of(title, room, BOLD):
            canvas.text("title", x, y + LINE - 4, line, BOLD)
            y += LINE
        if besides + width_of(said) <= room:
            if said:
                canvas.text("fact", x + besides, y - 4, said)
            return y
        for line in lines_of(said, region.width - 2 * PAD):
            canvas.text("fact", x, y + LINE - 4, line)
            y += LINE
        return y

    def _crossing(self, block: Block, region: Region, y: float) -> None:
        """The wires inside a block that reorders tensors, if each of them has a wire of its own."""
        above, below = strands(block.before, region), strands(block.after, region)
        if len(above) == len(below) == len(block.order):
            for strand, origin in zip(below, block.order, strict=True):
                self.canvas.wire("wire", (above[origin].x, y - CROSSING + 5), (strand.x, y), inside=True)

    def _group(self, group: Group, region: Region, y: float) -> float:
        inner = region.within(APART)
        if inner.width < NARROWEST:
            return self._block(_closed(group), region, y)
        start = y
        y = self._heading(group.title, group.facts, group.times, region, y) + 5
        tip = f"{', '.join((group.title, *group.facts))}\nfrom {shapes(group.before)} to {shapes(group.after)}"
        self.canvas.box("header", region.left, start, region.width, y - start, tip)
        entering, leaving = strands(group.before, inner), strands(group.after, inner)
        y = self._join(entering, entering, y, STEP, arrow=True)
        y = self._sequence(group.items, inner, y)
        y = self._join(leaving, strands(group.after, region), y, STEP)
        self.canvas.box("frame", region.left, start, region.width, y - start)
        return y

    def _columns(self, item: Columns, region: Region, y: float) -> float:
        places = _places(item, region)
        cramped = any(
            column.items is not None and right - left < _least_width(column.items)
            for column, (left, right) in zip(item.columns, places, strict=True)
        )
        if cramped and sum(column.items is not None for column in item.columns) > 1:
            return self._sequence([*_one_by_one(item)], region, y)
        if cramped and any(right - left < NARROWEST for left, right in places[:1]):
            return self._block(_closed(item), region, y)
        whole, top = strands(item.before, region), y
        y = bottom = y + TURN
        ends: list[tuple[Strand, float]] = []
        taken = returned = 0
        for column, (left, right) in zip(item.columns, places, strict=True):
            part = Region(left, right, region.reached and right > region.right - 1)
            place = strands if column.items is not None else _rails
            self._join(whole, _moved(place(column.before, part), taken), top, TURN, arrow=column.items is not None)
            end = y if column.items is None else self._sequence(column.items, part, y)
            ends += [(strand, end) for strand in _moved(place(column.after, part), returned)]
            bottom = max(bottom, end)
            taken, returned = taken + len(column.before), returned + len(column.after)
        for strand, end in ends:
            if end < bottom:
                self.canvas.wire(strand.kind, (strand.x, end), (strand.x, bottom))
        return self._join([strand for strand, _ in ends], strands(item.after, region), bottom, TURN)

    # ------------------------------------------------------------------ Wires

    def _gap(self, leaves: Leaves, region: Region, y: float, *, arrow: bool) -> float:
        """The wires between two blocks, each with its shape."""
        for strand in strands(leaves, region):
            tip = shapes(leaves[strand.start : strand.stop])
            self.canvas.wire(strand.kind, (strand.x, y), (strand.x, y + GAP), arrow=arrow)
            self.canvas.text("shape", strand.x + 9, y + GAP / 2 + 3, strand.label, tip=tip)
        return y + GAP

    def _join(
        self, above: Sequence[Strand], below: Sequence[Strand], y: float, height: float, *, arrow: bool = False
    ) -> float:
        """Wires from strands to those below that carry the same tensors; returns where they end."""
        for upper, lower in itertools.product(above, below):
            count = min(upper.stop, lower.stop) - max(upper.start, lower.start)
            if count > 0:
                kind = "wire" if count == 1 else "bundle"
                self.canvas.wire(kind, (upper.x, y), (lower.x, y + height), arrow=arrow)
        return y + height if below else y

    # ----------------------------------------------------------------- Legend

    def _legend(self, y: float) -> float:
        """What the boxes, and the wires of a context, mean, as far as they occur."""
        canvas, blocks = self.canvas, [*self.picture.context, *blocks_in(self.picture.items)]
        kinds = {block.kind for block in blocks}
        meanings: list[tuple[str, str]] = [(kind, words) for kind, words in _WORDS.items() if kind in kinds]
        if any(block.nets for block in blocks):
            meanings.append(("inset", "within a layer, a net: any function, which need not be invertible"))
        for kind, words in meanings:
            canvas.box(kind, MARGIN, y + 3, 26, 13)
            canvas.text("legend", MARGIN + 36, y + LINE - 4, words)
            y += LINE + 4
        if self.picture.context:
            canvas.wire("context", (MARGIN, y + 9), (MARGIN + 26, y + 9))
            canvas.text("legend", MARGIN + 36, y + LINE - 4, "the context, which layers see and leave unchanged")
            y += LINE + 4
        if self._folded(self.picture.items):
            canvas.text("legend", MARGIN, y + LINE - 4, f"{TIMES} 8")
            canvas.text("legend", MARGIN + 36, y + LINE - 4, "as many layers of this kind, one after another")
            y += LINE + 4
        return y

    def _folded(self, items: Sequence[Item]) -> bool:
        return any(
            (item.times > 1 and getattr(item, "kind", "") != "more")
            or (isinstance(item, Group) and self._folded(item.items))
            if not isinstance(item, Columns)
            else any(self._folded(column.items or ()) for column in item.columns)
            for item in items
        )


def strands(leaves: Leaves, region: Region) -> list[Strand]:
    """The wires of a state across a region, one for each tensor; one for all if there is no room for their shapes."""
    if not leaves:
        return []
    each = region.width / len(leaves)
    labels = [extents(shape) for shape in leaves]
    if len(leaves) == 1 or all(width_of(label) + 12 <= each / 2 for label in labels):
        return [
            Strand(i, i + 1, region.left + each * (i + 0.5), _fitting(label, each / 2))
            for i, label in enumerate(labels)
        ]
    label, middle = shapes(leaves), region.width / 2
    if width_of(label) + 12 > middle:
        label = counted(len(leaves), "tensor")
    return [Strand(0, len(leaves), region.left + middle, label)]


def _fitting(label: str, width: float) -> str:
    """A shape as far as it fits; the whole one is in the tooltip."""
    return label if width_of(label) + 12 <= width else lines_of(label, width - 12 - width_of("…"))[0] + "…"


def _rails(leaves: Leaves, region: Region) -> list[Strand]:
    """The wires of tensors that pass by."""
    if len(leaves) > MOST_RAILS:
        return [Strand(0, len(leaves), region.left + RAIL / 2, "")]
    return [Strand(i, i + 1, region.left + RAIL * (i + 0.5), "") for i in range(len(leaves))]


def _moved(some: Sequence[Strand], by: int) -> list[Strand]:
    """Strands of a part, counted as those of the whole state, of which others come before."""
    return [strand._replace(start=strand.start + by, stop=strand.stop + by) for strand in some]


def _rails_width(column: Column) -> float:
    return RAIL * (len(column.before) if len(column.before) <= MOST_RAILS else 1)


def _places(item: Columns, region: Region) -> list[tuple[float, float]]:
    """Where the columns are: tensors that pass by are narrow, the others share the rest."""
    passing = [_rails_width(column) if column.items is None else None for column in item.columns]
    room = region.width - sum(width for width in passing if width is not None) - APART * (len(passing) - 1)
    share = room / max(1, passing.count(None))
    left, found = region.left, []
    for width in passing:
        right = left + (share if width is None else width)
        found.append((left, right))
        left = right + APART
    return found


def _least_width(items: Sequence[Item]) -> float:
    """The width that items need, columns being drawn below each other."""
    return max((_least_width_of(item) for item in items), default=NARROWEST)


def _least_width_of(item: Item) -> float:
    if isinstance(item, Block):
        return NARROWEST
    if isinstance(item, Group):
        return _least_width(item.items) + 2 * APART
    inner = max((_least_width(column.items) for column in item.columns if column.items is not None), default=NARROWEST)
    return inner + 2 * (RAIL * MOST_RAILS + APART)


def _one_by_one(item: Columns) -> Iterator[Columns]:
    """The columns below each other: while one is passed, the others pass by."""
    for position, active in enumerate(item.columns):
        if active.items is None:
            continue
        before = tuple(itertools.chain.from_iterable(column.after for column in item.columns[:position]))
        after = tuple(itertools.chain.from_iterable(column.before for column in item.columns[position + 1 :]))
        beside = [Column(leaves, leaves, None) for leaves in (before, after)]
        yield Columns([one for one in (beside[0], active, beside[1]) if one.items or one.before])


def _closed(item: Group | Columns) -> Block:
    """A block in the place of items for which there is no room."""
    count = layers_in([item])
    title = item.title if isinstance(item, Group) else "side by side"
    return Block(f"{title}: {counted(count, 'layer')}, nested too deeply to draw", item.before, item.after, "more")


def layers_in(items: Sequence[Item]) -> int:
    """How many layers some items stand for."""
    found = 0
    for item in items:
        if isinstance(item, Columns):
            found += sum(layers_in(column.items or ()) for column in item.columns)
        elif isinstance(item, Group):
            found += item.times * layers_in(item.items)
        elif item.kind != "end":
            found += item.times
    return found
