"""Data sets, as tensors in memory, on a grid of powers of two."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..spec.training import Data

DATA_VARIABLE = "INVFLOW_DATA"
_DIGITS_TEST_STEP = 4  # every fourth of the digits is a test image: they come sorted by who wrote them
_TEST_BATCH = 1000
_GREYS = {"digits": 16, "mnist": 256}  # powers of two: pixels lie on a grid that floats hold exactly


@dataclass(frozen=True)
class Images:
    """Labelled images: pixels ``(n, channels, height, width)`` in [0, 1], labels ``(n,)``."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """Training and test images of one data set."""

    train: Images
    test: Images

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return tuple(self.train.pixels.shape[1:])

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return int(self.train.labels.max()) + 1


def load_data(options: Data, root: Path | None = None, *, download: bool = False) -> DataSet:
    """The data set that a spec names: its first ``train_size`` training images and all its test images.

    Args:
        options: which data set, and how much of it.
        root: a torchvision root for data sets that do not ship with a library; by default what the environment
            variable INVFLOW_DATA names.
        download: whether an absent data set may be fetched into the root.

    Raises:
        DataError: it is absent, or has fewer training images than asked for.
    """
    found = _digits() if options.name == "digits" else _mnist(root, download)
    size = options.train_size or len(found.train)
    if size > len(found.train):
        raise DataError(f"{options.name} has {len(found.train)} training images, the spec asks for {size}")
    first = Images(found.train.pixels[:size], found.train.labels[:size])
    # Whole numbers until here: a slice of floats would hold on to all images.
    return DataSet(*(Images(images.pixels / _GREYS[options.name], images.labels) for images in (first, found.test)))


def _digits() -> DataSet:
    from sklearn.datasets import load_digits  # slow to import

    raw = load_digits()
    pixels = torch.tensor(raw.images, dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(raw.target)
    is_test = torch.arange(len(labels)) % _DIGITS_TEST_STEP == _DIGITS_TEST_STEP - 1
    return DataSet(Images(pixels[~is_test], labels[~is_test]), Images(pixels[is_test], labels[is_test]))


def _mnist(root: Path | None, download: bool) -> DataSet:
    from torchvision.datasets import MNIST  # slow to import

    folder = root or (Path(os.environ[DATA_VARIABLE]) if DATA_VARIABLE in os.environ else Path("data"))
    try:
        parts = [MNIST(folder, train=train, download=download) for train in (True, False)]
    except (AssertionError, ValueError) as error:
        raise DataError(
            f"mnist in {folder} is damaged ({error or type(error).__name__}); copy or download it again"
        ) from None
    except RuntimeError as error:
        why = f"and the download failed: {error}" if download else "and may not be downloaded"
        raise DataError(
            f"mnist is not in {folder} {why}; name the folder that holds MNIST/raw with --data-root or {DATA_VARIABLE}"
            + ("" if download else ", or pass --download")
        ) from None
    train, test = (Images(part.data.unsqueeze(1), part.targets) for part in parts)
    return DataSet(train, test)


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches at a time, by a list of positions: indexing a tensor once beats collating its rows."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.images.pixels[positions], self.images.labels[positions]


def seed_at(seed: int, position: int) -> int:
    """A seed of its own for each epoch or step of a training with this seed."""
    return (seed * 1_000_003 + position) % 2**63


def train_loader(images: Images, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of training images, in an order that the seed decides and nothing else."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = torch.split(order, batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch norm has no statistics of one image
        batches = (*batches[:-2], torch.cat(batches[-2:]))
    return _loader(images, batches)


def test_loader(images: Images) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of test images, in their own order."""
    return _loader(images, torch.split(torch.arange(len(images)), _TEST_BATCH))


def _loader(images: Images, batches: tuple[Tensor, ...]) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(_Batches(images), sampler=batches, batch_size=None)
