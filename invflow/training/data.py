"""The data set that a spec names, and the order in which its samples are taken."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import DataError
from ..registry import UnknownTag, data
from ..samples import Batch, DataSet, Samples
from ..source import Request
from ..spec.training import Data

TEST_BATCH = 1000


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


def train_loader(samples: Samples, batch_size: int, seed: int) -> DataLoader[Batch]:
    """Batches of training samples, in an order that depends on the seed only, or in their own."""
    order = samples.order(torch.Generator().manual_seed(seed))
    batches = torch.split(order, batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch norm has no statistics of one sample
        batches = (*batches[:-2], torch.cat(batches[-2:]))
    return _loader(samples, batches)


def test_loader(samples: Samples) -> DataLoader[Batch]:
    """Batches of test samples, in their own order."""
    return _loader(samples, torch.split(torch.arange(len(samples)), TEST_BATCH))


def _loader(samples: Samples, batches: tuple[Tensor, ...]) -> DataLoader[Batch]:
    # A "sample" is a whole batch, taken by a tensor of positions: one indexing is faster than collating its rows.
    return DataLoader(samples, sampler=batches, batch_size=None)
