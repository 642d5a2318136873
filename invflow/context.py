"""Contexts: what conditions a map besides the state that it maps.

A *context* is a tensor, dim 0 of which is the batch, or several by name, ``{"class": ..., "image": ...}``, or None. Its
*shape* describes it without the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import EllipsisType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .errors import ShapeError
from .state import TensorShape, map_state, require_state

Context: TypeAlias = Tensor | Mapping[str, Tensor] | None
ContextShape: TypeAlias = TensorShape | Mapping[str, TensorShape] | None

Names: TypeAlias = str | tuple[str, ...] | EllipsisType | None
"""What of a context something sees: one entry, several, all there is (an ellipsis), or nothing (None)."""

_LONGEST = 200
"""Of a list of names in a message."""


def each_entry(function: Callable[[Tensor], Any], context: Any) -> Any:
    """The context with a function applied to each of its tensors."""
    return None if context is None else map_state(function, context)


def entries(context: Context) -> list[Tensor]:
    """The tensors of a context, in an order that their names decide."""
    if not isinstance(context, Mapping):
        return [] if context is None else [context]
    return [context[name] for name in sorted(context)]


def with_entries(context: Context, values: Iterable[Tensor]) -> Any:
    """A context of the same names with the next of other tensors, in the order of `entries`."""
    pieces = iter(values)
    if not isinstance(context, Mapping):
        return None if context is None else next(pieces)
    return {name: next(pieces) for name in sorted(context)}


def seen(context: Any, names: Names) -> Any:
    """What is seen of a context, or of its shape: the entry of one name, a dict of those of several, all, or nothing.

    Examples:
        >>> seen({"class": (10,), "image": (3, 8, 8)}, "class"), seen((10,), ...), seen((10,), None)
        ((10,), (10,), None)

    Raises:
        ShapeError: there is no entry of a name.
    """
    if names is ... or names is None or context is None:
        if names is ... or names is None:
            return context if names is ... else None
        raise ShapeError(f"expected a context with {_listed(names)}, got none")
    if not isinstance(context, Mapping):
        raise ShapeError(f"expected a context with {_listed(names)}, got one without names")
    wanted = (names,) if isinstance(names, str) else names
    for name in wanted:
        if name not in context:
            raise ShapeError(f"expected a context with {_listed(name)}, got one with {_listed(context)}")
    return context[names] if isinstance(names, str) else {name: context[name] for name in wanted}


def _listed(names: str | Iterable[str]) -> str:
    listed = repr(names) if isinstance(names, str) else ", ".join(map(repr, names)) or "no entries"
    return listed if len(listed) <= _LONGEST else f"{listed[:_LONGEST]}..."


def shape_of_context(context: Context) -> ContextShape:
    """The shape of a context, without its batch."""
    return each_entry(lambda entry: tuple(entry.shape[1:]), context)  # type: ignore[no-any-return]


def make_context(function: Callable[[TensorShape], Tensor], shape: ContextShape) -> Any:
    """A context of a shape, each tensor made by a function of its own shape."""
    if shape is None or not isinstance(shape, Mapping):
        return None if shape is None else function(shape)
    return {name: function(extents) for name, extents in shape.items()}


def entries_of_shape(shape: ContextShape) -> list[TensorShape]:
    """The shapes of the tensors of a context, in the order of `entries`."""
    if shape is None or not isinstance(shape, Mapping):
        return [] if shape is None else [shape]
    return [shape[name] for name in sorted(shape)]


def named(entries: Mapping[str, Any]) -> Any:
    """A context, or its shape, of entries by their names; the only one that has the name "" stands for itself."""
    return entries.get("", entries) if entries else None


def rows_of(context: Context) -> int:
    """The number of rows of a context, of which each entry has so many or one; 0 for none."""
    found = [entry.shape[0] for entry in entries(context)]
    return next((rows for rows in found if rows != 1), 1 if found else 0)


def spread(context: Context, rows: int) -> Any:
    """The context with this number of rows; a single row stands for all."""
    if all(entry.shape[0] == rows for entry in entries(context)):
        return context
    return each_entry(lambda entry: entry.expand(rows, *entry.shape[1:]), context)


def require_context(who: str, shape: ContextShape, dtype: torch.dtype | None, context: Context) -> int:
    """The number of rows of a context, which must be of a shape and a dtype; None for any.

    Raises:
        ShapeError: the context has other names, shapes or dtypes, or entries with different numbers of rows.
    """
    if not isinstance(context, Mapping):
        if isinstance(shape, Mapping):
            raise ShapeError(f"{who}: expected a dict with {_listed(shape)}, got {_came(context)}")
        _require_entry(who, shape, dtype, context)
        return rows_of(context)
    if shape is not None and not isinstance(shape, Mapping):
        raise ShapeError(f"{who}: expected one tensor of shape {shape}, got a dict with {_listed(context)}")
    if shape is not None and set(shape) != set(context):
        raise ShapeError(f"{who}: expected a dict with {_listed(shape)}, got one with {_listed(context)}")
    for name, entry in context.items():
        _require_entry(f"{who} {name!r}", None if shape is None else shape[name], dtype, entry)
    if len(counts := {entry.shape[0] for entry in context.values()} - {1}) > 1:
        raise ShapeError(f"{who}: expected entries of as many rows, or of one, got {sorted(counts)} rows")
    return rows_of(context)


def _require_entry(who: str, shape: TensorShape | None, dtype: torch.dtype | None, entry: Any) -> None:
    # A shape refuses a tuple of tensors, which is a state.
    require_state(who, shape if isinstance(entry, Tensor) else shape or (), dtype, entry)


def _came(context: object) -> str:
    if isinstance(context, Tensor):
        return f"a tensor of shape {tuple(context.shape[1:])}"
    return "none" if context is None else type(context).__name__
