"""``invflow interpolate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DataRoot, Device, Plugins, RunPath
from .output import out


def interpolate(
    run: RunPath,
    pairs: Annotated[int, typer.Option(min=1, max=20, help="How many pairs of test images.")] = 5,
    steps: Annotated[int, typer.Option(min=2, max=50, help="How many images in each walk.")] = 9,
    to: Annotated[Path | None, typer.Option("--out", help="The folder to write to; default: RUN/pictures.")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    plugin: Plugins = None,
) -> None:
    """Draw walks between test images, straight in feature space.

    A strip and a GIF show the images on the way from one to the other.
    """
    from ..training.illustrate import draw_interpolation
    from ..training.run import PICTURES, Run

    for picture in draw_interpolation(Run.open(run).task(data_root, device), pairs, steps, to or run / PICTURES):
        out.print(f"wrote {picture}")
