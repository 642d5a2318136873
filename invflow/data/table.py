"""Tables, CSV and Parquet, whose columns are features, a label and a context."""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ..context import entries, named, with_entries
from ..errors import DataError
from ..fields import cut, quoted
from ..registry import register_data
from ..samples import Batch, Changed, DataSet, Samples
from ..source import Request, Source, shown
from .reading import MOST_CLASSES, Label, as_classes, classes_of, reading, require_finite

if TYPE_CHECKING:
    import pyarrow

_MOST_ROWS = 10**8  # their order alone has 8 bytes for each
_MOST_COLUMNS = 2**15
_MOST_CSV = 2**29  # bytes of a CSV file, which is read as a whole
_LONGEST_LINE = 2**20  # bytes of its first line, and of any that pyarrow reads
_MOST_GROUP = 2**29  # bytes of a row group, which is decoded as a whole
_WINDOW = 2**27  # bytes of the row groups whose rows are shuffled together
_CHUNK = 2**16  # rows whose moments are taken together
_SMALLER = "write it as Parquet in row groups of 100,000 rows"


@register_data("table")
class Table(Source):
    """The rows of a CSV or Parquet file: some columns are features, one may be the label, others the context.

    A Parquet file may be larger than memory: a row group is read when some of its rows are taken.

    Args:
        path: the file, relative to the spec or to the data root; the first line of a CSV file names the columns.
        test_path: a file with the test part, which has the same columns.
        features: the columns of features; null: all that hold numbers, apart from the label and the context.
        label: the column of labels, which are integers or strings; null: none.
        standardize: whether features and numbers of the context are shifted and scaled to mean 0 and standard deviation
            1 in the training part; a constant is only shifted.
    """

    def __init__(
        self,
        path: str,
        test_path: str | None = None,
        features: Annotated[list[str], Field(min_length=1)] | None = None,
        label: str | None = None,
        standardize: bool = True,
    ) -> None:
        self.path = path
        self.test_path = test_path
        self.features = features
        self.label = label
        self.standardize = standardize

    def load(self, request: Request) -> DataSet:
        file, context = _open(request.find(self.path)), request.named_context
        given = {name for names in context.values() for name in names}
        beside = {self.label, *given, ""}  # an index that pandas wrote has no name
        features = self.features or [name for name in file.names if name not in beside and file.is_numeric(name)]
        if not features:
            raise DataError(f"{shown(file.path)}: no column of numbers besides label and context; it has {file.listed}")
        if self.label in features:
            raise DataError(f"{shown(file.path)}: the label {quoted(self.label)} is also named among the features")
        train, test = _Rows(file, features, self.label, context), None
        if self.test_path is not None:
            test = _Rows(_open(request.find(self.test_path)), features, self.label, context, like=train)
        found = request.data_set(train, test, class_names=[str(one) for one in train.classes])
        standard = _moments(found.train, train) if self.standardize else (torch.zeros(1), torch.ones(1))
        return found.changed(lambda samples: _Standardized(samples, *standard))


class _File(ABC):
    """A table in a file, in groups of rows that are read as a whole.

    Attributes:
        path: of the file.
        names: of the columns.
        sizes: the number of rows of each group.
    """

    path: Path
    names: list[str]
    sizes: list[int]

    @abstractmethod
    def is_numeric(self, name: str) -> bool:
        """Whether a column holds numbers."""

    @abstractmethod
    def read(self, name: str, group: int) -> pyarrow.ChunkedArray:
        """A column of a group, as pyarrow reads it."""

    @property
    def listed(self) -> str:
        """The names of the columns, for messages."""
        return cut(", ".join(map(quoted, self.names)), 200)

    @functools.cached_property
    def starts(self) -> list[int]:
        """The number of rows before each group, and of all rows."""
        return list(itertools.accumulate(self.sizes, initial=0))

    def place(self, name: str) -> str:
        """What messages call a column."""
        return f"{shown(self.path)}: column {quoted(name)}"

    def fault(self, name: str, row: int | None, why: str) -> DataError:
        """The error for a row of a column; for None, for the column."""
        where = "" if row is None else f"row {row} (from 0): "
        return DataError(f"{self.place(name)}: {where}{why}")

    def column(self, name: str, group: int) -> pyarrow.ChunkedArray:
        """A column of a group, in which nothing is missing. Raises DataError."""
        import pyarrow.compute

        with reading(self.path, part=f"column {quoted(name)}"):
            found = self.read(name, group)
            if len(found) != self.sizes[group]:
                raise ValueError(f"{len(found)} rows, expected {self.sizes[group]}")
            if found.null_count:
                row = pyarrow.compute.index(found.is_null(), True).as_py()
                raise self.fault(name, self.starts[group] + row, "a value is missing; fill it in, or leave the row out")
        return found

    def numbers(self, name: str, group: int) -> NDArray[np.float64]:
        """A column of a group as numbers. Raises DataError."""
        import pyarrow.compute

        found = self.column(name, group)
        if is_text := pyarrow.types.is_string(found.type) or pyarrow.types.is_large_string(found.type):
            found = pyarrow.compute.utf8_trim_whitespace(found)
        try:
            numbers: NDArray[np.float64] = found.cast(pyarrow.float64(), safe=False).to_numpy()
        except pyarrow.ArrowException:
            if not is_text:
                raise self.fault(name, None, f"expected numbers, got {found.type}") from None
            row = _first_without_number(found)
            why = f"expected a number, got {quoted(found[row].as_py())}"
            raise self.fault(name, self.starts[group] + row, why) from None
        if len(numbers):
            require_finite(torch.tensor(numbers), self.place(name), start=self.starts[group])
        return numbers

    def labels(self, name: str) -> tuple[list[Label], Tensor]:
        """The different values of a column, and for each row the position of its value among them. Raises DataError."""
        import pyarrow

        kinds = ("is_integer", "is_boolean", "is_string", "is_large_string")
        known: dict[Label, int] = {}
        codes = [torch.zeros(0, dtype=torch.long)]
        for group in (group for group, size in enumerate(self.sizes) if size):
            found = self.column(name, group)
            kind = found.type.value_type if pyarrow.types.is_dictionary(found.type) else found.type
            if not any(getattr(pyarrow.types, one)(kind) for one in kinds):
                raise self.fault(name, None, f"expected integers or strings, got {kind}")
            with reading(self.path, part=f"column {quoted(name)}"):
                encoded = found.unify_dictionaries().combine_chunks().dictionary_encode()
                if len(encoded.dictionary) > MOST_CLASSES:
                    raise self.fault(name, None, f"more than {MOST_CLASSES} different labels; it holds no classes")
                values = encoded.dictionary.to_pylist()
                if None in values:  # a dictionary may have an entry for it
                    raise self.fault(name, None, "a label is missing")
                places = torch.tensor([known.setdefault(value, len(known)) for value in values])
                codes.append(places[torch.tensor(encoded.indices.to_numpy())])
        return list(known), torch.cat(codes)


class _CSV(_File):
    """A CSV file, in memory as text, as one group."""

    def __init__(self, path: Path) -> None:
        from pyarrow import csv, string

        ragged: list[Any] = []

        def skip(row: Any) -> str:
            ragged.extend([row][len(ragged) :])  # the first one; an error that is raised here would be lost
            return "skip"

        self.path = path
        with reading(path), path.open("rb") as file:
            if path.stat().st_size > _MOST_CSV:
                raise DataError(f"{shown(path)}: {path.stat().st_size} bytes, expected {_MOST_CSV} at most; {_SMALLER}")
            line = file.readline(_LONGEST_LINE)
            if line.count(b",") >= _MOST_COLUMNS or len(line) == _LONGEST_LINE:
                raise ValueError(f"its first line is too long; expected names of {_MOST_COLUMNS} columns at most")
            file.seek(0)
            # Pyarrow prints a traceback of a ragged row that is no text.
            for number, line in enumerate(file, 1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    raise ValueError(f"line {number} is not UTF-8; save the file as UTF-8") from None
            file.seek(0)
            # With threads, rows have no numbers.
            options = csv.ReadOptions(use_threads=False), csv.ParseOptions(invalid_row_handler=skip)
            names = csv.open_csv(file, *options).schema.names
            if len(set(names)) < len(names):
                raise ValueError(f"two columns are named {quoted(Counter(names).most_common(1)[0][0])}")
            if all(map(_is_number, names)):
                raise ValueError("its first line holds numbers; expected the names of the columns")
            file.seek(0)
            as_text = csv.ConvertOptions(column_types=dict.fromkeys(names, string()), strings_can_be_null=True)
            self._table = csv.read_csv(file, *options, as_text)
        for row in ragged:
            where = f"row {row.number - 2} (from 0)"  # pyarrow counts from 1, and the line of names
            found = f"{row.actual_columns} values, expected {row.expected_columns}"
            raise DataError(f"{shown(path)}: {where} has {found}: {quoted(row.text)}")
        self.names, self.sizes = self._table.column_names, [len(self._table)]

    def read(self, name: str, group: int) -> pyarrow.ChunkedArray:
        return self._table.column(name)

    def is_numeric(self, name: str) -> bool:
        first = next((one.as_py() for one in self._table.column(name) if one.is_valid), "")
        return _is_number(first)

    def labels(self, name: str) -> tuple[list[Label], Tensor]:
        values, codes = super().labels(name)
        try:
            return [int(value) for value in values], codes
        except ValueError:
            return values, codes


class _Parquet(_File):
    """A Parquet file, in its row groups."""

    def __init__(self, path: Path) -> None:
        from pyarrow import parquet

        self.path = path
        with reading(path):
            self._file: Any = parquet.ParquetFile(path, page_checksum_verification=True)
            metadata = self._file.metadata
            self.sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._types = {field.name: field.type for field in self._file.schema_arrow}
            self.names = self._file.schema_arrow.names
            if len(self._types) < len(self.names):
                raise ValueError(f"two columns are named {quoted(Counter(self.names).most_common(1)[0][0])}")
            if len(self.names) > _MOST_COLUMNS:
                raise ValueError(f"{len(self.names)} columns; expected {_MOST_COLUMNS} at most")
            if min(self.sizes, default=0) < 0 or sum(self.sizes) > _MOST_ROWS:
                raise ValueError(f"{sum(self.sizes)} rows; expected {_MOST_ROWS} at most")

    def read(self, name: str, group: int) -> pyarrow.ChunkedArray:
        described = self._file.metadata.row_group(group)
        chunks = [described.column(one) for one in range(described.num_columns)]
        size = sum(one.total_uncompressed_size for one in chunks if one.path_in_schema == name)
        if size > _MOST_GROUP:
            raise ValueError(f"{size} bytes in a row group, expected {_MOST_GROUP} at most; {_SMALLER}")
        return self._file.read_row_group(group, columns=[name]).column(name)

    def is_numeric(self, name: str) -> bool:
        import pyarrow

        kinds = ("is_integer", "is_floating", "is_decimal", "is_boolean")
        return any(getattr(pyarrow.types, kind)(self._types[name]) for kind in kinds)


class _Rows(Samples):
    """The rows of a table as float64, of which some groups are kept decoded.

    Args:
        file: the table.
        features: the columns of the values.
        label: the column of the labels; None if there are none.
        context: by entry, the columns of the context: numbers, or values of which each is a class, with a one at its
            place.
        like: the training part, whose classes these rows have too; None for that itself.

    Attributes:
        classes: the different labels, in order.
        are_numbers: by entry of the context, for each of its numbers, whether it is one in the table.
    """

    def __init__(
        self,
        file: _File,
        features: Sequence[str],
        label: str | None,
        context: Mapping[str, Sequence[str]],
        like: _Rows | None = None,
    ) -> None:
        given = list(dict.fromkeys(name for names in context.values() for name in names))
        for name in (*features, *given, *([] if label is None else [label])):
            if name not in file.names:
                raise DataError(f"{shown(file.path)}: no column {quoted(name)}; it has {file.listed}")
        if not sum(file.sizes):
            raise DataError(f"{shown(file.path)}: no rows")
        self._file, self._features, self._context = file, features, context
        numeric = [name for name in given if (like._file if like else file).is_numeric(name)]
        self._columns = [*features, *numeric]
        size = max(file.sizes) * len(self._columns) * 8
        if size > _MOST_GROUP:
            found = f"{size} bytes of numbers that are read together, expected {_MOST_GROUP} at most"
            raise DataError(f"{shown(file.path)}: {found}; {_SMALLER}")
        self._window = max(1, _WINDOW // size)
        # Those of a window, and of the next one, which a batch may touch too.
        self._decoded = functools.lru_cache(2 * self._window)(self._decode)
        self.classes: tuple[Label, ...] = ()
        if label is not None:
            self.classes, self.labels = self._coded(label, None if like is None else like.classes)
        self._coded_context: dict[str, tuple[tuple[Label, ...], Tensor]] = {
            name: self._coded(name, None if like is None else like._coded_context[name][0])
            for name in given
            if name not in numeric
        }
        self.are_numbers = {
            entry: [
                number
                for name in names
                for number in ([False] * len(self._coded_context[name][0]) if name in self._coded_context else [True])
            ]
            for entry, names in context.items()
        }
        for group in range(len(file.sizes)):  # what is damaged is said before the training
            self._decoded(group)

    def _coded(self, name: str, classes: tuple[Label, ...] | None) -> tuple[tuple[Label, ...], Tensor]:
        """The classes of a column, and that of each row."""
        values, codes = self._file.labels(name)
        place = self._file.place(name)
        classes = classes_of(values, place) if classes is None else classes
        return classes, as_classes(values, codes, classes, place)

    def _decode(self, group: int) -> NDArray[np.float64]:
        """The numbers of a group, ``(rows, columns)``."""
        found = np.empty((self._file.sizes[group], len(self._columns)))
        for position, name in enumerate(self._columns):
            found[:, position] = self._file.numbers(name, group)
        return found

    def __len__(self) -> int:
        return self._file.starts[-1]

    def take(self, positions: Tensor) -> Batch:
        starts = np.array(self._file.starts)
        wanted = positions.numpy()
        groups = np.searchsorted(starts[1:], wanted, side="right")
        found = np.empty((len(wanted), len(self._columns)))
        for group in np.unique(groups):
            here = groups == group
            found[here] = self._decoded(int(group))[wanted[here] - starts[group]]
        numbers = torch.from_numpy(found)
        values = numbers[:, : len(self._features)]
        columns = {name: numbers[:, i, None] for i, name in enumerate(self._columns)}
        for name, (classes, codes) in self._coded_context.items():
            columns[name] = torch.nn.functional.one_hot(codes[positions], len(classes)).to(values)
        context = {entry: torch.cat([columns[name] for name in names], 1) for entry, names in self._context.items()}
        return Batch(values, None if self.labels is None else self.labels[positions], named(context))

    def order(self, generator: torch.Generator) -> Tensor:
        """The rows in random order: the groups are shuffled, then the rows of some groups at a time.

        So many groups as 128 MiB hold are shuffled together: batches then touch no others, whatever the table's size.
        """
        starts = self._file.starts
        windows = []
        for groups in torch.split(torch.randperm(len(self._file.sizes), generator=generator), self._window):
            rows = torch.cat([torch.arange(starts[group], starts[group + 1]) for group in groups.tolist()])
            windows.append(rows[torch.randperm(len(rows), generator=generator)])
        return torch.cat(windows)


class _Standardized(Changed):
    """Rows whose features, and then context, become ``(x - shift) / scale`` in PyTorch's default dtype."""

    def __init__(self, samples: Samples, shift: Tensor, scale: Tensor) -> None:
        super().__init__(samples)
        self._shift, self._scale = shift, scale

    def change(self, batch: Batch) -> Batch:
        found = ((_numbers_of(batch) - self._shift) / self._scale).to(torch.get_default_dtype())
        values, *context = torch.split(found, [one.shape[1] for one in (batch.values, *entries(batch.context))], dim=1)
        return batch._replace(values=values, context=with_entries(batch.context, context))


def _numbers_of(batch: Batch) -> Tensor:
    """The features and the context side by side."""
    return torch.cat([batch.values, *entries(batch.context)], dim=1)


def _moments(samples: Samples, rows: _Rows) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of each feature and number of the context, in one pass.

    A constant has the deviation 1, and a one at the place of a class stays as it is: mean 0, deviation 1. Chan et al.,
    "Algorithms for computing the sample variance" (1983): the moments of chunks are combined.
    """
    one = samples.first(1)
    first, context = _numbers_of(one)[0], one.context
    count, mean, squares = 0, torch.zeros_like(first), torch.zeros_like(first)
    varies = torch.zeros_like(first, dtype=torch.bool)
    for positions in torch.split(torch.arange(len(samples)), _CHUNK):
        some = _numbers_of(samples.take(positions))
        here = some.mean(0)
        total, apart = count + len(some), here - mean
        squares += (some - here).square().sum(0) + apart.square() * count * len(some) / total
        mean += apart * len(some) / total
        count = total
        varies |= (some != first).any(0)  # rounding gives a constant a deviation, too
    deviation = (squares / count).sqrt()
    shifted = [True] * one.values.shape[1]
    for entry in sorted(context) if isinstance(context, dict) else [""] * (context is not None):
        width = (context if entry == "" else context[entry]).shape[1]
        shifted += rows.are_numbers.get(entry, [False] * width)  # labels are none
    changes = torch.tensor(shifted)
    return torch.where(changes, mean, 0.0), torch.where(changes & varies & (deviation > 0), deviation, 1.0)


def _open(path: Path) -> _File:
    """The table in a file, by the ending of its name."""
    kinds: dict[str, type[_CSV | _Parquet]] = {".csv": _CSV, ".parquet": _Parquet, ".pq": _Parquet}
    kind = kinds.get(path.suffix.lower())
    if kind is None or not path.is_file():
        raise DataError(f"{shown(path)}: expected a file that ends in {', '.join(kinds)}")
    try:
        import pyarrow  # noqa: F401 - the sources that need no tables work without
    except ImportError:
        raise DataError("table needs pyarrow, which is not installed: pip install 'invflow[table]'") from None
    return kind(path)


def _is_number(text: str) -> bool:
    """Whether a text is a number, or what stands for one that is missing."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _first_without_number(texts: pyarrow.ChunkedArray) -> int:
    """The row of the first text that is no number, of which there is one, by bisection."""
    import pyarrow

    first, last = 0, len(texts)
    while last - first > 1:
        middle = (first + last) // 2
        try:
            texts.slice(first, middle - first).cast(pyarrow.float64())
        except pyarrow.ArrowException:
            last = middle
        else:
            first = middle
    return first
