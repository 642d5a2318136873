"""``invflow interpolate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, DataName, DataRoot, Device, Plugins, RunPath, named_data
from .output import out, print_json, stdout_for_the_answer


def interpolate(
    run: RunPath,
    pairs: Annotated[int, typer.Option(min=1, max=20, help="How many pairs of test images.")] = 5,
    steps: Annotated[int, typer.Option(min=2, max=50, help="How many images in each walk.")] = 9,
    to: Annotated[Path | None, typer.Option("--out", help="The folder to write to; default: RUN/pictures.")] = None,
    device: Device = "auto",
    data: DataName = None,
    data_root: DataRoot = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure the images half-way between 200 random pairs.")
    ] = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Draw walks between test images, straight in feature space.

    A strip and a GIF show the images on the way from one to the other. With --measure, networks that learned the
    training images of the data say how much the images half-way look like one of their ends.
    """
    from ..diagnostics.walks import clipped_pixels
    from ..training.illustrate import draw_interpolation
    from ..training.run import task_of_run
    from ..training.run_folder import PICTURES, Run
    from ..training.walking import measure_walks

    with stdout_for_the_answer(as_json):
        opened = Run.open(run)
        task = task_of_run(opened, data_root, device, named_data(data))
        written, clipped = draw_interpolation(task, pairs, steps, to or run / PICTURES)
        found = measure_walks(task) if measure else None
    if as_json:
        known = {"run": str(run), "unfinished": opened.unfinished, "pictures": written, "clipped": clipped}
        print_json({**known, "walks": found})
        return
    for line in () if found is None else found.lines():
        out.print(line)
    if clipped:
        out.print(clipped_pixels(clipped))
    for picture in written:
        out.print(f"wrote {picture}")
