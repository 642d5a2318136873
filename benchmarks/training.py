"""What `invflow train` adds to a plain PyTorch loop with the same steps, on the CPU, in one process.

Both take the same batches in the same order, with the same optimiser, schedule and gradient clipping. The plain loop
takes whole batches from PyTorch's loader, and its optimiser is as PyTorch makes it by default. They take turns, an
epoch each, because machines have phases; a ratio is that of an epoch of ours to the plain one that follows. The ends of
epochs are included, with what is saved and logged there; set-up and evaluation are not.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

import invflow
from invflow.samples import Batch, Samples
from invflow.spec.document import Spec
from invflow.training import run as runs
from invflow.training.augment import Augment
from invflow.training.data import load_data, seed_at
from invflow.training.module import ModelTraining, make_schedule

SPECS = {"digits": ("../specs/irevnet_digits.json", 1.15), "mnist": ("../specs/irevnet_mnist.json", 1.10)}
"""The spec, and the ratio that is allowed."""


class Whole(Dataset[Batch]):
    """Batches of samples, by their positions."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, positions: torch.Tensor) -> Batch:
        return self.samples.take(positions)


def plain_epochs(spec: Spec) -> Iterator[None]:
    """A loop that trains the spec's classifier, and stops after each epoch."""
    options = spec.training
    assert options is not None
    data = load_data(options.data).train
    torch.manual_seed(options.seed)
    model = invflow.build_model(spec).train()
    augment: Any = Augment(options.data.augmentation) if options.data.augmentation else nn.Identity()
    kinds: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizer = kinds[options.optimizer.type](model.parameters(), **options.optimizer.model_dump(exclude={"type"}))
    steps = options.epochs * math.ceil(len(data) / options.batch_size)
    schedule = None if options.schedule is None else make_schedule(options.schedule, optimizer, steps)
    for epoch in range(options.epochs):
        order = data.order(torch.Generator().manual_seed(seed_at(options.seed, epoch)))
        for batch in DataLoader(Whole(data), sampler=torch.split(order, options.batch_size), batch_size=None):
            optimizer.zero_grad()
            logits = model(augment(batch.values))
            loss = nn.functional.cross_entropy(logits, batch.labels, label_smoothing=options.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            if options.clip_gradient is not None:
                nn.utils.clip_grad_norm_(model.parameters(), options.clip_gradient)
            optimizer.step()
            if schedule is not None:
                schedule.step()
        yield


class Turns:
    """Epochs of `invflow train` and of the plain loop in turns.

    Attributes:
        ratios: the seconds of an epoch of ours by those of the plain one that followed it.
    """

    def __init__(self, spec: Spec) -> None:
        self.ratios: list[float] = []
        self._plain = plain_epochs(spec)
        self._began: float | None = None

    def __call__(self, training: ModelTraining) -> None:
        """At the begin of an epoch of ours: run one of the plain loop, if one of ours has ended."""
        training.values = {}
        if self._began is not None:
            ours = time.perf_counter() - self._began
            began = time.perf_counter()
            next(self._plain)
            self.ratios.append(ours / (time.perf_counter() - began))
        self._began = time.perf_counter()


def ratios(spec: Spec) -> list[float]:
    """The ratios of a training's epochs, the last left out."""
    turns = Turns(spec)
    begin = patch.object(ModelTraining, "on_train_epoch_start", lambda training: turns(training))  # noqa: PLW0108  (a method must be a function)
    with tempfile.TemporaryDirectory() as folder, begin:
        runs.train(spec, Path(folder) / "run", overrides={"accelerator": "cpu"}, progress=False)
    return turns.ratios


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="trainings")
    parser.add_argument("--epochs", type=int, help="of a training; the default is the spec's")
    parser.add_argument("--specs", nargs="+", default=list(SPECS), choices=list(SPECS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # Lightning's import sets it; a plain loop does without both
    table = Table("spec", "epochs", "invflow train / plain loop", "quartiles", "allowed")
    for name in given.specs:
        path, allowed = SPECS[name]
        spec = invflow.load_spec(path)
        options = {
            "evaluate_every": 1000,
            "midpoints": None,
            **({} if given.epochs is None else {"epochs": given.epochs}),
        }
        spec = spec.replace(training={**spec.expanded["training"], **options})
        found = [one for _ in range(given.rounds) for one in ratios(spec)]
        low, median, high = statistics.quantiles(found, n=4)
        table.add_row(name, str(len(found)), f"{median:.3f}", f"{low:.3f} to {high:.3f}", f"{allowed:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
