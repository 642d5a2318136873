"""``invflow compare``."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import AsJson, BatchSize, DataRoot, Device, Download, Epochs, LearningRate, Plugins, Steps, TrainSize
from .output import err, out, print_json, print_table, stdout_for_the_answer

if TYPE_CHECKING:
    from ..training.compare import Comparison, Row


def compare(
    specs: Annotated[list[Path], typer.Argument(metavar="SPEC...", help="The specs' JSON files.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many times to train each spec: seeds 0, 1, ...")] = 3,
    to: Annotated[Path | None, typer.Option("--out", help="The folder; default: runs/compare-TIME-ID.")] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    train_size: TrainSize = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    download: Download = False,
    as_json: AsJson = False,
    plugin: Plugins = None,
) -> None:
    """Train several specs, several seeds each, and compare them.

    The result is a table and a plot.
    """
    from ..diagnostics.pictures import comparison, write_figure
    from ..spec import load_spec
    from ..training.compare import compare as run_all
    from ..training.run_folder import new_folder

    loaded = [(str(path), load_spec(path)) for path in specs]
    folder = to or new_folder("compare")
    overrides = {
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "train_size": train_size,
        "accelerator": device,
    }
    with stdout_for_the_answer(as_json):
        options: dict[str, Any] = {"data_root": data_root, "download": download}
        found = run_all(loaded, seeds, folder, overrides=overrides, announce=err.print, **options)
    plot, score, rows = folder / "comparison.png", found.score, found.rows
    stems = [Path(row.spec).stem for row in rows]
    names = stems if len(set(stems)) == len(stems) else [row.spec for row in rows]
    bars = [
        {"name": name, "parameters": row.parameters, "scores": found.values(row)}
        for name, row in zip(names, rows, strict=True)
    ]
    label = f"test {score.label}, {score.unit.strip()}"
    write_figure(comparison(bars, label, digits=score.digits, narrowest=score.narrowest), plot)
    if as_json:
        print_json([row.as_json() for row in rows])
        return
    for row in rows:
        if row.caveat:
            out.print(f"{row.spec}: {row.caveat}")
    heads = ("spec", "parameters", f"test {score.label}", "round-trip error", "seconds")
    print_table(heads, [_cells(found, row) for row in rows], names=1)
    out.print(f"wrote {plot}")


def _cells(found: Comparison, row: Row) -> tuple[str, ...]:
    score, values = found.score, row.scores[f"test_{found.score.name}"]
    known = [value for value in values if math.isfinite(value)]
    text = score.text(statistics.mean(known)) if known else ""
    if len(known) > 1:
        text += f" ± {score.factor * statistics.stdev(known):.{score.digits}f}"
    lost = len(values) - len(known)
    text += f"{', ' * bool(text)}{lost} diverged" if lost else ""
    error = row.caveat.partition(":")[0] if row.round_trip_error is None else f"{row.round_trip_error:.1e}"
    return row.spec, f"{row.parameters:,}", text, error, f"{statistics.mean(row.seconds):.0f}" if row.seconds else ""
