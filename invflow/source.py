"""The contract of sources, from which a spec takes its data."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from .arguments import one_line
from .errors import DataError
from .samples import DataSet, Samples, Subset

DATA_VARIABLE = "INVFLOW_DATA"
TEST_FRACTION = 0.2
"""The part of samples without a given split that becomes the test part."""

LABELS = "labels"
Origin: TypeAlias = str | tuple[str, ...]
"""What a context, or an entry of it, comes from: the labels, or what else a source has."""

Size: TypeAlias = int | float | None
"""A number of samples, a fraction of those that there are, or all of them."""


@dataclass(frozen=True)
class Request:
    """What a spec asks of a source, and where files may be.

    Attributes:
        name: the source's tag.
        train_size: of the training part, the first samples.
        test_size: likewise of the test part. A source without test samples gives some up, at random; None: a fifth.
        validation_size: taken from the training samples at random; None for no validation.
        split_seed: draws the parts that are taken at random.
        context: what the context is: "labels", or the name of something that the source has, or several, which stand
            side by side; or any of these for each entry of a context that has names.
        folder: the folder of the spec; None if it has none.
        root: the data root; None for the folder in the environment variable INVFLOW_DATA.
        download: whether what is missing may be downloaded into the root.
    """

    name: str
    train_size: Size = None
    test_size: Size = None
    validation_size: Size = None
    split_seed: int = 0
    context: Origin | Mapping[str, Origin] | None = None
    folder: Path | None = None
    root: Path | None = None
    download: bool = False

    @property
    def data_root(self) -> Path:
        """The data root: the one that was given, or that of the environment, or ``data``."""
        return self.root or Path(os.environ.get(DATA_VARIABLE, "data"))

    @property
    def named_context(self) -> dict[str, tuple[str, ...]]:
        """By entry, the names of what the source shall give as context, without the labels: see `context.named`.

        Raises:
            DataError: an entry names something twice.
        """
        found = {}
        for entry, origin in self._origins.items():
            names = (origin,) if isinstance(origin, str) else tuple(origin)
            if len(set(names)) < len(names):
                twice = next(one for one in names if names.count(one) > 1)
                raise DataError(f"{self.name}: context names {twice!r} twice")
            if origin != LABELS:
                found[entry] = names
        return found

    @property
    def _origins(self) -> Mapping[str, Origin]:
        if self.context is None:
            return {}
        return self.context if isinstance(self.context, Mapping) else {"": self.context}

    def find(self, path: str) -> Path:
        """A file or a folder below the spec's folder or the data root, named relative to it.

        Raises:
            DataError: it does not exist, or it is not below either.
        """
        if not path or Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
            raise DataError(f"{self.name} expects a path relative to the spec or to the data root, got {path!r}")
        bases = [base for base in (self.folder, self.data_root) if base is not None]
        for base in bases:
            if os.path.exists(base / path):  # noqa: PTH110 - Path.exists raises for names that are too long
                require_within(base, base / path)
                return base / path
        where = " or ".join(dict.fromkeys(map(str, bases)))
        fix = f"name the folder that holds it with --data-root or {DATA_VARIABLE}"
        raise DataError(f"{self.name}: no {shown(Path(path))} in {where}; {fix}")

    def data_set(
        self,
        train: Samples,
        test: Samples | None = None,
        validation: Samples | None = None,
        *,
        levels: int | None = None,
        high: float = 1.0,
        class_names: Sequence[str] = (),
    ) -> DataSet:
        """The parts of a source's samples that the spec asks for, with the context that it asks for.

        Args:
            train: the training samples; all samples, if there are no test samples.
            test: the test samples; None to take them from the training samples.
            validation: the validation samples, if the source has some; None to take those that the spec asks for from
                the training samples.
            levels: as in `DataSet`.
            high: as in `DataSet`.
            class_names: as in `DataSet`.

        Raises:
            DataError: there are not so many samples, or not this context.
        """
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.split_seed))
        if test is None:
            count = self.count("", len(train), TEST_FRACTION if self.test_size is None else self.test_size)
            test, order = _part(train, order[:count]), order[count:]
        else:
            test = self._cut("test ", test, torch.arange(len(test)), self.test_size)
        if validation is None and self.validation_size is not None:
            count = self.count("training ", len(order), self.validation_size)
            validation, order = _part(train, order[:count]), order[count:]
        elif validation is not None:
            validation = self._cut("validation ", validation, torch.arange(len(validation)), self.validation_size)
        if len(order) == len(train):  # nothing was taken: the first ones
            order = torch.arange(len(train))
        train = self._cut("training ", train, order, self.train_size)
        found = DataSet(self.name, train, test, validation, levels, high, tuple(class_names))
        return self.with_labels_as_context(found)

    def with_labels_as_context(self, found: DataSet) -> DataSet:
        """A data set with the labels as the context, or as the entries of it, that the spec asks for.

        Raises:
            DataError: there are no labels, or the source gave no other context that the spec asks for.
        """
        if self.named_context and found.context_shape is None:
            raise DataError(f'{self.name} has no context {self.context!r}; there is "labels"')
        for entry, origin in self._origins.items():
            if origin == LABELS:
                found = found.with_labels_as_context(entry)
        return found

    def _cut(self, kind: str, samples: Samples, order: Tensor, size: Size) -> Samples:
        """The first samples of an order."""
        count = self.count(kind, len(order), size)
        return samples if count == len(samples) else _part(samples, order[:count])

    def count(self, kind: str, there: int, size: Size) -> int:
        """The number of samples for a size, of so many. Raises DataError if it is 0 or too large."""
        if isinstance(size, int) and size > there:
            raise DataError(f"{self.name} has {there} {kind}samples, the spec asks for {size}")
        count = there if size is None else size if isinstance(size, int) else round(size * there)
        if not count:
            part = "" if size is None else f", of which {size} is none"
            raise DataError(f"{self.name} has {there} {kind}samples{part}")
        return count


def require_within(folder: Path, path: Path) -> None:
    """Raise DataError if a path below a folder is a link that leads out of it."""
    # os.path.realpath, because Path.resolve raises for links in a circle.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise DataError(f"{shown(path)}: a link that leads out of {shown(folder)}; copy the data there")


def shown(path: Path) -> str:
    r"""A path in a message, of which a stranger's name makes one line.

    Examples:
        >>> print(shown(Path("a\nb.png")))
        a\nb.png
    """
    return repr(str(path))[1:-1]


def _part(samples: Samples, positions: Tensor) -> Samples:
    """Some samples, in the order in which they are stored."""
    return Subset(samples, positions.sort().values)


class Source(ABC):
    """Something that data come from, named in a spec: ``{"name": "digits"}``.

    A subclass overrides `load`. Its JSON fields are the annotated parameters of its constructor; sizes, splits, context
    and augmentation are fields of every source.
    """

    tag: ClassVar[str]
    """The name in specs and messages, set by `register_data`; the class's name if it is not registered."""

    @abstractmethod
    def load(self, request: Request) -> DataSet:
        """The samples that a spec asks for, as `Request.data_set` makes them.

        Raises:
            DataError: the data are missing or damaged.
        """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.tag = cls.__name__

    def __repr__(self) -> str:
        """The class with the arguments it was constructed with, on one line."""
        return one_line(self)
