"""The data set that a spec names, and the order in which its samples are taken."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..registry import UnknownTag, data
from ..samples import Batch, DataSet, Samples, as_batch
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


class Share(NamedTuple):
    """What one process takes of a batch at once.

    Attributes:
        batch: its samples; of a batch with too few for every share the first one, in place of none.
        number: how many of them count.
        start: the place of the first in the whole batch.
        of: the number of samples in the whole batch.
        place: its number among the shares of the batch.
    """

    batch: Batch
    number: int
    start: int
    of: int
    place: int

    @classmethod
    def whole(cls, batch: Batch) -> Share:
        """All of a batch."""
        return cls(batch, len(batch.values), 0, len(batch.values), 0)

    @property
    def of_several(self) -> bool:
        """Whether it is not the whole batch."""
        return self.number < self.of


class Sharing(NamedTuple):
    """How batches are shared: each is cut into ``processes * parts``, of which every process takes ``parts`` in turn.

    Attributes:
        rank: the number of this process.
        processes: how many there are.
        parts: into which each process's share is cut.
    """

    rank: int = 0
    processes: int = 1
    parts: int = 1

    def rows(self, count: int) -> list[tuple[int, int, int]]:
        """The shares that this process takes of a batch of so many samples: index, start and number of each.

        Examples:
            >>> Sharing(rank=1, processes=2, parts=2).rows(7)
            [(1, 2, 2), (3, 6, 1)]
        """
        every = self.processes * self.parts
        bounds = [count * index // every for index in range(every + 1)]
        ceiling = [count - bound for bound in reversed(bounds)]  # the larger ones first
        mine = range(self.rank, every, self.processes)
        return [(index, ceiling[index], ceiling[index + 1] - ceiling[index]) for index in mine]


ALONE = Sharing()


def seed_at(seed: int, position: int) -> int:
    """A separate seed for each epoch or step of a training with this seed."""
    return (seed * 1_000_003 + position) % 2**63


def train_loader(
    samples: Samples, batch_size: int, seed: int, skip: int = 0, sharing: Sharing = ALONE
) -> Iterable[Share]:
    """The shares of batches of training samples, in an order that depends on the seed only.

    Args:
        samples: the samples.
        batch_size: the number of samples in a batch.
        seed: of the order.
        skip: the number of batches to leave out at the beginning.
        sharing: how they are shared.
    """
    own = samples.own_batches()
    if own is not None:
        return _OfWhole(_Seeded(own, seed, skip), sharing)
    order = samples.order(torch.Generator().manual_seed(seed))
    return _loader(samples, _split(order, batch_size)[skip:], sharing)


def _split(order: Tensor, batch_size: int) -> Sequence[Tensor]:
    """The positions of each batch."""
    batches = torch.split(order, batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch norm has no statistics of one sample
        return (*batches[:-2], torch.cat(batches[-2:]))
    return batches


def smallest_batch(samples: Samples, batch_size: int) -> int | None:
    """The number of samples in the smallest training batch; None if the samples come in batches of their own."""
    return min(map(len, _split(torch.arange(len(samples)), batch_size))) if samples.own_batches() is None else None


def batches_of(samples: Samples, batch_size: int) -> int | None:
    """The number of batches in an epoch; None if the samples come in batches of their own, which nobody has counted."""
    try:
        return len(train_loader(samples, batch_size, 0))  # type: ignore[arg-type]
    except TypeError:
        return None


def ordered_loader(samples: Samples, sharing: Sharing = ALONE) -> Iterable[Share]:
    """The shares of batches of test samples, in their own order; large ones come in smaller batches."""
    own = samples.own_batches()
    if own is not None:  # a loader may shuffle, and in each process alike
        return _OfWhole(own if sharing.processes == 1 else _Seeded(own, 0, 0), sharing)
    fitting = MOST_NUMBERS // samples.first(1).values.numel()
    return _loader(samples, torch.split(torch.arange(len(samples)), max(1, min(TEST_BATCH, fitting))), sharing)


def _loader(samples: Samples, batches: Sequence[Tensor], sharing: Sharing) -> Iterable[Share]:
    shares = [(batch, share) for batch in batches for share in sharing.rows(len(batch))]
    positions = [batch[start : start + number] if number else batch[:1] for batch, (_, start, number) in shares]
    workers = min(_MOST_WORKERS, _cpus(), len(positions)) if samples.slow else 0
    taken = _Loader(samples, positions, workers) if workers > 1 else _Batches(samples, positions)
    return _Shares(taken, [(number, start, len(batch), index) for batch, (index, start, number) in shares])


class _Shares:
    """Batches with what they are of whole ones."""

    def __init__(self, batches: _Batches | _Loader, places: list[tuple[int, int, int, int]]) -> None:
        self.batches = batches
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Share]:
        for batch, (number, start, of, index) in zip(self.batches, self._places, strict=True):
            yield Share(batch, number, start if number else 0, of, index)


class _OfWhole:
    """The shares of batches that every process loads whole, because nobody knows what is in them."""

    def __init__(self, batches: Iterable[Batch], sharing: Sharing) -> None:
        self._batches = batches
        self._sharing = sharing

    def __len__(self) -> int:
        return len(self._batches) * self._sharing.parts  # type: ignore[arg-type]  # TypeError: nobody knows

    def __iter__(self) -> Iterator[Share]:
        for batch in map(as_batch, self._batches):
            of = len(batch.values)
            for index, start, number in self._sharing.rows(of):
                at, rows = (start, number) if number else (0, 1)
                yield Share(batch.rows(slice(at, at + rows)), number, at, of, index)


class _Batches:
    """Batches of samples, by their positions. PyTorch's loader takes 0.1 ms longer for each."""

    def __init__(self, samples: Samples, batches: Sequence[Tensor]) -> None:
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

    def __init__(self, samples: Samples, batches: Sequence[Tensor], workers: int) -> None:
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
