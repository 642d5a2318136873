"""Trainings in processes of their own, which are killed."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from invflow.cli import main
from invflow.diagnostics import pictures
from invflow.report import write as reporting
from invflow.training.run_folder import Run

# A server that has imported everything forks a process for each command: a fresh interpreter takes seconds to start.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["pytest", "tests.durability.killing", "invflow.training.illustrate", "sklearn.datasets", "torch.utils.tensorboard"]
)
PATIENCE = 120
"""Seconds after which a command hangs."""


@dataclass
class Ended:
    """How a command ended: its exit status, minus the signal's number if one killed it, and what it printed."""

    status: int
    printed: str
    seconds: float


def command(folder: Path, *arguments: object, after: float | None = None, until: Path | None = None) -> Ended:
    """Run `invflow` in a folder and wait for its end.

    Args:
        folder: where to run it.
        *arguments: of the command.
        after: seconds after which it is killed by SIGKILL.
        until: a file that it writes, and when it has, it is sent SIGTERM.
    """
    output = folder / "output.txt"
    process = SERVER.Process(target=_invflow, args=(folder, output, [str(argument) for argument in arguments]))
    began = time.monotonic()
    process.start()
    if after is not None:
        process.join(after)
        process.kill()
    while until is not None and process.is_alive():
        if until.exists():
            process.terminate()
            break
        time.sleep(0.01)
    process.join(PATIENCE)
    seconds = time.monotonic() - began
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs, f"invflow {arguments} has not ended"
    status, printed = process.exitcode, output.read_text() if output.exists() else ""
    process.close()
    output.unlink(missing_ok=True)
    return Ended(status, printed, seconds)


def _invflow(folder: Path, output: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    pictures.write_figure = pictures.write_gif = lambda *_: None  # they take longer than the training
    reporting.write_report = lambda *_: "report.html"
    main(arguments)


def require_equal(found: Path, expected: Path) -> None:
    """Assert that two runs are the same, to the bit: weights, metrics, results."""
    mine, other = Run.open(found), Run.open(expected)
    assert mine.record.pop("seconds") > 0
    assert other.record.pop("seconds") > 0
    assert mine.record == other.record
    metrics = Path("logs", "csv", "version_0", "metrics.csv")
    assert (found / metrics).read_text() == (expected / metrics).read_text()
    assert [row["epoch"] for row in mine.metrics] == list(range(mine.training.epochs))
    for part in ("", "best"):
        names = {path.name for path in (found / part).glob("weights-*")}
        assert len(names) == 1
        assert names == {path.name for path in (expected / part).glob("weights-*")}, f"{part or 'last'} weights differ"
    states = [torch.load(run / "resume" / "last.ckpt", weights_only=True) for run in (found, expected)]
    for part in ("model", "optimizers"):
        torch.testing.assert_close(*(state[part] for state in states), rtol=0, atol=0)
    assert states[0]["schedules"] == states[1]["schedules"]
    left = {path.name for path in found.rglob(".*")}
    assert not left, f"partial files stay: {left}"
