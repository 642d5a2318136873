"""Writing reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import RunError
from ..files import write_atomically
from ..progress import progress
from ..training.run_folder import Run
from .collect import PARTS, portrait
from .page import page

REPORT = "report.html"
_MARK = b'<meta name="generator" content="invflow report">'
"""By which a report is known."""


def report_on(runs: Sequence[Run], data_root: Path | None = None, device: str = "auto") -> str:
    """The report on one run, or on two side by side, as one HTML page.

    Work of more than a few seconds shows a progress bar.

    Args:
        runs: one or two.
        data_root: see `load_data`.
        device: see `device_of`.

    Raises:
        InvflowError: there is no model in a run, or this machine does not have the device.
    """
    with progress("report", PARTS * len(runs)) as advance:
        return page([portrait(run, data_root, device, advance) for run in runs])


def write_report(
    runs: Sequence[Run], path: Path | None = None, data_root: Path | None = None, device: str = "auto"
) -> Path:
    """Write `report_on` some runs to a file and return its path.

    Args:
        runs: one or two.
        path: the file, by default ``report.html`` in the folder of the first run; an older report is replaced.
        data_root: see `load_data`.
        device: see `device_of`.

    Raises:
        RunError: there is a file already which is no report.
        InvflowError: as `report_on` does.
        OSError: the file cannot be written.
    """
    path = path or runs[0].folder / REPORT
    require_free(path)
    made = report_on(runs, data_root, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, made.encode())
    return path


def require_free(path: Path) -> None:
    """Raise RunError if a path is that of a file which is no report."""
    if path.is_dir():
        raise RunError(f"{path}: is a folder; name a file with --out")
    if not path.exists():
        return
    with path.open("rb") as file:
        known = _MARK in file.read(2000)
    if not known:
        raise RunError(f"{path}: exists already and is no report; name another file with --out")
