"""The differences between two specs, layer by layer."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from ..fields import LISTS, shortened
from .document import SpecSource, load_spec
from .nodes import Node
from .training import Training


def diff_specs(first: SpecSource, second: SpecSource) -> list[str]:
    """The differences of the second spec from the first, one line each; none if the specs mean the same.

    The specs are compared after the expansion of their repeats and references, with defaults filled in and without
    names and notes. Layers are paired as in a diff of texts, so that an added layer does not shift the others.

    Args:
        first: a file's path, a dict, or a Spec.
        second: likewise.

    Raises:
        SpecError: as `load_spec` does.

    Examples:
        >>> spec = {"input": {"shape": [1, 8, 8]}, "layers": [{"type": "psi", "block_size": 2}]}
        >>> longer = {**spec, "layers": [{"type": "psi", "block_size": 2, "layout": "block"}, {"type": "split"}]}
        >>> diff_specs(spec, longer)
        ['+ layers.1: {"type": "split"}']
        >>> diff_specs(spec, {**spec, "layers": [{"type": "psi"}]})
        ['layers.0.block_size: 2 -> 4']
    """
    old, new = load_spec(first), load_spec(second)
    return [
        *_values("input.shape", old.input_shape, new.input_shape),
        *_values("input.context_shape", old.context_shape, new.context_shape),
        *_plain("numerics", *(spec.top.numerics.model_dump(mode="json") for spec in (old, new))),
        *_plain("context_net", *(spec.canonical().get("context_net") for spec in (old, new))),
        *_layers("layers", old.layers, new.layers),
        *_documents("head", old.head, new.head),
        *_documents("prior", old.prior, new.prior),
        *_documents("dequantization", old.dequantization, new.dequantization),
        *_plain("training", *((spec.training or Training()).model_dump(mode="json") for spec in (old, new))),
    ]


def _layers(path: str, old: Sequence[Node], new: Sequence[Node]) -> Iterator[str]:
    """The differences of two lists of layers: equal ones are paired first, then those of one type."""
    for equal, a, b in _runs(_texts(old), _texts(new)):
        if equal:
            continue
        for same_type, c, d in _runs([old[i].tag for i in a], [new[j].tag for j in b]):
            left, right = [a[i] for i in c], [b[j] for j in d]
            if same_type:
                for i, j in zip(left, right, strict=True):
                    place = f"{path}.{i}" if i == j else f"{path}.{i} ({path}.{j} of the second)"
                    yield from _documents(place, old[i], new[j])
            else:
                yield from (f"- {path}.{i}: {_text(old[i])}" for i in left)
                yield from (f"+ {path}.{j}: {_text(new[j])}" for j in right)


def _runs(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[bool, range, range]]:
    """The runs of two sequences that are equal, and those that are not."""
    for kind, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        yield kind == "equal", range(a, b), range(c, d)


def _documents(path: str, old: Node | None, new: Node | None) -> Iterator[str]:
    """The differences of two documents at one place."""
    if old is None or new is None or old.tag != new.tag:
        if old is not new:
            yield f"{path}: {_text(old)} -> {_text(new)}"
        return
    if old.sees != new.sees:
        yield f"{path}.context: " + " -> ".join("all" if one.sees is ... else shortened(one.sees) for one in (old, new))
    for name, field in old.field_set.fields.items():
        inner = f"{path}.{name}"
        if field.kind == "value":
            yield from _values(inner, old.plain()[name], new.plain()[name])
        elif field.kind in LISTS:
            yield from _layers(inner, old.children.get(name, ()), new.children.get(name, ()))  # type: ignore[arg-type]
        else:
            yield from _documents(inner, old.children.get(name), new.children.get(name))  # type: ignore[arg-type]


def _plain(path: str, old: Any, new: Any) -> Iterator[str]:
    """The differences of two JSON values; objects of one type are compared key by key."""
    if not (isinstance(old, dict) and isinstance(new, dict)) or old.get("type") != new.get("type"):
        yield from _values(path, old, new)
        return
    for key in [*old, *(key for key in new if key not in old)]:
        yield from _plain(f"{path}.{key}", old.get(key), new.get(key))


def _values(path: str, old: Any, new: Any) -> Iterator[str]:
    if old != new:
        yield f"{path}: {shortened(old)} -> {shortened(new)}"


def _texts(nodes: Sequence[Node]) -> list[str]:
    return [json.dumps(node.canonical(), sort_keys=True) for node in nodes]


def _text(node: Node | None) -> str:
    return "none" if node is None else shortened(node.canonical(), 100)
