"""What the diagram of a chain shows: blocks, and how they are joined.

A block takes some tensors and returns some. Layers one after another are a list of items; layers side by side, each on
its part of the state, are columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from ..fields import counted
from ..state import TensorShape

TIMES = "\N{MULTIPLICATION SIGN}"

Leaves: TypeAlias = tuple[TensorShape, ...]
"""The shapes of the tensors of a state, in order."""

Kind: TypeAlias = Literal["layer", "widens", "net", "end", "more"]


@dataclass
class Block:
    """A layer, or another station on the way of a state.

    Attributes:
        title: what it is, a layer's tag.
        before: the shapes of the tensors that it takes.
        after: likewise, of those that it returns.
        kind: a "layer" is invertible; one that "widens" has a left inverse, a "net" has none; an "end" is where states
            come from or go to; "more" stands for layers that are not drawn.
        facts: its fields, and what else is to be said of it.
        about: what it does; empty if another block has said so.
        nets: the nets that it holds, each on one line.
        sees: what it sees of a context; empty for nothing.
        times: how many such layers come one after another.
        order: which of the tensors that it takes each of those is that it returns, if it only reorders them.
    """

    title: str
    before: Leaves
    after: Leaves
    kind: Kind = "layer"
    facts: tuple[str, ...] = ()
    about: str = ""
    nets: tuple[str, ...] = ()
    sees: str = ""
    times: int = 1
    order: tuple[int, ...] = ()


@dataclass
class Group:
    """Items one after another, at least one, in a frame with a title."""

    title: str
    items: list[Item]
    facts: tuple[str, ...] = ()
    times: int = 1

    @property
    def before(self) -> Leaves:
        return self.items[0].before

    @property
    def after(self) -> Leaves:
        return self.items[-1].after


class Column(NamedTuple):
    """A part of the state: the items that it passes, or None if it stays unchanged meanwhile."""

    before: Leaves
    after: Leaves
    items: list[Item] | None


@dataclass
class Columns:
    """Parts of the state side by side."""

    columns: list[Column]

    @property
    def before(self) -> Leaves:
        return tuple(itertools.chain.from_iterable(column.before for column in self.columns))

    @property
    def after(self) -> Leaves:
        return tuple(itertools.chain.from_iterable(column.after for column in self.columns))


Item: TypeAlias = Block | Group | Columns


@dataclass
class Picture:
    """What a diagram shows.

    Attributes:
        items: from the input to what stands on the chain.
        context: where the context comes from, first the context itself; empty if there is none.
    """

    items: list[Item]
    context: list[Block] = field(default_factory=list)


def blocks_in(items: Iterable[Item]) -> Iterator[Block]:
    """All blocks among items, in order."""
    for item in items:
        if isinstance(item, Block):
            yield item
        elif isinstance(item, Group):
            yield from blocks_in(item.items)
        else:
            for column in item.columns:
                yield from blocks_in(column.items or ())


def extents(shape: TensorShape) -> str:
    """The shape of a tensor: its extents one after another, or the number of features of a vector."""
    return counted(shape[0], "feature") if len(shape) == 1 else TIMES.join(map(str, shape)) or "1 number"


def shapes(leaves: Leaves) -> str:
    """The shapes of some tensors, equal neighbours counted.

    Examples:
        >>> shapes(((2,), (2,), (3,)))
        '2 tensors of 2 features, 3 features'
    """
    runs = [(shape, len([*same])) for shape, same in itertools.groupby(leaves)]
    return ", ".join(extents(one) if times == 1 else f"{times} tensors of {extents(one)}" for one, times in runs)


def sentences(block: Block) -> list[str]:
    """All that is known of a block, one thing a line."""
    head = block.title if block.times == 1 or block.kind == "more" else f"{block.title}, {block.times} times"
    lines = [", ".join((head, *block.facts)), *block.nets]
    if block.sees:
        lines.append(f"sees {block.sees}")
    if block.before and block.after:
        lines.append(f"from {shapes(block.before)} to {shapes(block.after)}")
    elif leaves := block.before or block.after:
        lines.append(shapes(leaves))
    return lines


def summary(items: Iterable[Item]) -> str:
    """The picture in words, for those who do not see it."""
    return " ".join(map(_said, items))


def _said(item: Item) -> str:
    if isinstance(item, Block):
        return f"{'; '.join(sentences(item))}."
    if isinstance(item, Group):
        times = f", {item.times} times" if item.times > 1 else ""
        return f"{', '.join((item.title, *item.facts))}{times}: ( {summary(item.items)} )"
    said = [
        f"{counted(len(column.before), 'tensor')} unchanged" if column.items is None else f"( {summary(column.items)} )"
        for column in item.columns
    ]
    return f"Side by side: {'; '.join(said)}."
