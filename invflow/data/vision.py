"""Images that ship with a library, or that torchvision reads, on their grid of grey levels."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from ..errors import DataError
from ..registry import register_data
from ..samples import DataSet, InMemory
from ..source import DATA_VARIABLE, Request, Source

_DIGITS_TEST_STEP = 4  # every fourth digit is a test image: they are sorted by writer
_DIGITS_LEVELS = 16
_DIGITS_HIGH = 17 / 16  # one value more than levels: 0 to 16 sixteenths
_LEVELS = 256  # a power of two: pixels lie on a grid that floats represent exactly
_TEN = tuple("0123456789")
MISSING = "missing"


@register_data("digits")
class Digits(Source):
    """Handwritten digits, 1,797 images of 8x8, which ship with scikit-learn: every fourth is a test image."""

    def load(self, request: Request) -> DataSet:
        from sklearn.datasets import load_digits  # slow to import

        raw = load_digits()
        images, labels = torch.tensor(raw.images, dtype=torch.uint8).unsqueeze(1), torch.tensor(raw.target)
        is_test = torch.arange(len(labels)) % _DIGITS_TEST_STEP == _DIGITS_TEST_STEP - 1
        parts = (InMemory(images[kept], labels[kept], levels=_DIGITS_LEVELS) for kept in (~is_test, is_test))
        return request.data_set(*parts, levels=_DIGITS_LEVELS, high=_DIGITS_HIGH, class_names=_TEN)


class Torchvision(Source):
    """A data set of torchvision, in the data root, with the split of its authors."""

    class_names: ClassVar[tuple[str, ...]] = _TEN
    folder: ClassVar[str]
    """Where it lies below the data root."""

    @abstractmethod
    def part(self, root: Path, train: bool, download: bool) -> InMemory:
        """The training or the test images, as torchvision reads them."""

    @classmethod
    @abstractmethod
    def files(cls) -> Mapping[str, str | None]:
        """Its files below the data root and their MD5 checksums; None for an IDX file, whose header says its size."""

    @classmethod
    def faults(cls, root: Path) -> dict[str, str]:
        """Says for each file that training could not read what is wrong with it, without loading the images."""
        from torchvision.datasets.utils import check_integrity  # slow to import

        found = {}
        for name, md5 in cls.files().items():
            path = root / name
            try:
                if not path.is_file():
                    found[name] = MISSING
                elif not (_is_as_long_as_it_says(path) if md5 is None else check_integrity(path, md5)):
                    found[name] = "damaged"
            except OSError as error:
                found[name] = f"unreadable: {error.strerror}"
        return found

    def load(self, request: Request) -> DataSet:
        root = request.data_root
        try:
            parts = [self.part(root, train, request.download) for train in (True, False)]
        except (AssertionError, ValueError, EOFError, OSError, KeyError, RuntimeError) as error:
            # Torchvision has no error of its own for what is not there.
            if not (isinstance(error, RuntimeError) and re.search("not found|download", str(error))):
                why = f"is damaged ({error or type(error).__name__}); copy or download it again"
                raise DataError(f"{self.tag} in {root} {why}") from None
            why = f"and the download failed: {error}" if request.download else "and may not be downloaded"
            fix = f"name the folder that holds {self.folder} with --data-root or {DATA_VARIABLE}"
            fix += "" if request.download else ", or pass --download"
            raise DataError(f"{self.tag} is not in {root} {why}; {fix}") from None
        return request.data_set(*parts, levels=_LEVELS, class_names=self.class_names)


@register_data("mnist")
class MNIST(Torchvision):
    """Handwritten digits, 60,000 and 10,000 grey images of 28x28."""

    folder = "MNIST/raw"

    def part(self, root: Path, train: bool, download: bool) -> InMemory:
        from torchvision import datasets  # slow to import

        found = getattr(datasets, type(self).__name__)(root, train=train, download=download)
        return InMemory(found.data.unsqueeze(1), found.targets, levels=_LEVELS)

    @classmethod
    def files(cls) -> Mapping[str, str | None]:
        from torchvision import datasets

        return {f"{cls.folder}/{Path(name).stem}": None for name, _ in getattr(datasets, cls.__name__).resources}


@register_data("fashion_mnist")
class FashionMNIST(MNIST):
    """Clothes, 60,000 and 10,000 grey images of 28x28."""

    folder = "FashionMNIST/raw"
    class_names = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@register_data("kmnist")
class KMNIST(MNIST):
    """Cursive Japanese characters, 60,000 and 10,000 grey images of 28x28."""

    folder = "KMNIST/raw"
    class_names = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")


@register_data("cifar10")
class CIFAR10(Torchvision):
    """Photographs of 10 classes, 50,000 and 10,000 colour images of 32x32."""

    folder = "cifar-10-batches-py"
    class_names: ClassVar[tuple[str, ...]] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )

    def part(self, root: Path, train: bool, download: bool) -> InMemory:
        from torchvision import datasets  # slow to import

        # It refuses files whose checksums are not those of the authors: they are pickles.
        found = getattr(datasets, type(self).__name__)(root, train=train, download=download)
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        return InMemory(images, torch.tensor(found.targets), levels=_LEVELS)

    @classmethod
    def files(cls) -> Mapping[str, str | None]:
        from torchvision import datasets

        read = getattr(datasets, cls.__name__)
        listed = [*read.train_list, *read.test_list, (read.meta["filename"], read.meta["md5"])]
        return {f"{cls.folder}/{name}": md5 for name, md5 in listed}


@register_data("cifar100")
class CIFAR100(CIFAR10):
    """Photographs of 100 classes, 50,000 and 10,000 colour images of 32x32."""

    folder = "cifar-100-python"
    class_names = tuple(map(str, range(100)))


@register_data("svhn")
class SVHN(Torchvision):
    """House numbers, 73,257 and 26,032 colour images of 32x32."""

    folder = "train_32x32.mat and test_32x32.mat"

    def part(self, root: Path, train: bool, download: bool) -> InMemory:
        from torchvision import datasets  # slow to import

        found = datasets.SVHN(root, split="train" if train else "test", download=download)
        return InMemory(torch.from_numpy(found.data), torch.from_numpy(found.labels), levels=_LEVELS)

    @classmethod
    def files(cls) -> Mapping[str, str | None]:
        from torchvision import datasets

        return {name: md5 for _, name, md5 in map(datasets.SVHN.split_list.get, ("train", "test"))}


def _is_as_long_as_it_says(path: Path) -> bool:
    """Whether an IDX file of bytes has the size of its header: how many dimensions, then four bytes for each extent."""
    with path.open("rb") as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08":
            return False
        extents = [int.from_bytes(file.read(4)) for _ in range(magic[3])]
    return path.stat().st_size == 4 + 4 * len(extents) + math.prod(extents)
