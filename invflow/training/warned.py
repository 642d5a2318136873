"""The warnings of a training, in its record."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

MOST_WARNINGS = 20
"""Different ones that a record holds."""
LONGEST = 500
"""The letters that it holds of each."""


@contextlib.contextmanager
def noting_warnings(record: dict[str, Any]) -> Iterator[None]:
    """Inside, each warning that is shown is noted in a record too, under ``warnings``: its kind, text and count.

    Examples:
        >>> record = {}
        >>> with warnings.catch_warnings(record=True), noting_warnings(record):
        ...     warnings.simplefilter("always")
        ...     warnings.warn("late"), warnings.warn("late")
        (None, None)
        >>> record
        {'warnings': [{'kind': 'UserWarning', 'text': 'late', 'count': 2}]}
    """
    show = warnings.showwarning

    def noting(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        entry = {"kind": category.__name__, "text": str(message)[:LONGEST]}
        known = record.setdefault("warnings", [])
        same = next((one for one in known if {**one, **entry} == one), None)
        if same is not None:
            same["count"] += 1
        elif len(known) < MOST_WARNINGS:
            known.append({**entry, "count": 1})
        show(message, category, *rest, **more)

    warnings.showwarning = noting
    try:
        yield
    finally:
        warnings.showwarning = show
