"""From the modules of a chain to the blocks of its diagram."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..arguments import one_line
from ..bijection import Bijection
from ..bijections import Exchange, FactorOut, Inverse
from ..context import ContextShape, entries_of_shape, seen
from ..errors import InvflowError
from ..fields import counted
from ..models import Classifier, ContextNet, Dequantizer, Flow
from ..registry import bijections, heads, nets, priors
from ..sequential import Sequential
from ..state import Path, Shape, is_tensor_shape, leaf_shapes, part_of, with_part
from ..wires import Wire, Wired, shape_after
from .blocks import Block, Column, Columns, Group, Item, Kind, Leaves, Picture, blocks_in, extents
from .repeats import repeats
from .words import WHOLE_CONTEXT, about, alike, fields_of, named, names_of, nets_of, parts_of, reseeded, sees

MOST_BLOCKS = 120
"""Of a picture; the layers beyond them are counted."""


def picture_of(model: Sequential | Classifier | Flow, shape: Shape | None = None) -> Picture:
    """The picture of a chain or a model.

    Args:
        model: the chain, or a model with one.
        shape: of the input, without the batch; by default the one that the chain was built for.

    Raises:
        InvflowError: the shape is needed and missing.
        ShapeError: the chain does not take it.
    """
    chain = model.bijection if isinstance(model, Classifier | Flow) else model
    start = chain.declared_shape if shape is None else shape
    if start is None:
        raise InvflowError("a diagram of a chain that was not built from a spec expects its input's shape, got none")
    reader = _Reader()
    before = _leaves(start)
    items: list[Item] = [Block("input", (), before, "end")]
    if isinstance(model, Flow) and model.dequantizer is not None:
        items += reader.dequantization(model.dequantizer, start)
    items += reader.chain([*chain], start, chain.declared_context_shape)
    after = _leaves(chain.output_shape(start))
    context_shape = chain.declared_context_shape if isinstance(model, Sequential) else model.context_shape
    items += reader.tops(model, after, context_shape)
    net = None if isinstance(model, Sequential) else model.context_net
    return Picture(items, [] if context_shape is None else _context(context_shape, net))


class _Met(NamedTuple):
    """A layer in its place.

    Attributes:
        layer: the layer.
        backwards: whether its inverse is run.
        before: the shape of the state that it takes.
        after: likewise, of the state that it returns.
        key: a text that is equal for layers that are alike.
        reseeded: whether it stands for layers with other seeds as well.
    """

    layer: Bijection
    backwards: bool
    before: Shape
    after: Shape
    key: str
    reseeded: bool = False


class _Reader:
    """Makes items of layers, up to `MOST_BLOCKS` blocks."""

    def __init__(self) -> None:
        self.left = MOST_BLOCKS
        self.explained: set[str] = set()

    # ----------------------------------------------------------------- Layers

    def chain(self, layers: Sequence[Bijection], shape: Shape, context: ContextShape) -> list[Item]:
        """The items of layers that act on the whole state in turn; a joint before all others is the stem."""
        found = self.row([(layer, False) for layer in layers], shape, context)
        first = found[0] if found else None
        if isinstance(first, Block) and first.title == "joint" and layers[0].tag == "joint":
            first.title = "stem: joint"
        return found

    def row(self, layers: Iterable[tuple[Bijection, bool]], shape: Shape, context: ContextShape) -> list[Item]:
        """The items of layers that act on a state in turn, each with whether it runs backwards."""
        met = []
        for layer, backwards in layers:
            after = shape_after(layer, shape, backwards)
            met.append(_Met(layer, backwards, shape, after, f"{alike(layer)}{backwards}{shape}{after}"))
            shape = after
        return self._folded(met, context)

    def _folded(self, met: Sequence[_Met], context: ContextShape) -> list[Item]:
        items: list[Item] = []
        position = 0
        for start, period, times in repeats([one.key for one in met]):
            if self.left <= 0:
                rest = met[position:]
                count = sum(_count(one.layer) for one in rest)
                items.append(_more(count, _leaves(rest[0].before), _leaves(rest[-1].after)))
                break
            position = start + period * times
            unit = [_for_all(met[i:position:period]) for i in range(start, start + period)]
            inside = [self._single(unit[0], context)] if period == 1 else self._folded(unit, context)
            if times == 1:
                items += inside
            elif period == 1 and isinstance(inside[0], Block):
                items.append(replace(inside[0], times=times))
            else:
                items.append(Group(f"{counted(period, 'layer')}, one after another", inside, times=times))
        return items

    def _single(self, met: _Met, context: ContextShape) -> Item:
        made = self.item(met.layer, met.backwards, met.before, context)
        for block in blocks_in([made]) if met.reseeded else ():
            block.facts, block.nets = (tuple(map(reseeded, texts)) for texts in (block.facts, block.nets))
        return made

    def item(self, layer: Bijection, backwards: bool, shape: Shape, context: ContextShape) -> Item:
        """The item of one layer."""
        made = self._made(layer, backwards, shape, seen(context, layer.sees))
        if isinstance(layer.sees, str):  # what is seen has no name of its own
            for block in blocks_in([made]):
                block.sees = layer.sees if block.sees == WHOLE_CONTEXT else block.sees
        return made

    def _made(self, layer: Bijection, backwards: bool, shape: Shape, context: ContextShape) -> Item:
        """The item of a layer that sees all of a context."""
        around = backwards is not layer.runs_backwards if isinstance(layer, Wired) else backwards
        if isinstance(layer, Inverse) and not isinstance(layer.layer, Wired):
            return self.item(layer.layer, around, shape, context)
        if not isinstance(layer, Wired) or not layer.named_layers():
            return self._alone(layer, backwards, shape, context)
        wires = layer.wires(lambda: shape)
        inner = {id(wire.layer): wire.layer for wire in wires}
        if layer.tag == "each" and len(inner) == 1 and not any(isinstance(one, Wired) for one in inner.values()):
            block = self._block(wires[0].layer, around, shape, shape_after(layer, shape, backwards), context)
            shared = f"one layer, shared by each of {len(wires)} tensors"
            return replace(block, title=f"each: {block.title}", facts=(*block.facts, shared))
        items = self._along(wires[::-1] if around else wires, around, shape, context)
        facts = fields_of(layer, bijections)
        if layer.tag == "each":
            facts = (f"the same layer, shared by each of {len(wires)} tensors",)
        if layer.tag == "on":
            parts = 1 if is_tensor_shape(shape) else len(shape)
            place = wires[0].path[0] if wires[0].path else 0
            facts = () if parts == 1 else (f"index {place}: it acts on one of {parts} parts",)
        title = f"the inverse of {layer.tag}" if backwards else layer.tag
        framed = Group(title, items, facts)
        if len(items) == 1 and isinstance(items[0], Columns):  # the frame is around the part that layers act on
            active = [column for column in items[0].columns if column.items is not None]
            if len(active) == 1 and active[0].items:
                inside = Group(title, active[0].items, facts)
                columns = [one if one.items is None else one._replace(items=[inside]) for one in items[0].columns]
                return Columns(columns)
        return framed

    def _along(self, wires: Sequence[Wire], backwards: bool, shape: Shape, context: ContextShape) -> list[Item]:
        """The items of layers that act on parts of the state, those on neighbouring parts side by side."""
        items: list[Item] = []
        streams = [(path, list(some)) for path, some in itertools.groupby(wires, key=lambda wire: wire.path)]
        while streams:
            if not streams[0][0]:
                _, some = streams.pop(0)
                items += self.row([(wire.layer, backwards) for wire in some], shape, context)
                for wire in some:
                    shape = shape_after(wire.layer, shape, backwards)
                continue
            together = [streams.pop(0)]
            while streams and all(_apart(path, streams[0][0]) for path, _ in together):
                together.append(streams.pop(0))
            made, shape = self._side_by_side(together, backwards, shape, context)
            items.append(made)
        return items

    def _side_by_side(
        self, streams: Sequence[tuple[Path, list[Wire]]], backwards: bool, shape: Shape, context: ContextShape
    ) -> tuple[Columns, Shape]:
        """Layers on parts of the state, of which none lies within another, and the shape of the state after them."""
        columns: list[Column] = []
        after, passed = shape, 0
        for path, wires in sorted(streams, key=lambda stream: stream[0]):
            part = part_of(shape, path)
            first = _leaf_position(shape, path)
            _pass_by(columns, _leaves(shape)[passed:first])
            passed = first + len(_leaves(part))
            made = part
            for wire in wires:
                made = shape_after(wire.layer, made, backwards)
            after = with_part(after, path, made)
            if self.left > 0:
                items = self.row([(wire.layer, backwards) for wire in wires], part, context)
            else:
                items = [_more(sum(_count(wire.layer) for wire in wires), _leaves(part), _leaves(made))]
            last = columns[-1].items if columns else None
            if self.left <= 0 and last is not None and isinstance(last[0], Block) and last[0].kind == "more":
                both = _more(  # one block for all columns that are not drawn
                    last[0].times + sum(_count(wire.layer) for wire in wires),
                    (*columns[-1].before, *_leaves(part)),
                    (*columns[-1].after, *_leaves(made)),
                )
                columns[-1] = Column(both.before, both.after, [both])
            else:
                columns.append(Column(_leaves(part), _leaves(made), items))
        _pass_by(columns, _leaves(shape)[passed:])
        return Columns(columns), after

    def _alone(self, layer: Bijection, backwards: bool, shape: Shape, context: ContextShape) -> Item:
        """A layer that is made of no others. A `factor_out` acts on the last tensor, the others pass by."""
        after = shape_after(layer, shape, backwards)
        block = self._block(layer, backwards, shape, after, context)
        if isinstance(layer, FactorOut) and not is_tensor_shape(shape):
            parts = 2 if backwards else 1
            acted = sum(len(_leaves(part)) for part in shape[-parts:])  # type: ignore[arg-type, misc]
            others = len(block.before) - acted
            if others:
                passing = block.before[:others]
                block = replace(block, before=block.before[others:], after=block.after[others:])
                return Columns([Column(passing, passing, None), Column(block.before, block.after, [block])])
        return block

    def _block(self, layer: Bijection, backwards: bool, before: Shape, after: Shape, context: ContextShape) -> Block:
        """The block of a layer that is made of no others."""
        self.left -= 1
        facts = list(fields_of(layer, bijections))
        if not layer.invertible:
            facts.append("not invertible")
        elif not layer.surjective:
            facts.append("adds dimensions: a left inverse only")
        kind: Kind = "layer" if layer.surjective else "widens" if layer.invertible else "net"
        order: tuple[int, ...] = ()
        if isinstance(layer, Exchange):
            marked = _marked(before, itertools.count())
            order = tuple(leaf[0] for leaf in leaf_shapes(shape_after(layer, marked, backwards)))
        return Block(
            f"the inverse of {layer.tag}" if backwards else layer.tag,
            _leaves(before),
            _leaves(after),
            kind,
            facts=tuple(facts),
            about=self._about(layer),
            nets=nets_of(layer),
            sees=sees(layer, context),
            order=order,
        )

    def _about(self, module: object) -> str:
        """What a module does, once for each class."""
        cls = type(module)
        if cls.__qualname__ in self.explained:
            return ""
        self.explained.add(cls.__qualname__)
        return about(cls)

    # ------------------------------------------------ What is around the chain

    def dequantization(self, dequantizer: Dequantizer, shape: Shape) -> list[Item]:
        """The noise that is added to pixels, drawn by a flow that sees them."""
        leaves = _leaves(shape)
        draw = Block("dequantization: noise", leaves, leaves * 2, "end", ("standard normal, one number a pixel",))
        add = "a sigmoid makes it lie in (0, 1), within the level of its pixel"
        add_block = Block("dequantization: noise added to pixels", leaves * 2, leaves, "end", (add,))
        items = self.row([(dequantizer.bijection, False)], shape, None)
        for one in blocks_in(items):
            one.sees = "the pixels" if one.nets else ""
        return [draw, Columns([Column(leaves, leaves, None), Column(leaves, leaves, items)]), add_block]

    def tops(self, model: Sequential | Classifier | Flow, after: Leaves, context: ContextShape) -> list[Item]:
        """What stands on the chain: a head, a prior, both, or nothing."""
        found = []
        if isinstance(model, Flow):
            prior = model.prior
            seen_by_prior = names_of(seen(context, prior.sees)) if prior.takes_context else ""
            facts = fields_of(prior, priors)
            if model.levels:
                facts = (*facts, "the net of each factor_out gives the distribution of what is done")
            title = f"prior: {priors.name_of(type(prior))}"
            found.append(Block(title, after, (), "end", facts, about=about(type(prior)), sees=seen_by_prior))
        if isinstance(model, Classifier):
            linear = model.linear_head
            facts = (*fields_of(model.head, heads), "linear in the features" if linear else "not invertible")
            title = f"head: {heads.name_of(type(model.head))}"
            parts = parts_of(model.head, heads)
            found.append(Block(title, after, (), "end" if linear else "net", facts, nets=(parts,) if parts else ()))
        if not found:
            return [Block("output", after, (), "end")]
        if len(found) == 1:
            return [found[0]]
        fork = Block("features", after, after * len(found), "end", ("the last state goes to both",))
        return [fork, Columns([Column(after, (), [one]) for one in found])]


def _for_all(met: Sequence[_Met]) -> _Met:
    """The first of some layers that are alike, which stands for all."""
    differ = len({one_line(one.layer) for one in met}) > 1
    return met[0]._replace(reseeded=met[0].reseeded or differ)


def _count(layer: Bijection) -> int:
    """How many layers there are in one, itself if it is made of no others."""
    if isinstance(layer, Wired) and (inner := layer.inner_layers()):
        return sum(map(_count, inner))
    return 1


def _more(count: int, before: Leaves, after: Leaves) -> Block:
    return Block(f"... {count:,} more {'layer' if count == 1 else 'layers'}", before, after, "more", times=count)


def _context(shape: ContextShape, net: ContextNet | None) -> list[Block]:
    """The blocks of the context, and of the net that it passes first."""
    leaves = tuple(entries_of_shape(shape))
    names = [f"{name} " for name in sorted(shape)] if isinstance(shape, Mapping) else [""]
    facts = tuple(f"{name}{extents(leaf)}" for name, leaf in zip(names, leaves, strict=True))
    found = [Block("context", (), leaves, "end", facts)]
    if net is not None:
        made = tuple(entries_of_shape(net.made_shape))
        lines = [f"{name or 'net'}: {named(net.of(name), nets)}" for name in net.out_shapes]
        found.append(Block("context_net", leaves, made, "net", ("not invertible",), nets=tuple(lines)))
    return found


def _leaves(shape: Shape) -> Leaves:
    return tuple(leaf_shapes(shape))


def _marked(shape: Shape, numbers: Iterator[int]) -> Shape:
    """A shape of the same structure, whose tensors are numbered by their only extent."""
    if is_tensor_shape(shape):
        return (next(numbers),)
    return tuple(_marked(part, numbers) for part in shape)  # type: ignore[arg-type]


def _leaf_position(shape: Shape, path: Path) -> int:
    """The number of tensors of a state that come before the part at a path."""
    marked = part_of(_marked(shape, itertools.count()), path)
    return next(leaf_shapes(marked))[0]


def _apart(path: Path, other: Path) -> bool:
    """Whether neither of two parts of a state lies within the other."""
    shorter = min(len(path), len(other))
    return path[:shorter] != other[:shorter]


def _pass_by(columns: list[Column], leaves: Leaves) -> None:
    """Adds a column of tensors that stay unchanged, if there are any."""
    if leaves:
        columns.append(Column(leaves, leaves, None))
