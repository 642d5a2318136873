"""What `invflow train` adds to a plain PyTorch loop with the same steps, on the CPU, in one process.

Both take the same batches in the same order, with the same optimiser, schedule and gradient clipping. Evaluation and
set-up are left out: the time of a training of few epochs is subtracted from that of one of many, whose last epoch alone
is evaluated. The end of each epoch is saved, as always.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import invflow
from invflow.spec.document import Spec
from invflow.training import run as runs
from invflow.training.augment import Augment
from invflow.training.data import load_data, seed_at, train_loader
from invflow.training.module import make_optimizer, make_schedule

SPECS = {"digits": ("../specs/irevnet_digits.json", 2, 22), "mnist": ("../specs/irevnet_mnist.json", 2, 10)}
"""The spec, and the numbers of epochs of the short and the long training."""
ALLOWED = {"digits": 1.15, "mnist": 1.10}


def plain(spec: Spec, epochs: int) -> float:
    """The seconds of a loop that trains the spec's classifier."""
    options = spec.training
    assert options is not None
    data = load_data(options.data).train
    torch.manual_seed(options.seed)
    model = invflow.build_model(spec).train()
    augment: Any = Augment(options.data.augmentation) if options.data.augmentation else nn.Identity()
    optimizer = make_optimizer(options.optimizer, model)
    steps = epochs * len(train_loader(data, options.batch_size, 0))
    schedule = None if options.schedule is None else make_schedule(options.schedule, optimizer, steps)
    started = time.perf_counter()
    for epoch in range(epochs):
        for batch in train_loader(data, options.batch_size, seed_at(options.seed, epoch)):
            optimizer.zero_grad()
            logits = model(augment(batch.values))
            loss = nn.functional.cross_entropy(logits, batch.labels, label_smoothing=options.label_smoothing)
            loss.backward()
            if options.clip_gradient is not None:
                nn.utils.clip_grad_norm_(model.parameters(), options.clip_gradient)
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return time.perf_counter() - started


def ours(spec: Spec, epochs: int) -> float:
    """The seconds of a training by `invflow train`."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs.train(spec, Path(folder) / "run", overrides={"epochs": epochs}, device="cpu", progress=False)
    return time.perf_counter() - started


def ratio(spec: Spec, short: int, long: int) -> float:
    """Seconds per epoch, ours to the plain loop's, of one round."""
    slope = {name: (work(spec, long) - work(spec, short)) / (long - short) for name, work in WORKS.items()}
    return slope["invflow train"] / slope["plain loop"]


WORKS = {"invflow train": ours, "plain loop": plain}


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--specs", nargs="+", default=list(SPECS), choices=list(SPECS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("spec", "invflow train / plain loop", "least", "most", "allowed")
    for name in given.specs:
        path, short, long = SPECS[name]
        spec = invflow.load_spec(path)
        spec = spec.replace(training={**spec.expanded["training"], "evaluate_every": 1000})
        ratio(spec, short, long)  # what the first training loads is loaded once
        found = [ratio(spec, short, long) for _ in range(given.rounds)]
        shown = (statistics.median(found), min(found), max(found), ALLOWED[name])
        table.add_row(name, *(f"{one:.3f}" for one in shown))
    Console().print(table)


if __name__ == "__main__":
    main()
