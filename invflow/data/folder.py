"""Images in a folder, decoded when they are taken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ..errors import DataError
from ..registry import register_data
from ..samples import Batch, DataSet, Samples
from ..source import Request, Source, require_within, shown
from .reading import reading

if TYPE_CHECKING:
    from PIL import Image

Side: TypeAlias = Annotated[int, Field(ge=1, le=8192)]
Size: TypeAlias = tuple[Side, Side]

_LEVELS = 256
_REFUSED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
"""Formats that PIL has other programs draw or decode: a stranger's file shall start none."""
_PARTS = ("train", "test", "val")


@register_data("image_folder")
class ImageFolder(Source):
    """Images of any format that PIL reads, in a folder: ``class/image``, ``train/class/image``, or no classes.

    Args:
        path: the folder, relative to the spec or to the data root.
        size: [height, width] to which images are resized, or one number for both; null: all have one size.
        crop: whether images are cut to the form of that size, about their centre, rather than stretched.
        channels: 3 for colour, 1 for grey.
    """

    def __init__(
        self, path: str, size: Side | Size | None = None, crop: bool = True, channels: Literal[1, 3] = 3
    ) -> None:
        self.path = path
        self.size = (size, size) if isinstance(size, int) else size
        self.crop = crop
        self.channels = channels

    def load(self, request: Request) -> DataSet:
        root = request.find(self.path)
        parts = _parts(root)
        found = {part: _images(root, folder) for part, folder in parts.items()}
        classes = [name for name in found["train"] if name]
        for part, images in found.items():
            for name in images.keys() - found["train"].keys():
                place, train = shown(parts[part] / name), shown(parts["train"])
                raise DataError(f"{place}: expected images in folders of the classes that {train} has")
        decoder = _Decoder(self.size, self.crop, self.channels)
        if self.size is None:
            first = next(iter(found["train"].values()))[0]
            _, height, width = decoder(first).shape
            decoder = replace(decoder, like=(first, (height, width)))
        samples = {part: _Images(images, classes, decoder) for part, images in found.items()}
        return request.data_set(
            samples["train"], samples.get("test"), samples.get("val"), levels=_LEVELS, class_names=classes
        )


def _parts(root: Path) -> dict[str, Path]:
    """The folders of the training part, and of the others that are given."""
    if not root.is_dir():
        raise DataError(f"{shown(root)}: expected a folder of images, got a file")
    folders, _ = _inside(root, root)
    names = {folder.name for folder in folders}
    others = sorted(names - set(_PARTS))
    if "train" not in names or (others and not names & {"test", "val"}):  # a class may be called train
        return {"train": root}
    if others:
        raise DataError(f"{shown(root / others[0])}: expected no other folders beside train, test and val")
    return {part: root / part for part in _PARTS if part in names}


def _images(root: Path, folder: Path) -> dict[str, list[Path]]:
    """The images of each class, in order; those without a class have the name ``""``."""
    folders, files = _inside(root, folder)
    if folders and files:
        raise DataError(f"{shown(files[0])}: an image beside folders; move it into the folder of its class")
    found = {"": files} if not folders else {}
    for one in folders:
        inner, found[one.name] = _inside(root, one)
        if inner:
            raise DataError(f"{shown(inner[0])}: a folder in that of a class; expected images alone")
    for name, images in found.items():
        if not images:
            raise DataError(f"{shown(folder / name)}: no images here, of a format that PIL reads")
    return found


def _inside(root: Path, folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the images in a folder, sorted by name, without hidden ones and what is neither."""
    from PIL import Image

    known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - _REFUSED}
    folders: list[Path] = []
    images: list[Path] = []
    with reading(folder), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda one: one.name):
            path = Path(entry.path)
            if entry.name.startswith(".") or not (entry.is_dir() or path.suffix.lower() in known):
                continue
            if entry.is_symlink():
                require_within(root, path)
            if not entry.is_dir() and not entry.is_file():  # opening a pipe would wait for ever
                raise DataError(f"{shown(path)}: expected a file, got a pipe, a device or a link to nothing")
            (folders if entry.is_dir() else images).append(path)
    return folders, images


class _Images(Samples):
    """Images in files.

    Args:
        images: the files of each class.
        classes: all classes, in order; none if the images have no labels.
        decoder: reads a file.
    """

    slow = True

    def __init__(self, images: dict[str, list[Path]], classes: Sequence[str], decoder: _Decoder) -> None:
        self._files = [file for files in images.values() for file in files]
        self._decoder = decoder
        if classes:
            of_class = [classes.index(name) for name in images]
            sizes = torch.tensor([len(files) for files in images.values()])
            self.labels = torch.tensor(of_class).repeat_interleave(sizes)

    def __len__(self) -> int:
        return len(self._files)

    def take(self, positions: Tensor) -> Batch:
        pixels = torch.stack([torch.from_numpy(self._decoder(self._files[one])) for one in positions.tolist()])
        labels = None if self.labels is None else self.labels[positions]
        return Batch(pixels.to(torch.get_default_dtype()) / _LEVELS, labels)


@dataclass(frozen=True)
class _Decoder:
    """What makes pixels of a file: ``(channels, height, width)``, uint8.

    An animation is its first picture. A picture is turned as its EXIF orientation says, transparent parts become white,
    16 bits lose the lower 8, and colour profiles are ignored.

    Attributes:
        size: height and width; None to keep those of the file.
        crop: whether the form of that size is cut out, rather than stretched to.
        channels: 1 or 3.
        like: a file, and its height and width, that the picture must have.
    """

    size: Size | None
    crop: bool
    channels: int
    like: tuple[Path, Size] | None = None

    def __call__(self, file: Path) -> NDArray[np.uint8]:
        from PIL import Image, ImageOps

        with reading(file, Image.DecompressionBombWarning):
            with Image.open(file, formats=sorted(Image.OPEN.keys() - _REFUSED)) as opened:
                picture = _eight_bits(ImageOps.exif_transpose(opened), "RGB" if self.channels == 3 else "L")
            if self.size is not None:
                target = self.size[::-1]
                how = Image.Resampling.BILINEAR  # of all pixels that one stands for, so nothing is skipped
                picture = ImageOps.fit(picture, target, how) if self.crop else picture.resize(target, how)
            pixels = np.array(picture)
        height, width = pixels.shape[:2]
        if self.like is not None and self.like[1] != (height, width):
            first, (high, wide) = self.like
            found = f"{height}x{width} pixels, but {shown(first)} has {high}x{wide}"
            raise DataError(f'{shown(file)}: {found}; give a "size" to which all are resized')
        return pixels.reshape(height, width, self.channels).transpose(2, 0, 1)


def _eight_bits(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in the mode RGB or L, 8 bits a channel."""
    from PIL import Image

    if picture.mode.startswith("I;16"):  # PIL would cut them off at 255
        return Image.fromarray((np.array(picture) >> 8).astype(np.uint8)).convert(mode)
    if picture.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no known range; convert it to 8 or 16")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert(mode)
