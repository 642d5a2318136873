"""Data sets, as tensors in memory: images on a grid of powers of two, and points of the plane."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ..errors import DataError
from ..spec.training import POINTS, Data

DATA_VARIABLE = "INVFLOW_DATA"
_POINTS = 4096  # the default number of points: enough for a mean log-density with an error of 1 or 2 %
_MOST_POINTS = 10**6  # a spec may come from a stranger
_NOISE = 0.1  # default standard deviation of the noise of moons and circles
_DIGITS_TEST_STEP = 4  # every fourth digit is a test image: they are sorted by writer
TEST_BATCH = 1000
_LEVELS = {"digits": 16, "mnist": 256}  # powers of two: pixels lie on a grid that floats represent exactly
_HIGH = {"digits": 17 / 16, "mnist": 1.0}  # digits have one value more than levels: 0 to 16 sixteenths


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
        train: the samples to learn from.
        test: the samples to measure on.
        levels: the pixels of images are integer multiples of 1/levels; None for points, which are real numbers.
        high: dequantised pixels lie in [0, high]; None for points.
    """

    train: Samples
    test: Samples
    levels: int | None = None
    high: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample: (channels, height, width) or (features,)."""
        return tuple(self.train.values.shape[1:])

    @property
    def classes(self) -> int:
        """The number of different labels."""
        return int(self.train.labels.max()) + 1

    @property
    def holds_images(self) -> bool:
        """Whether the samples are images rather than points."""
        return self.levels is not None


def load_data(options: Data, root: Path | None = None, *, download: bool = False) -> DataSet:
    """Load the data set that a spec names: its first ``train_size`` training samples and ``test_size`` test samples.

    Args:
        options: the data set and its sizes.
        root: a torchvision root for data sets that do not ship with a library; the default is the folder in the
            environment variable INVFLOW_DATA.
        download: whether a missing data set may be downloaded into the root.

    Raises:
        DataError: the data set is missing, or has fewer samples than requested.
    """
    sizes = (options.train_size, options.test_size)
    if options.name in POINTS:
        counts = [size or _POINTS for size in sizes]
        if max(counts) > _MOST_POINTS:
            raise DataError(f"{options.name} has at most {_MOST_POINTS} points, the spec asks for {max(counts)}")
        return DataSet(_points(options, counts[0], seed=0), _points(options, counts[1], seed=1))
    parts, levels = _digits() if options.name == "digits" else _mnist(root, download), _LEVELS[options.name]
    for kind, part, size in zip(("training", "test"), parts, sizes, strict=True):
        if size is not None and size > len(part):
            raise DataError(f"{options.name} has {len(part)} {kind} images, the spec asks for {size}")
    # The pixels are integers before this line: a slice of floats would keep all images in memory.
    cut = (Samples(part.values[:size] / levels, part.labels[:size]) for part, size in zip(parts, sizes, strict=True))
    return DataSet(next(cut), next(cut), levels, _HIGH[options.name])


def _points(options: Data, size: int, seed: int) -> Samples:
    """Points of the plane, ``(size, 2)``, determined by name, noise, size and seed."""
    from sklearn.datasets import make_circles, make_moons  # slow to import

    if options.name == "checkerboard":
        return _checkerboard(size, seed)
    noise = _NOISE if options.noise is None else options.noise
    make = make_moons if options.name == "moons" else functools.partial(make_circles, factor=0.5)
    points, labels = make(size, noise=noise, random_state=seed)
    return Samples(torch.tensor(points, dtype=torch.float32), torch.tensor(labels))


def _checkerboard(size: int, seed: int) -> Samples:
    """Uniform points on the dark squares of a 4 x 4 board over [-2, 2)^2: a density with edges, in 8 pieces."""
    generator = torch.Generator().manual_seed(seed)
    column = torch.randint(4, (size,), generator=generator)
    row = 2 * torch.randint(2, (size,), generator=generator) + column % 2
    points = torch.stack([column, row], dim=1) - 2 + torch.rand(size, 2, generator=generator)
    return Samples(points, torch.zeros(size, dtype=torch.long))


def _digits() -> list[Samples]:
    from sklearn.datasets import load_digits  # slow to import

    raw = load_digits()
    images, labels = torch.tensor(raw.images, dtype=torch.uint8).unsqueeze(1), torch.tensor(raw.target)
    is_test = torch.arange(len(labels)) % _DIGITS_TEST_STEP == _DIGITS_TEST_STEP - 1
    return [Samples(images[chosen], labels[chosen]) for chosen in (~is_test, is_test)]


def _mnist(root: Path | None, download: bool) -> list[Samples]:
    from torchvision.datasets import MNIST  # slow to import

    folder = root or Path(os.environ.get(DATA_VARIABLE, "data"))
    try:
        parts = [MNIST(folder, train=train, download=download) for train in (True, False)]
    except (AssertionError, ValueError) as error:
        why = f"is damaged ({error or type(error).__name__}); copy or download it again"
        raise DataError(f"mnist in {folder} {why}") from None
    except RuntimeError as error:
        why = f"and the download failed: {error}" if download else "and may not be downloaded"
        fix = f"name the folder that holds MNIST/raw with --data-root or {DATA_VARIABLE}"
        fix += "" if download else ", or pass --download"
        raise DataError(f"mnist is not in {folder} {why}; {fix}") from None
    return [Samples(part.data.unsqueeze(1), part.targets) for part in parts]


def seed_at(seed: int, position: int) -> int:
    """A separate seed for each epoch or step of a training with this seed."""
    return (seed * 1_000_003 + position) % 2**63


def train_loader(samples: Samples, batch_size: int, seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of training samples, in an order that depends on the seed only."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    batches = torch.split(order, batch_size)
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch norm has no statistics of one sample
        batches = (*batches[:-2], torch.cat(batches[-2:]))
    return _loader(samples, batches)


def test_loader(samples: Samples) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of test samples, in their own order."""
    return _loader(samples, torch.split(torch.arange(len(samples)), TEST_BATCH))


def _loader(samples: Samples, batches: tuple[Tensor, ...]) -> DataLoader[tuple[Tensor, ...]]:
    # A "sample" is a whole batch, taken by a tensor of positions: one indexing is faster than collating its rows.
    return DataLoader(TensorDataset(samples.values, samples.labels), sampler=batches, batch_size=None)
