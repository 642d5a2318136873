"""Draws docs/interpolation.png: walks between digits of a network trained with `midpoints`, and of one without.

    python benchmarks/plot_walks.py docs/interpolation.png [FOLDER]

Both are `specs/irevnet_digits.json`. FOLDER, by default runs/walks, gets their runs, `with` and `without`, unless
it has them already.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import invflow
from invflow.diagnostics.pictures import gallery, write_figure
from invflow.diagnostics.walks import outside
from invflow.spec import Spec
from invflow.training.illustrate import first_pairs
from invflow.training.run import task_of_run
from invflow.training.run_folder import Run
from invflow.training.walking import walk

PAIRS, STEPS = 3, 9


def main(picture: str, folder: str = "runs/walks") -> None:
    """Train both if necessary, and draw the same pairs for each."""
    spec = invflow.load_spec("specs/irevnet_digits.json")
    training = {name: value for name, value in spec.expanded["training"].items() if name != "midpoints"}
    rows, names = [], []
    for how, document in (("with", spec), ("without", spec.replace(training=training))):
        task = task_of_run(_run(document, Path(folder) / how))
        frames = walk(task, torch.tensor(first_pairs(task, PAIRS)), STEPS)
        said = f"{how} midpoints", f"{100 * outside(frames[:, 1:-1]):.1f} % clipped"
        names += [" ".join(said), *[""] * (PAIRS - 1)]
        rows.append(frames)
    title = "Straight lines in feature space, run backwards"
    write_figure(gallery(torch.cat(rows).flatten(0, 1), title, STEPS, names), Path(picture))


def _run(spec: Spec, folder: Path) -> Run:
    return Run.open(folder) if folder.is_dir() else invflow.train(spec, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
