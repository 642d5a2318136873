"""Images as PNG in a page itself: no file beside it, no network."""

from __future__ import annotations

import base64
import io
import math
from html import escape

import torch
from torch import Tensor

LARGEST_SIDE = 48
"""Pixels; larger images are made smaller, so that a page of hundreds of them stays below 3 MB."""


def data_uri(png: bytes) -> str:
    """The address of a PNG that is in the address itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def png_of(image: Tensor, largest: int = LARGEST_SIDE) -> bytes:
    r"""The PNG file of an image.

    Args:
        image: ``(channels, height, width)`` with 1 or 3 channels; numbers outside [0, 1] are clipped, and what is no
            number is black.
        largest: the largest side, in pixels.

    Examples:
        >>> png_of(torch.zeros(1, 8, 8))[:4]
        b'\x89PNG'
    """
    from PIL import Image

    pixels = (255 * image.detach().cpu().double().nan_to_num(0.0).clamp(0, 1)).round().byte().permute(1, 2, 0)
    made = Image.fromarray(pixels.squeeze(2).numpy())
    if max(made.size) > largest:
        made.thumbnail((largest, largest), Image.Resampling.BOX)
    buffer = io.BytesIO()
    made.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def picture(image: Tensor, told: str, style: str = "pixels") -> str:
    """An ``<img>`` of an image, see `png_of`, with a description in its place for those who do not see it."""
    return f'<img class="{style}" src="{data_uri(png_of(image))}" alt="{escape(told)}">'


def coloured(values: Tensor, low: float, high: float, name: str) -> Tensor:
    """The colours of numbers ``(height, width)`` on a scale: an image ``(3, height, width)``.

    Args:
        values: the numbers.
        low: where the scale begins.
        high: where it ends.
        name: of matplotlib's colour map.
    """
    from matplotlib import colormaps

    wide = high - low if math.isfinite(high - low) and high > low else 1.0
    parts = ((values.double() - low) / wide).nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)
    return torch.from_numpy(colormaps[name](parts.cpu().numpy())[..., :3]).permute(2, 0, 1)
