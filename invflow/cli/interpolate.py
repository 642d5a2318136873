"""``invflow interpolate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DataName, DataRoot, Device, Plugins, RunPath, named_data
from .output import out


def interpolate(
    run: RunPath,
    pairs: Annotated[int, typer.Option(min=1, max=20, help="How many pairs of test images.")] = 5,
    steps: Annotated[int, typer.Option(min=2, max=50, help="How many images in each walk.")] = 9,
    to: Annotated[Path | None, typer.Option("--out", help="The folder to write to; default: RUN/pictures.")] = None,
    device: Device = "auto",
    data: DataName = None,
    data_root: DataRoot = None,
    plugin: Plugins = None,
) -> None:
    """Draw walks between test images, straight in feature space.

    A strip and a GIF show the images on the way from one to the other.
    """
    from ..training.illustrate import draw_interpolation
    from ..training.run import task_of_run
    from ..training.run_folder import PICTURES, Run

    task = task_of_run(Run.open(run), data_root, device, named_data(data))
    for picture in draw_interpolation(task, pairs, steps, to or run / PICTURES):
        out.print(f"wrote {picture}")
