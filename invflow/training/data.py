"""Data sets, as tensors in memory: images on a grid of powers of two, and points of the plane."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..spec.training import POINTS, Data

DATA_VARIABLE = "INVFLOW_DATA"
POINTS_TRAIN = 4096
POINTS_TEST = 4096
"""How many points are generated where the spec does not say: their mean log-density is good to 1 or 2 %."""
_MOST_POINTS = 10**6  # generated for a spec, which may come from a stranger
_NOISE = 0.1  # standard deviation of the noise of moons and circles where the spec does not say
_DIGITS_TEST_STEP = 4  # every fourth of the digits is a test image: they come sorted by who wrote them
_TEST_BATCH = 1000
_LEVELS = {"digits": 16, "mnist": 256}  # powers of two: pixels lie on a grid that floats hold exactly


@dataclass(frozen=True)
class Samples:
    """Labelled samples.

    Attributes:
        values: images ``(n, channels, height, width)`` in [0, 1], or points ``(n, features)``.
        labels: ``(n,)``, counted from 0.
    """

    values: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """Training and test samples of one data set.

    Attributes:
        train: what is learned from.
        test: what is measured on.
        levels: of images: their pixels are whole multiples of 1/levels; None of points, which are real numbers.
    """

    train: Samples
    test: Samples
    levels: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (channels, height, width) or (features,)."""
        return tuple(self.train.values.shape[1:])

    @property
    def classes(self) -> int:
        """How many labels there are."""
        return int(self.train.labels.max()) + 1

    @property
    def holds_images(self) -> bool:
        """Whether the samples are images, and not points."""
        return self.levels is not None


def load_data(options: Data, root: Path | None = None, *, download: bool = False) -> DataSet:
    """The data set that a spec names: its first ``train_size`` training samples and ``test_size`` test samples.

    Args:
        options: which data set, and how much of it.
        root: a torchvision root for data sets that do not ship with a library; by default what the environment
            variable INVFLOW_DATA names.
        download: whether an absent data set may be fetched into the root.

    Raises:
        DataError: it is absent, or has fewer samples than asked for.
    """
    if options.name in POINTS:
        sizes = (options.train_size or POINTS_TRAIN, options.test_size or POINTS_TEST)
        if max(sizes) > _MOST_POINTS:
            raise DataError(f"{options.name} has at most {_MOST_POINTS} points, the spec asks for {max(sizes)}")
        train, test = (_points(options, size, seed) for seed, size in enumerate(sizes))
        return DataSet(train, test)
    found = _digits() if options.name == "digits" else _mnist(root, download)
    levels = _LEVELS[options.name]
    train = _first(options.train_size, found.train, f"{options.name} has {{}} training images", levels)
    test = _first(options.test_size, found.test, f"{options.name} has {{}} test images", levels)
    return DataSet(train, test, levels)


def _first(size: int | None, images: Samples, holdings: str, levels: int) -> Samples:
    """The first ``size`` images with whole pixels, as multiples of 1/levels."""
    if size is not None and size > len(images):
        raise DataError(f"{holdings.format(len(images))}, the spec asks for {size}")
    # Whole numbers until here: a slice of floats would hold on to all images.
    return Samples(images.values[:size] / levels, images.labels[:size])


def _points(options: Data, size: int, seed: int) -> Samples:
    """Points of the plane, ``(size, 2)``, which name, noise, size and seed decide."""
    from sklearn.datasets import make_circles, make_moons  # slow to import

    if options.name == "checkerboard":
        return _checkerboard(size, seed)
    noise = _NOISE if options.noise is None else options.noise
    if options.name == "moons":
        points, labels = make_moons(size, noise=noise, random_state=seed)
    else:
        points, labels = make_circles(size, noise=noise, factor=0.5, random_state=seed)
    return Samples(torch.tensor(points, dtype=torch.float32), torch.tensor(labels))


def _checkerboard(size: int, seed: int) -> Samples:
    """Uniform on the dark squares of a 4 x 4 board that covers [-2, 2)^2: a density with edges and 8 pieces."""
    generator = torch.Generator().manual_seed(seed)
    column = torch.randint(4, (size,), generator=generator)
    row = 2 * torch.randint(2, (size,), generator=generator) + column % 2
    corner = torch.stack([column, row], dim=1) - 2
    points = corner + torch.rand(size, 2, generator=generator)
    return Samples(points, torch.zeros(size, dtype=torch.long))


def _digits() -> DataSet:
    from sklearn.datasets import load_digits  # slow to import

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.uint8).unsqueeze(1)
    labels = torch.tensor(raw.target)
    is_test = torch.arange(len(labels)) % _DIGITS_TEST_STEP == _DIGITS_TEST_STEP - 1
    return DataSet(Samples(images[~is_test], labels[~is_test]), Samples(images[is_test], labels[is_test]))


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
    train, test = (Samples(part.data.unsqueeze(1), part.targets) for part in parts)
    return DataSet(train, test)


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches at a time, by a list of positions: indexing a tensor once beats collating its rows."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.samples.values[positions], self.samples.labels[positions]


def seed_at(seed: int, position: int) -> int:
    """A seed of its own for each epoch or step of a training with this seed."""
    return (seed * 1_000_003 + position) % 2**63


def train_loader(samples: Samples, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of training samples, in an order that the seed decides and nothing else."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    batches = torch.split(order, batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch norm has no statistics of one sample
        batches = (*batches[:-2], torch.cat(batches[-2:]))
    return _loader(samples, batches)


def test_loader(samples: Samples) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of test samples, in their own order."""
    return _loader(samples, torch.split(torch.arange(len(samples)), _TEST_BATCH))


def _loader(samples: Samples, batches: tuple[Tensor, ...]) -> DataLoader[tuple[Tensor, Tensor]]:
    return DataLoader(_Batches(samples), sampler=batches, batch_size=None)
