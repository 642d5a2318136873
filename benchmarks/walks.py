"""Walks between images: whether the image half-way between two of them looks like one of the data, for several runs.

For pairs of test images of different classes, the point half-way between their features is run backwards, rounded to
the data's levels, and compared with the pixel cross-fade of the same pair. An independent judge, five networks trained
on the pixels of the training images, names them all. The table shows, for each run:

- accuracy: of the model itself on the test images, in percent;
- the figures of `invflow.diagnostics.walks.Walks`, fractions in percent.

    python benchmarks/walks.py RUN [RUN ...] [--data '{"name": "mnist", "train_size": 6000}']

With `--data`, the judge learns from these and the pairs are drawn from their test images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from invflow.training.run import task_of_run
from invflow.training.run_folder import Run
from invflow.training.walking import PAIRS, SEED, measure_walks


def measured(run: Path, data: str | None, count: int, seed: int) -> dict[str, float]:
    """The row of the table for a trained model."""
    task = task_of_run(Run.open(run), named=None if data is None else json.loads(data))
    found = dataclasses.asdict(measure_walks(task, count, seed))
    return {"accuracy": task.evaluate().scores["test_accuracy"], **found}


def _cell(name: str, value: float) -> str:
    if name == "pairs":
        return str(value)
    return f"{value:.3f}" if name == "distance" else f"{100 * value:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seed", type=int, default=SEED, help="of the pairs")
    parser.add_argument("--data", help="the JSON of other data of the same shape")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {str(run): measured(run, options.data, options.pairs, options.seed) for run in options.runs}
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("run", *(name.replace("_", " ") for name in next(iter(rows.values()))))
    for run, row in rows.items():
        table.add_row(run, *(_cell(name, value) for name, value in row.items()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
