"""Data that a Python program passes: tensors, arrays, datasets and loaders as a `DataSet`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..context import each_entry, entries
from ..errors import DataError
from ..samples import BYTES, Batch, DataSet, InMemory, Samples, as_batch, joined, of_dtype, one_hot
from ..source import Request, Source

Given: TypeAlias = Any
"""Tensors, arrays, ``(x, y)``, a Dataset, a DataLoader, a LightningDataModule, a DataSet or a Source."""


class OfDataset(Samples):
    """The samples of a map-style Dataset, one by one."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset
        self._length = len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self._length

    def take(self, positions: Tensor) -> Batch:
        return as_batch(default_collate([self._dataset[int(position)] for position in positions]))


class OfLoader(Samples):
    """The samples of a DataLoader, in its own batches and its own order.

    Args:
        loader: the loader.
        *changes: of each batch, one after another.
    """

    def __init__(self, loader: Any, *changes: Callable[[Batch], Batch]) -> None:
        self._loader = loader
        self._changes = changes

    def __len__(self) -> int:
        try:
            return len(self._loader.dataset)
        except (AttributeError, TypeError):
            return sum(len(batch.values) for batch in self.own_batches())

    def own_batches(self) -> Iterable[Batch]:
        return _Batches(self._loader, self._changes)

    def take(self, positions: Tensor) -> Batch:
        raise DataError("the samples of a DataLoader have no positions; pass its Dataset")

    def first(self, count: int) -> Batch:
        found: list[Batch] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a loader that shuffles has the same first ones each time
            for batch in self.own_batches():
                found.append(batch)
                if sum(len(one.values) for one in found) >= count:
                    break
        if not found:
            raise DataError("expected a DataLoader with at least one batch, got one without")
        return joined(found).rows(slice(count))

    def of_dtype(self, dtype: torch.dtype) -> Samples:
        return OfLoader(self._loader, *self._changes, partial(of_dtype, dtype=dtype))

    def with_labels_as_context(self, classes: int, entry: str = "") -> Samples:
        return OfLoader(self._loader, *self._changes, partial(one_hot, classes=classes, entry=entry))


class _Batches:
    """The batches of a loader, whatever it returns; see `OfLoader`."""

    def __init__(self, loader: Any, changes: Sequence[Callable[[Batch], Batch]]) -> None:
        self._loader = loader
        self._changes = changes

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in map(as_batch, self._loader):
            for change in self._changes:
                batch = change(batch)  # noqa: PLW2901 -- the same batch
            yield batch


def data_set(
    given: Given,
    request: Request,
    *,
    test: Given | None = None,
    validation: Given | None = None,
    levels: int | None = None,
    classes: int = 0,
    dtype: torch.dtype = torch.float32,
) -> DataSet:
    """What a program passes, as a data set.

    Args:
        given: the training data or, without test data, all data.
        request: the sizes, the split, and "labels" if these are the context.
        test: the test data; None to take a part of the data at random.
        validation: the validation data; None for those that the request asks for.
        levels: the number of grey levels of pixels; None: 256 for bytes, and none for any other numbers.
        classes: the number of classes that the model knows; there may be more in the data.
        dtype: that of the model, to which arrays of floats are converted.

    Raises:
        DataError: the data are of an unknown kind, empty, not finite, or do not match.
    """
    if isinstance(given, DataSet):
        return given
    if isinstance(given, Source):
        return given.load(request)
    parts = [None if one is None else samples_of(one, levels, dtype) for one in (given, test, validation)]
    if isinstance(given, LightningDataModule):
        parts = [None if one is None else OfLoader(one) for one in _loaders(given)]
    train, tested, validated = parts
    assert train is not None
    levels = getattr(train, "levels", levels)
    names = class_names([part for part in parts if part is not None], classes)
    if train.own_batches() is None:
        return request.data_set(train, tested, validated, levels=levels, class_names=names)
    if tested is None:
        raise DataError("fit expects test=, the test data, along with a DataLoader, whose samples cannot be split")
    found = DataSet(request.name, train, tested, validated, levels, class_names=names)
    return request.with_labels_as_context(found)


def samples_of(given: Given, levels: int | None = None, dtype: torch.dtype = torch.float32) -> Samples:
    """What a program passes, as samples; see `data_set`."""
    if isinstance(given, Samples):
        return given
    if isinstance(given, DataLoader):
        return OfLoader(given)
    if isinstance(given, IterableDataset):
        raise DataError("an IterableDataset has no positions; pass a DataLoader of it, and test=, one of the test data")
    if isinstance(given, Dataset):
        return OfDataset(given)
    if isinstance(given, LightningDataModule):
        return OfLoader(_loaders(given)[0])
    values, labels, context = _sound(as_batch(given), dtype)
    if levels is None and values.dtype == torch.uint8:
        levels = BYTES
    return InMemory(values, labels, context, levels=levels)


def class_names(parts: Sequence[Samples], classes: int = 0) -> tuple[str, ...]:
    """The classes 0, 1, ..., of which there are so many, or more if a label says so; none if there are no labels."""
    known = [part.labels for part in parts if part.labels is not None]
    if not known and parts[0].first(1).labels is None:
        return ()
    return tuple(map(str, range(max([classes, *(int(labels.max()) + 1 for labels in known if len(labels))]))))


def _loaders(module: LightningDataModule) -> list[Any]:
    """The loaders of training, test and validation samples; validation samples are the test samples if these miss."""
    module.prepare_data()
    found: list[Any] = []
    for stage, name in (("fit", "train_dataloader"), ("fit", "val_dataloader"), ("test", "test_dataloader")):
        if type(module).__dict__.get(name, getattr(LightningDataModule, name)) is getattr(LightningDataModule, name):
            found.append(None)
            continue
        module.setup(stage)
        found.append(getattr(module, name)())
    train, validation, test = found
    if train is None or (test is None and validation is None):
        raise DataError(f"{type(module).__name__}: expected a train_dataloader, and a test_ or val_dataloader")
    return [train, validation, None] if test is None else [train, test, validation]


def _sound(batch: Batch, dtype: torch.dtype) -> Batch:
    """Arrays as samples in memory. Raises DataError if they are empty, not finite, or of different lengths."""
    if batch.values.dim() < 2 or not batch.values.numel():
        raise DataError(f"values: expected at least one sample, in rows, got shape {tuple(batch.values.shape)}")
    several = [(name, one) for name, whole in batch._asdict().items() for one in entries(whole)]
    for name, one in several:
        if one.dim() < (1 if name == "labels" else 2):
            raise DataError(f"{name}: expected one row per sample, got an array of shape {tuple(one.shape)}")
        if len(one) != len(batch.values):
            raise DataError(f"{name}: expected {len(batch.values)} rows, as there are samples, got {len(one)}")
        wrong = (~one.reshape(len(one), -1).isfinite().all(1)).nonzero()
        if len(wrong):
            raise DataError(f"{name}: NaN or infinite in {len(wrong)} of {len(one)} rows, first in row {int(wrong[0])}")
    labels, context = batch.labels, batch.context
    if labels is not None and (labels.is_floating_point() or int(labels.min()) < 0):
        raise DataError(f"labels: expected classes counted from 0, got {labels.min().item()}")
    values = batch.values.to(dtype) if batch.values.is_floating_point() else batch.values
    return Batch(values, None if labels is None else labels.long(), each_entry(lambda entry: entry.to(dtype), context))
