"""Several specs, each trained with several seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..spec.document import Spec
from .data import load_data
from .evaluate import evaluate
from .run import check_trainable, folder_name, overridden, train


@dataclass
class Row:
    """What a comparison found for one spec.

    Attributes:
        test_accuracy: one number per seed, 0 to 1.
        round_trip_error: relative, float32, eval mode, the worst of all seeds; None where the head has hidden layers.
        seconds: of training, one number per seed.
    """

    spec: str
    parameters: int = 0
    test_accuracy: list[float] = field(default_factory=list)
    round_trip_error: float | None = None
    seconds: list[float] = field(default_factory=list)


def compare(
    specs: list[tuple[str, Spec]],
    seeds: int,
    folder: Path,
    *,
    overrides: dict[str, Any] | None = None,
    announce: Callable[[str], None] = print,
    **options: Any,
) -> list[Row]:
    """Trains each spec with the seeds 0 .. ``seeds`` - 1 into run folders of their own below ``folder``.

    Args:
        specs: ``(name, spec)`` pairs.
        seeds: how many trainings of each.
        folder: where the runs go: ``folder/<spec's name>-<position>/seed-<seed>``.
        overrides: as in `train`.
        announce: called with a line before and after each training.
        **options: as in `train`: data_root, download, progress.
    """
    for _, spec in specs:  # before the first hour is spent on another one
        check_trainable(
            overridden(spec, overrides or {}), options.get("data_root"), download=options.get("download", False)
        )
    rows = []
    for position, (name, spec) in enumerate(specs):
        row = Row(name)
        rows.append(row)
        errors: list[float] = []
        for seed in range(seeds):
            announce(f"{name}: seed {seed} ({seed + 1} of {seeds})")
            place = folder / f"{folder_name(spec)}-{position}" / f"seed-{seed}"
            run = train(spec, place, overrides={**(overrides or {}), "seed": seed}, **options)
            model = run.load()
            found = evaluate(model, load_data(run.training.data, options.get("data_root")))
            run.update(test_accuracy=found.test_accuracy)
            row.parameters = found.parameters
            row.test_accuracy.append(found.test_accuracy)
            row.seconds.append(run.record["seconds"])
            if found.invertible:
                errors.append(found.round_trips["float32", "eval"].relative)
            announce(f"{name}: seed {seed}: test accuracy {found.test_accuracy:.2%}, {run.record['seconds']:.0f} s")
        if errors:
            row.round_trip_error = float(torch.tensor(errors).max())  # NaN where any is: Python's max would lose it
    return rows
