"""Walks between digits: whether the image half-way between two of them is a digit, for runs on `digits`.

For pairs of test images of different classes, the point half-way between their features is run backwards, rounded to
the data's levels, and compared with the pixel cross-fade of the same pair. An independent judge, five networks trained
on the pixels of the training images, names them all. The table shows, for each run:

- accuracy: of the model itself on the test images, in percent;
- out of range: the pixels outside [0, 1], in percent;
- named: the images of which the judge names one of the two ends, in percent;
- gap closed: how far the judge's mean largest probability is from that of the cross-fades, on the way to that of real
  test images, in percent;
- distance: the mean of |image - cross-fade| over the pixels.

    python benchmarks/walks.py RUN [RUN ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from invflow.diagnostics.interpolation import interpolate
from invflow.training.run import task_of_run
from invflow.training.run_folder import Run
from invflow.training.tasks import Task, evaluating

PAIRS = 200
SEED = 2026
"""Of the pairs, which no recipe was chosen by."""
NETS = 5


def pairs(labels: Tensor, count: int, seed: int) -> Tensor:
    """The positions of pairs of samples of different classes, ``(count, 2)``."""
    both = torch.randint(len(labels), (2 * count, 2), generator=torch.Generator().manual_seed(seed))
    return both[labels[both[:, 0]] != labels[both[:, 1]]][:count]


class Judge:
    """Some networks that know the training images, and name others by the mean of their probabilities.

    Args:
        images: ``(n, 1, 8, 8)``.
        labels: ``(n,)``.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        nets = [MLPClassifier((128,), max_iter=1000, random_state=seed, alpha=0.01) for seed in range(NETS)]
        self._nets = [net.fit(images.flatten(1).numpy(), labels.numpy()) for net in nets]

    def __call__(self, images: Tensor) -> Tensor:
        """The probabilities of the classes, ``(n, 10)``."""
        found = [torch.from_numpy(net.predict_proba(images.flatten(1).numpy())) for net in self._nets]
        return torch.stack(found).mean(0)


def measured(task: Task[Any], count: int = PAIRS, seed: int = SEED) -> dict[str, float]:
    """The row of the table for a trained model on digits."""
    train, test = (samples.first(len(samples)) for samples in (task.data.train, task.data.test))
    assert train.labels is not None
    assert test.labels is not None
    judge = Judge(train.values, train.labels)
    chosen = pairs(test.labels, count, seed)
    a, b = (test.rows(chosen[:, i]) for i in (0, 1))
    with evaluating(task.model):
        walks = interpolate(task.model.bijection, task.centered(a.values), task.centered(b.values), 3)
    images, fades = task.rounded(walks[:, 1]), (a.values + b.values) / 2
    of_images, of_fades, of_real = (judge(one) for one in (images.clamp(0, 1), fades, test.values))
    named = (of_images.argmax(1)[:, None] == test.labels[chosen]).any(1)
    sure = [float(one.max(1).values.mean()) for one in (of_images, of_fades, of_real)]
    return {
        "accuracy": 100 * task.evaluate().scores["test_accuracy"],
        "out of range": 100 * float(((images < 0) | (images > 1)).float().mean()),
        "named": 100 * float(named.float().mean()),
        "gap closed": 100 * (sure[0] - sure[1]) / (sure[2] - sure[1]),
        "distance": float((images - fades).abs().mean()),
        "judge's accuracy": 100 * float((of_real.argmax(1) == test.labels).float().mean()),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seed", type=int, default=SEED, help="of the pairs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {str(run): measured(task_of_run(Run.open(run)), options.pairs, options.seed) for run in options.runs}
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("run", *next(iter(rows.values())))
    for run, row in rows.items():
        table.add_row(run, *(f"{value:.3f}" if name == "distance" else f"{value:.1f}" for name, value in row.items()))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
