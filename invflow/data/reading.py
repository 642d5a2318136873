"""What the sources that read a user's files share: damage becomes one line, labels become classes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import DataError
from ..fields import cut, quoted
from ..source import shown

Label: TypeAlias = int | str

MOST_CLASSES = 32_768
"""More different labels than this are numbers to predict rather than classes."""
_LONGEST = 200  # characters of a library's message
_CHUNK = 2**22  # values that are looked at together


@contextlib.contextmanager
def reading(path: Path, *errors: type[Warning], part: str = "") -> Iterator[None]:
    """Make a DataError of one line, which names the file, of whatever a library raises when it reads a damaged one.

    Args:
        path: the file.
        errors: warnings that are errors; others are about damage that the library tolerates, and not shown.
        part: which part of it is read.
    """
    place = shown(path) + (f": {part}" if part else "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for category in errors:
                warnings.simplefilter("error", category)
            yield
    except DataError:
        raise
    except Exception as error:  # each kind of damage raises its own
        why = "".join(
            one if one.isprintable() else "?" for one in " ".join(str(error).replace(str(path), path.name).split())
        )
        raise DataError(f"{place}: cannot be read: {cut(why or type(error).__name__, _LONGEST)}") from None


def classes_of(values: Sequence[Label], place: str) -> tuple[Label, ...]:
    """The classes that labels stand for: their different values in order.

    Args:
        values: the different values, all integers or all strings, in any order.
        place: where they come from.

    Raises:
        DataError: there are too many.
    """
    if len(values) > MOST_CLASSES:
        raise DataError(f"{place}: {len(values)} different labels; expected at most {MOST_CLASSES} classes")
    return tuple(sorted(set(values)))


def as_classes(values: Sequence[Label], codes: Tensor, classes: Sequence[Label], place: str) -> Tensor:
    """Labels as the positions of their classes.

    Args:
        values: the different labels, in any order.
        codes: for each row, the position of its label among the values, ``(n,)``.
        classes: all labels, in order.
        place: where the labels come from.

    Raises:
        DataError: a label is no class.
    """
    known = {label: position for position, label in enumerate(classes)}
    found = torch.tensor([known.get(value, -1) for value in values])[codes]
    if (found < 0).any():
        row = int((found < 0).int().argmax())
        raise DataError(
            f"{place}: row {row} (from 0): no training sample has the label {quoted(values[int(codes[row])])}"
        )
    return found


def require_finite(values: Tensor, place: str, start: int = 0) -> None:
    """Refuse values that are NaN, infinite, or too large for float32.

    Args:
        values: floats ``(n, ...)``.
        place: where they come from.
        start: the number of rows before the first one.

    Raises:
        DataError: a value is such; the first row with one is named.
    """
    rows = max(1, _CHUNK // values[0].numel())
    for first in range(0, len(values), rows):
        some = values[first : first + rows].float()
        finite = some.isfinite().reshape(len(some), -1).all(1)
        if not finite.all():
            row = int((~finite).int().argmax())
            found = float(some[row][~some[row].isfinite()][0])
            raise DataError(f"{place}: row {start + first + row} (from 0) holds {found}; expected finite numbers")
