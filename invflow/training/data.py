"""The data set that a spec names, and the order in which its samples are taken."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..registry import UnknownTag, data
from ..samples import Batch, DataSet, Samples
from ..source import Request
from ..spec.training import Data

TEST_BATCH = 1000
MOST_NUMBERS = 2**24
"""Of a batch of test samples, of which several wait in memory if other processes take them."""
_MOST_WORKERS = 4


def load_data(
    options: Data, root: Path | None = None, *, folder: Path | None = None, download: bool = False
) -> DataSet:
    """Load the parts of the data set that a spec names.

    Args:
        options: the data set and its parts.
        root: the data root; the default is the folder in the environment variable INVFLOW_DATA.
        folder: the folder to which paths are relative, besides the root: the spec's.
        download: whether a missing data set may be downloaded into the root.

    Raises:
        DataError: the data set is missing, or has fewer samples than requested.
    """
    try:
        source = data.find(options.name)(**options.of_source)
    except (UnknownTag, TypeError) as error:
        raise DataError(str(error)) from None
    common = options.model_dump(exclude={"augmentation", *(options.model_extra or ())})
    found = source.load(Request(**common, folder=folder, root=root, download=download))
    if options.augmentation is not None and not found.holds_images:
        raise DataError(f"augmentation changes images, but {options.name} has points")
    return found


def seed_at(seed: int, position: int) -> int:
    """A separate seed for each epoch or step of a training with this seed."""
    return (seed * 1_000_003 + position) % 2**63


def train_loader(samples: Samples, batch_size: int, seed: int, skip: int = 0) -> Iterable[Batch]:
    """Batches of training samples, in an order that depends on the seed only, without the first ``skip`` of them."""
    own = samples.own_batches()
    if own is not None:
        return _Seeded(own, seed, skip)
    order = samples.order(torch.Generator().manual_seed(seed))
    batches = torch.split(order, batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch norm has no statistics of one sample
        batches = (*batches[:-2], torch.cat(batches[-2:]))
    return _loader(samples, batches[skip:])


def batches_of(samples: Samples, batch_size: int) -> int | None:
    """The number of batches in an epoch; None if the samples come in batches of their own, which nobody has counted."""
    try:
        return len(train_loader(samples, batch_size, 0))  # type: ignore[arg-type]
    except TypeError:
        return None


def test_loader(samples: Samples) -> Iterable[Batch]:
    """Batches of test samples, in their own order; large ones come in smaller batches."""
    own = samples.own_batches()
    if own is not None:
        return own
    fitting = MOST_NUMBERS // samples.first(1).values.numel()
    return _loader(samples, torch.split(torch.arange(len(samples)), max(1, min(TEST_BATCH, fitting))))


def _loader(samples: Samples, batches: tuple[Tensor, ...]) -> Iterable[Batch]:
    workers = min(_MOST_WORKERS, _cpus(), len(batches)) if samples.slow else 0
    return _Loader(samples, batches, workers) if workers > 1 else _Batches(samples, batches)


class _Batches:
    """Batches of samples, by their positions. PyTorch's loader takes 0.1 ms longer for each."""

    def __init__(self, samples: Samples, batches: tuple[Tensor, ...]) -> None:
        self._samples = samples
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._samples.take, self._batches)


class _Seeded:
    """Batches in an order that their loader draws from torch's global generator, which is seeded first."""

    def __init__(self, batches: Iterable[Batch], seed: int, skip: int) -> None:
        self._batches = batches
        self._seed = seed
        self._skip = skip

    def __len__(self) -> int:
        return len(self._batches) - self._skip  # type: ignore[arg-type]  # TypeError means that nobody knows

    def __iter__(self) -> Iterator[Batch]:
        torch.manual_seed(self._seed)
        return itertools.islice(self._batches, self._skip, None)


def _cpus() -> int:
    """The number of CPUs for other processes; 1 if a process cannot be forked safely."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


class _Loader(DataLoader[Batch]):
    """Batches of samples, which other processes take in the same order, for the time of one epoch.

    A "sample" of PyTorch's loader is a whole batch, taken by a tensor of positions: one indexing is faster than
    collating its rows.

    Args:
        samples: the samples.
        batches: the positions of each batch.
        workers: the number of processes.

    Raises:
        DataError: on iteration, a file cannot be read.
    """

    def __init__(self, samples: Samples, batches: tuple[Tensor, ...], workers: int) -> None:
        super().__init__(
            _Told(samples),
            sampler=batches,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="fork",
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        iterator = super().__iter__()
        try:
            for found in iterator:
                if isinstance(found, DataError):
                    raise found
                yield found
        finally:
            del iterator  # which ends its processes, even if the traceback of an error keeps this frame


class _Told(Dataset[Any]):
    """Samples, or why they cannot be taken: of an error in another process, PyTorch makes one of many lines."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, positions: Tensor) -> Batch | DataError:
        try:
            return self._samples.take(positions)
        except DataError as error:
            return error
