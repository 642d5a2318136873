"""Shapes in a document: of states, and of contexts."""

from __future__ import annotations

import re
from typing import Any

from ..context import ContextShape
from ..state import Shape, TensorShape

MOST_DIMENSIONS = 16
MOST_ENTRIES = 100
"""Of a context."""
ENTRY = "^[A-Za-z_][A-Za-z0-9_]*$"
"""The name of an entry of a context."""

_SIZES = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": MOST_DIMENSIONS}
CONTEXT_SHAPE = {
    "anyOf": [
        _SIZES,
        {
            "type": "object",
            "propertyNames": {"pattern": ENTRY},
            "additionalProperties": _SIZES,
            "minProperties": 1,
            "maxProperties": MOST_ENTRIES,
        },
        {"type": "null"},
    ]
}


def is_entry(name: str) -> bool:
    """Whether a name can be that of an entry of a context."""
    return re.fullmatch(ENTRY, name) is not None


def nested_shape(value: list[Any]) -> Shape:
    """The shape of a state. Raises ValueError."""
    if _are_sizes(value):
        return _bounded(value)
    if all(isinstance(part, list) for part in value):
        return tuple(nested_shape(part) for part in value)
    raise ValueError("a shape is a list of positive whole numbers without the batch, or a list of shapes")


def tensor_shape(value: Any) -> TensorShape:
    """The shape of one tensor. Raises ValueError."""
    if isinstance(value, list | tuple) and _are_sizes(value):
        return _bounded(value)
    raise ValueError("a shape is a list of positive whole numbers without the batch")


def context_shape(value: Any) -> ContextShape:
    """The shape of a context, a list, or an object of lists by name. Raises ValueError."""
    if value is None or not isinstance(value, dict):
        return None if value is None else tensor_shape(value)
    if not 0 < len(value) <= MOST_ENTRIES:
        raise ValueError(f"a context with names has 1 to {MOST_ENTRIES} of them")
    wrong = next((name for name in value if not is_entry(name)), None)
    if wrong is not None:
        raise ValueError(f"the name of a context's entry consists of letters, digits and _, not as {wrong!r}")
    return {name: tensor_shape(extents) for name, extents in sorted(value.items())}


def _are_sizes(value: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in value)


def _bounded(value: list[Any] | tuple[Any, ...]) -> TensorShape:
    if not 0 < len(value) <= MOST_DIMENSIONS:
        raise ValueError(f"a shape needs 1 to {MOST_DIMENSIONS} numbers")
    return tuple(value)
