"""Samples: what a model learns from or is measured on, wherever they are kept, and the data sets that they form."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .context import Context, ContextShape, each_entry, entries, named, shape_of_context, with_entries
from .errors import DataError

BYTES = 256
"""The number of grey levels of pixels that are bytes."""


class Batch(NamedTuple):
    """Some samples.

    Attributes:
        values: images ``(batch, channels, height, width)``, or any tensor of the shape that a model takes.
        labels: classes, counted from 0, ``(batch,)``; None if there are none.
        context: what the model is given along with the values, ``(batch, ...)``, or several by name; None if there is
            none.

    Examples:
        >>> import torch
        >>> Batch(torch.zeros(3, 2), torch.tensor([0, 1, 0])).labels.tolist()
        [0, 1, 0]
    """

    values: Tensor
    labels: Tensor | None = None
    context: Any = None

    def rows(self, chosen: slice | Tensor) -> Batch:
        """Some of these samples."""
        return Batch(*(each_entry(lambda one: one[chosen], one) for one in self))

    def to(self, device: torch.device) -> Batch:
        """The samples on a device."""
        return Batch(*(each_entry(lambda one: one.to(device), one) for one in self))


def as_batch(given: Any) -> Batch:
    """A batch as somebody's loader returns it: values, ``(x, y)``, ``(x, y, context)``, or a dict of `Batch`'s names.

    A second entry of integers, one per sample, is the labels; any other one is the context.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(given, Batch):
        return given
    if isinstance(given, Mapping):
        if not {"values"} <= set(given) <= set(Batch._fields):
            keys = ", ".join(sorted(map(str, given)))
            raise DataError(f"a batch that is a dict is expected to have values, labels and context, got {keys}")
        return Batch(**{name: _tensors(name, one) for name, one in given.items() if one is not None})
    if isinstance(given, tuple | list):
        if not 1 <= len(given) <= len(Batch._fields):
            raise DataError(f"a batch is expected to be x, (x, y) or (x, y, context), got {len(given)} entries")
        values, *rest = (None if one is None else _tensors("data", one) for one in given)
        if values is None:
            raise DataError("a batch is expected to begin with its values, got None")
        if len(rest) == 1 and rest[0] is not None and not _are_labels(rest[0]):
            return Batch(values, None, rest[0])
        return Batch(values, *rest)
    return Batch(_tensor("data", given))


def _tensors(name: str, given: Any) -> Any:
    """An entry of a batch; a dict is a context with names."""
    if isinstance(given, Mapping):
        return {str(key): _tensor(f"{name} {key!r}", one) for key, one in given.items()}
    return _tensor(name, given)


def _tensor(name: str, given: Any) -> Tensor:
    if isinstance(given, Tensor):
        return given
    if isinstance(given, np.ndarray) and given.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(given))
    came = f"an array of {given.dtype}" if isinstance(given, np.ndarray) else type(given).__name__
    raise DataError(f"{name}: expected numbers, as a tensor or a numpy array, got {came}")


def _are_labels(one: Any) -> bool:
    return isinstance(one, Tensor) and one.dim() == 1 and not one.is_floating_point() and not one.is_complex()


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches one after another, all with the same entries."""
    columns = (zip(*map(entries, several), strict=True) for several in zip(*batches, strict=True))
    return Batch(*(with_entries(one, map(torch.cat, column)) for one, column in zip(batches[0], columns, strict=True)))


def one_hot(batch: Batch, classes: int, entry: str = "") -> Batch:
    """The same samples, with a one at the place of their class as context, or as its entry, ``(batch, classes)``."""
    if batch.labels is None:
        raise DataError('expected labels to be the context, as "context": "labels" asks, got samples without')
    found = torch.nn.functional.one_hot(batch.labels.long(), classes).to(batch.values)
    others = batch.context if entry and batch.context is not None else {}
    return batch._replace(context=named({**others, entry: found}))


def of_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """The same samples with values and contexts of a dtype."""
    return batch._replace(values=batch.values.to(dtype), context=each_entry(lambda one: one.to(dtype), batch.context))


class Samples(Dataset[Batch], ABC):
    """Samples that are taken by their positions, a batch at a time.

    Attributes:
        labels: of all samples, ``(n,)``; None if there are none.
    """

    labels: Tensor | None = None
    slow: bool = False
    """Whether taking a batch takes long, so that other processes had better do it."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples."""

    @abstractmethod
    def take(self, positions: Tensor) -> Batch:
        """The samples at these positions.

        Raises:
            DataError: a file cannot be read.
        """

    def __getitem__(self, positions: Tensor) -> Batch:
        return self.take(positions)

    def first(self, count: int) -> Batch:
        """The first samples, all of them if there are fewer."""
        return self.take(torch.arange(min(count, len(self))))

    def all(self) -> Batch:
        """All samples, in memory."""
        return self.first(len(self))

    def order(self, generator: torch.Generator) -> Tensor:
        """The positions of all samples in a random order, in which a training takes them."""
        return torch.randperm(len(self), generator=generator)

    def own_batches(self) -> Iterable[Batch] | None:
        """All samples in batches and an order of their own; None if they are taken by their positions."""
        return None

    def of_dtype(self, dtype: torch.dtype) -> Samples:
        """The same samples, with values and contexts of a dtype."""
        return _OfDtype(self, dtype)

    def with_labels_as_context(self, classes: int, entry: str = "") -> Samples:
        """The same samples, with their classes as context, or as an entry of it."""
        return _LabelsAsContext(self, classes, entry)


class InMemory(Samples):
    """Samples that are tensors in memory.

    Args:
        values: ``(n, ...)``; integers are grey levels, to be divided by their number.
        labels: ``(n,)``.
        context: ``(n, ...)``.
        levels: the number of grey levels, for integers.

    Examples:
        >>> samples = InMemory(torch.tensor([[0], [64], [128]], dtype=torch.uint8), levels=256)
        >>> samples.take(torch.tensor([2, 1])).values.tolist()
        [[0.5], [0.25]]
    """

    def __init__(
        self, values: Tensor, labels: Tensor | None = None, context: Context = None, *, levels: int | None = None
    ) -> None:
        self._all = Batch(values, labels, context)
        self.levels = levels
        self.labels = labels

    def __len__(self) -> int:
        return len(self._all.values)

    def take(self, positions: Tensor) -> Batch:
        found = self._all.rows(positions)
        if found.values.is_floating_point():
            return found
        return found._replace(values=found.values / (self.levels or 1))  # of the default dtype


class Subset(Samples):
    """Some of other samples.

    Args:
        samples: the others.
        positions: which of them, ``(n,)``.
    """

    def __init__(self, samples: Samples, positions: Tensor) -> None:
        self._samples = samples
        self._positions = positions
        self.slow = samples.slow
        self.labels = None if samples.labels is None else samples.labels[positions]

    def __len__(self) -> int:
        return len(self._positions)

    def take(self, positions: Tensor) -> Batch:
        return self._samples.take(self._positions[positions])

    def order(self, generator: torch.Generator) -> Tensor:
        if type(self._samples).order is Samples.order:
            return super().order(generator)
        # The others' own order, in which those that are stored together come together.
        place = torch.full((len(self._samples),), -1)
        place[self._positions] = torch.arange(len(self))
        found = place[self._samples.order(generator)]
        return found[found >= 0]


class Changed(Samples):
    """Other samples, changed when they are taken.

    Args:
        samples: the others.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.slow = samples.slow
        self.labels = samples.labels

    @abstractmethod
    def change(self, batch: Batch) -> Batch:
        """Some of the samples, changed."""

    def __len__(self) -> int:
        return len(self._samples)

    def take(self, positions: Tensor) -> Batch:
        return self.change(self._samples.take(positions))

    def order(self, generator: torch.Generator) -> Tensor:
        return self._samples.order(generator)


class _OfDtype(Changed):
    """Samples whose numbers, classes left out, are of another dtype."""

    def __init__(self, samples: Samples, dtype: torch.dtype) -> None:
        super().__init__(samples)
        self._dtype = dtype

    def change(self, batch: Batch) -> Batch:
        return of_dtype(batch, self._dtype)


class _LabelsAsContext(Changed):
    """Samples whose context, or an entry of it, is their class, ``(batch, classes)``, with a one at its place."""

    def __init__(self, samples: Samples, classes: int, entry: str) -> None:
        super().__init__(samples)
        self._classes = classes
        self._entry = entry

    def change(self, batch: Batch) -> Batch:
        return one_hot(batch, self._classes, self._entry)


@dataclass(frozen=True)
class DataSet:
    """Samples to learn from and samples to measure on.

    Attributes:
        name: what messages call it.
        train: the samples to learn from.
        test: the samples to measure on.
        validation: the samples by which the best weights are chosen; None if the test samples do that.
        levels: the pixels of images are integer multiples of 1/levels; None for values that are real numbers.
        high: dequantised pixels lie in [0, high].
        class_names: one per class; empty if there are no labels.
    """

    name: str
    train: Samples
    test: Samples
    validation: Samples | None = None
    levels: int | None = None
    high: float = 1.0
    class_names: tuple[str, ...] = ()

    @functools.cached_property
    def _one(self) -> Batch:
        return self.train.first(1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, such as (channels, height, width) or (features,)."""
        return tuple(self._one.values.shape[1:])

    @property
    def context_shape(self) -> ContextShape:
        """The shape of the context of one sample; None if there is none."""
        return shape_of_context(self._one.context)

    @property
    def classes(self) -> int:
        """The number of classes; 0 if there are no labels."""
        return len(self.class_names)

    @property
    def holds_images(self) -> bool:
        """Whether the samples are images, pixels on a grid."""
        return self.levels is not None

    @property
    def judge(self) -> tuple[str, Samples]:
        """The samples by which the best weights are chosen, and the name that logs have for them."""
        return ("test", self.test) if self.validation is None else ("val", self.validation)

    def with_labels_as_context(self, entry: str = "") -> DataSet:
        """The same samples, with their classes as context, or as an entry of it.

        Raises:
            DataError: there are no labels.
        """
        if not self.classes:
            raise DataError(f'{self.name} has no labels to be the context, as "context": "labels" asks')

        return self.changed(lambda samples: samples.with_labels_as_context(self.classes, entry))

    def of_dtype(self, dtype: torch.dtype | None) -> DataSet:
        """The same samples with values and contexts of a dtype; None for any."""
        if dtype is None or dtype == self._one.values.dtype:
            return self
        return self.changed(lambda samples: samples.of_dtype(dtype))

    def changed(self, change: Callable[[Samples], Samples]) -> DataSet:
        """The same data set with each of its parts changed."""
        validation = None if self.validation is None else change(self.validation)
        return replace(self, train=change(self.train), test=change(self.test), validation=validation)

    @classmethod
    def without_samples(cls, shape: tuple[int, ...], levels: int | None = None, classes: int = 0) -> DataSet:
        """A data set that only says of what shape its samples would be."""
        nothing = InMemory(torch.zeros(0, *shape), torch.zeros(0, dtype=torch.long))
        names = tuple(map(str, range(classes)))
        return cls("nothing", nothing, nothing, nothing, levels, class_names=names)

    def __repr__(self) -> str:
        sizes = f"{len(self.train)} training, {len(self.test)} test"
        more = f", {len(self.validation)} validation" if self.validation is not None else ""
        classes = f", {self.classes} classes" if self.classes else ""
        context = f", context {self.context_shape}" if self.context_shape else ""
        return f"DataSet({self.name}: {sizes}{more} samples of shape {self.shape}{classes}{context})"
