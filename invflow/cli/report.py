"""``invflow report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DataRoot, Device, Plugins, RunPath
from .output import out


def report(
    run: RunPath,
    other: Annotated[Path | None, typer.Argument(metavar="RUN", help="A second run, to be shown beside it.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="The file to write; default: RUN/report.html.")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    plugin: Plugins = None,
) -> None:
    """Write an HTML page about one run, or two side by side.

    It is one file that needs no network. An older report is replaced, any other file is not; the report on two runs is
    by default in the folder of the first.
    """
    from ..report.write import write_report
    from ..training.run_folder import Run

    runs = [Run.open(folder) for folder in (run, other) if folder is not None]
    out.print(f"wrote {write_report(runs, to, data_root, device)}")
