"""Arrays in files of numpy and of safetensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..context import Context, each_entry, entries, named, shape_of_context
from ..errors import DataError
from ..fields import cut, quoted
from ..registry import register_data
from ..samples import Batch, DataSet, InMemory
from ..source import Request, Source, require_within, shown
from .reading import Label, as_classes, classes_of, reading, require_finite

Array: TypeAlias = Tensor | NDArray[Any]

_LEVELS = 256
_VALUES, _LABELS = ("values", "x", "x_train"), ("labels", "y", "y_train")
_TEST_VALUES, _TEST_LABELS = ("test_values", "x_test"), ("test_labels", "y_test")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_UNPACKED = 2**31  # bytes of a compressed array: a file of 2 MB can unpack to as many
_ENDINGS = (".npz", ".npy", ".safetensors")


@register_data("arrays")
class Arrays(Source):
    """Arrays ``(n, ...)`` of a file .npz, .npy or .safetensors, or of a folder of .npy files.

    That of a .npy file is called values; those in a folder are called as their files. Images are uint8 of shape
    ``(n, height, width)`` or ``(n, channels, height, width)``, other values are floats.

    Args:
        path: the file or the folder, relative to the spec or to the data root.
        values: the name of the array of values; null: values, x or x_train.
        labels: that of the labels, which are integers or strings; null: labels, y or y_train, if there.
        test_path: a file with the test part, whose arrays have the same names; null: the test part is in the same file.
        test_values: the name of the test part's values; null: test_values or x_test, if there.
        test_labels: that of its labels; null: test_labels or y_test.
    """

    def __init__(
        self,
        path: str,
        values: str | None = None,
        labels: str | None = None,
        test_path: str | None = None,
        test_values: str | None = None,
        test_labels: str | None = None,
    ) -> None:
        self.path = path
        self.values = values
        self.labels = labels
        self.test_path = test_path
        self.test_values = test_values
        self.test_labels = test_labels

    def load(self, request: Request) -> DataSet:
        file, context = _File(request.find(self.path)), request.named_context
        values = self.values or file.first(_VALUES) or _VALUES[0]
        # Floats of that name are numbers to predict; as context they may be given.
        given = [name for names in context.values() for name in names]
        labels = self.labels or file.first(name for name in _LABELS if name not in given and file.has_labels(name))
        parts = [_Part.read(file, values, labels, context)]
        if self.test_path is not None:
            file = _File(request.find(self.test_path))
            test_values: str | None = self.test_values or file.first((values, *_TEST_VALUES)) or values
            test_labels = self.test_labels or file.first((labels or "", *_TEST_LABELS)) or labels
        else:
            test_values = self.test_values or file.first(_TEST_VALUES)
            test_labels = self.test_labels or file.first(_TEST_LABELS) or _TEST_LABELS[0]
            context = {entry: tuple(f"test_{name}" for name in names) for entry, names in context.items()}
        if test_values is not None:
            parts.append(_Part.read(file, test_values, labels and test_labels, context))
        first = parts[0]
        for part in parts:
            if part.form != first.form:
                raise DataError(f"{part.place}: {part.form}, but the training part has {first.form}")
        classes = () if first.labels is None else classes_of(first.labels[0], first.place)
        levels = None if first.values.is_floating_point() else _LEVELS
        samples = [part.samples(classes) for part in parts]
        return request.data_set(*samples, levels=levels, class_names=[str(one) for one in classes])


class _File:
    """The arrays of a file, each of which is read when it is asked for.

    Args:
        path: of the file, or of a folder of .npy files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: dict[str, Callable[[], Array]] = {}
        with reading(path):
            if path.is_dir():
                for file in sorted(path.glob("*.npy")):
                    require_within(path, file)
                    self._read[file.stem] = partial(_mapped, file)
            elif not path.is_file() or path.suffix not in _ENDINGS:
                raise DataError(f"{shown(path)}: expected a file that ends in {', '.join(_ENDINGS)}, or a folder")
            elif path.suffix == ".npy":
                self._read[_VALUES[0]] = partial(_mapped, path)
            elif path.suffix == ".npz":
                self._open_npz()
            else:
                self._open_safetensors()
        self._found: dict[str, Array] = {}

    def _open_npz(self) -> None:
        import zipfile

        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name != info.filename:
                    self._read[name] = partial(_unpacked, self.path, info)

    def _open_safetensors(self) -> None:
        from safetensors import safe_open

        opened: Any = safe_open(self.path, framework="pt")
        for name in opened.keys():  # noqa: SIM118 - it is no dict
            self._read[name] = partial(opened.get_tensor, name)

    def first(self, names: Iterable[str]) -> str | None:
        """The first of some names that an array has."""
        return next((name for name in names if name in self._read), None)

    def place(self, name: str) -> str:
        """What messages call an array."""
        return f"{shown(self.path)}: {quoted(name)}"

    def array(self, name: str) -> Array:
        """An array that is not empty. Raises DataError."""
        if name not in self._read:
            there = cut(", ".join(map(quoted, self._read)), 200) or "nothing"
            raise DataError(f"{shown(self.path)}: no array {quoted(name)}; it has {there}")
        if name not in self._found:
            with reading(self.path, part=quoted(name)):
                self._found[name] = self._read[name]()
        found = self._found[name]
        if not found.ndim or not math.prod(found.shape):
            raise DataError(f"{self.place(name)}: is empty, of shape {tuple(found.shape)}")
        return found

    def tensor(self, name: str) -> Tensor:
        """An array of numbers, ``(n, ...)`` with at least one dimension beside the rows. Raises DataError."""
        found = self.array(name)
        if isinstance(found, np.ndarray):
            if found.dtype.kind == "U":
                raise DataError(f"{self.place(name)}: expected numbers, got strings")
            with reading(self.path, part=quoted(name)):  # PyTorch has neither long doubles nor other byte orders
                found = torch.from_numpy(found.astype(found.dtype.newbyteorder("="), copy=False))
        if found.is_floating_point():
            if found.dtype not in _FLOATS:
                raise DataError(f"{self.place(name)}: expected float16, float32 or float64, got {found.dtype}")
            require_finite(found, self.place(name))
        return found.unsqueeze(1) if found.ndim == 1 else found

    def values(self, name: str) -> Tensor:
        """Images ``(n, channels, height, width)``, uint8, or floats ``(n, ...)``. Raises DataError."""
        found = self.tensor(name)
        if not found.is_floating_point() and (found.dtype != torch.uint8 or found.ndim not in (3, 4)):
            wanted = "floats, or images as uint8 of shape (n, height, width) or (n, channels, height, width)"
            raise DataError(f"{self.place(name)}: expected {wanted}, got {found.dtype} of shape {tuple(found.shape)}")
        return found.unsqueeze(1) if found.dtype == torch.uint8 and found.ndim == 3 else found

    def has_labels(self, name: str) -> bool:
        """Whether there is an array of this name that holds integers or strings."""
        return name in self._read and _is_discrete(self.array(name))

    def labels(self, name: str) -> tuple[list[Label], Tensor]:
        """The different labels, and for each row the position of its label among them. Raises DataError."""
        found = self.array(name)
        if not _is_discrete(found) or found.shape not in ((len(found),), (len(found), 1)):
            got = f"{found.dtype} of shape {tuple(found.shape)}"
            raise DataError(f"{self.place(name)}: expected integers or strings of shape (n,), got {got}")
        labels, codes = np.unique(np.asarray(found).reshape(-1), return_inverse=True)
        return labels.tolist(), torch.from_numpy(codes)

    def context(self, names: Sequence[str]) -> Tensor:
        """Arrays side by side, as floats ``(n, ...)``. Raises DataError."""
        found = [self.tensor(name) for name in names]
        for name, one in zip(names, found, strict=True):
            if len(one) != len(found[0]) or one.shape[2:] != found[0].shape[2:]:
                beside = f"{quoted(names[0])} of shape {tuple(found[0].shape)}"
                raise DataError(f"{self.place(name)}: of shape {tuple(one.shape)} cannot stand beside {beside}")
        found = [one if one.is_floating_point() else one.to(torch.get_default_dtype()) for one in found]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


@dataclass(frozen=True)
class _Part:
    """The arrays of the training part or of the test part.

    Attributes:
        place: where the labels, or else the values, come from.
        values: images or floats.
        labels: see `_File.labels`.
        context: ``(n, ...)``, or several by name.
    """

    place: str
    values: Tensor
    labels: tuple[list[Label], Tensor] | None
    context: Context

    @classmethod
    def read(cls, file: _File, values: str, labels: str | None, context: Mapping[str, Sequence[str]]) -> _Part:
        """The arrays of these names, which have as many rows as each other. Raises DataError."""
        found = cls(
            file.place(labels or values),
            file.values(values),
            None if labels is None else file.labels(labels),
            named({entry: file.context(names) for entry, names in context.items()}),
        )
        rows = {} if found.labels is None or labels is None else {labels: len(found.labels[1])}
        first = [context[entry][0] for entry in sorted(context)]
        rows |= dict(zip(first, map(len, entries(found.context)), strict=True))
        for name, count in rows.items():
            if count != len(found.values):
                raise DataError(f"{file.place(name)}: {count} rows, but {quoted(values)} has {len(found.values)}")
        return found

    @property
    def form(self) -> str:
        """What the values and the context of a sample are, in words."""
        values = f"{'floats' if self.values.is_floating_point() else 'pixels'} of shape {tuple(self.values.shape[1:])}"
        return values + ("" if self.context is None else f", context of shape {shape_of_context(self.context)}")

    def samples(self, classes: Sequence[Label]) -> InMemory:
        """The samples; their labels are positions among the classes."""
        labels = None if self.labels is None else as_classes(*self.labels, classes, self.place)
        return _Floats(self.values, labels, self.context, levels=_LEVELS)


class _Floats(InMemory):
    """Samples of any dtype, which becomes PyTorch's default one when they are taken: they may be larger than memory."""

    def take(self, positions: Tensor) -> Batch:
        found, dtype = super().take(positions), torch.get_default_dtype()
        context = each_entry(lambda entry: entry.to(dtype), found.context)
        return found._replace(values=found.values.to(dtype), context=context)


def _is_discrete(array: Array) -> bool:
    """Whether an array holds integers, truth values or strings."""
    if isinstance(array, Tensor):
        return not array.is_floating_point() and not array.is_complex()
    return array.dtype.kind in "biuU"


def _header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, the order and the dtype that the header of a .npy file claims, which its size has to bear out."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("a structured array; expected numbers or strings")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(stream)
    if dtype.kind not in "biufU":
        raise ValueError(f"it holds {dtype}; expected numbers or strings")
    there, claimed = size - stream.tell(), math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or claimed != there:
        raise ValueError(f"its header claims {claimed} bytes, shape {cut(str(shape))}, and {there} are there")
    return shape, columns_first, dtype


def _mapped(path: Path) -> NDArray[Any]:
    """The array of a .npy file, of which only what is looked at is in memory."""
    with path.open("rb") as stream:
        shape, columns_first, dtype = _header(stream, path.stat().st_size)
        if not math.prod(shape):
            return np.empty(shape, dtype)
        order, offset = "F" if columns_first else "C", stream.tell()
    # Copied on writing, because PyTorch warns of arrays that cannot be written to; nothing writes.
    return np.memmap(path, dtype, mode="c", offset=offset, shape=shape, order=order)  # type: ignore[call-overload,no-any-return]


def _unpacked(path: Path, info: Any) -> NDArray[Any]:
    """An array of a .npz file, from its entry in the archive."""
    import zipfile

    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("compressed in a way that numpy does not write")
    if info.compress_type == zipfile.ZIP_DEFLATED and info.file_size > _MOST_UNPACKED:
        limit = f"{info.file_size} bytes, compressed; expected at most {_MOST_UNPACKED}"
        raise ValueError(f"{limit}: save it uncompressed (numpy.savez), or as .npy")
    with zipfile.ZipFile(path) as archive:
        if info.compress_type == zipfile.ZIP_STORED and info.file_size > path.stat().st_size:
            raise ValueError(f"its entry claims {info.file_size} bytes, more than the file has")
        with archive.open(info) as stream:
            _header(stream, info.file_size)
        with archive.open(info) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
