"""Several specs, each trained with several seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import DivergedError, InvflowError
from ..spec.document import Spec
from .evaluate import evaluate_run
from .run import check_trainable, folder_name, overridden, train
from .tasks import Score


@dataclass
class Row:
    """What a comparison found for one spec.

    Attributes:
        scores: by its name in ``run.json``, ``test_accuracy`` for example, one number per seed; NaN where it diverged.
        round_trip_error: relative, float32, eval mode, the worst of all seeds; None where the head has hidden layers.
        seconds: of training, one number per seed.
    """

    spec: str
    parameters: int = 0
    scores: dict[str, list[float]] = field(default_factory=dict)
    round_trip_error: float | None = None
    seconds: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The row as JSON data, each score under its own name."""
        rest = dataclasses.asdict(self)
        return {"spec": rest.pop("spec"), "parameters": rest.pop("parameters"), **rest.pop("scores"), **rest}


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        score: what the models are measured by.
        rows: one for each spec.
    """

    score: Score
    rows: list[Row]

    def values(self, row: Row) -> list[float]:
        """The row's scores that count, one per seed, in the score's unit."""
        return [self.score.factor * value for value in row.scores[f"test_{self.score.name}"]]


def compare(
    specs: list[tuple[str, Spec]],
    seeds: int,
    folder: Path,
    *,
    overrides: dict[str, Any] | None = None,
    announce: Callable[[str], None] = print,
    **options: Any,
) -> Comparison:
    """Trains each spec with the seeds 0 .. ``seeds`` - 1 into run folders of their own below ``folder``.

    Args:
        specs: ``(name, spec)`` pairs.
        seeds: how many trainings of each.
        folder: where the runs go: ``folder/<spec's name>-<position>/seed-<seed>``.
        overrides: as in `train`.
        announce: called with a line before and after each training.
        **options: as in `train`: data_root, download, device, progress.

    Raises:
        InvflowError: the specs are not measured by the same score, as classifiers and flows are not.
    """
    data_root, download = options.get("data_root"), options.get("download", False)
    # All of them before the first hour is spent on one.
    tasks = [check_trainable(overridden(spec, overrides or {}), data_root, download=download) for _, spec in specs]
    score = tasks[0].score
    for (name, _), task in zip(specs, tasks, strict=True):
        if task.score != score:
            raise InvflowError(
                f"compare expects models that one score measures: {specs[0][0]} has {score.label}, "
                f"{name} has {task.score.label}"
            )
    rows = []
    for position, (name, spec) in enumerate(specs):
        row = Row(name)
        rows.append(row)
        errors: list[float] = []
        for seed in range(seeds):
            announce(f"{name}: seed {seed} ({seed + 1} of {seeds})")
            place = folder / f"{folder_name(spec)}-{position}" / f"seed-{seed}"
            try:
                run = train(spec, place, overrides={**(overrides or {}), "seed": seed}, **options)
            except DivergedError as error:  # the other trainings are not lost for it
                announce(str(error))
                row.scores.setdefault(f"test_{score.name}", []).append(math.nan)
                continue
            found = evaluate_run(run, data_root)
            run.update(**found.scores)
            row.parameters = found.parameters
            for key, value in found.scores.items():
                row.scores.setdefault(key, []).append(value)
            row.seconds.append(run.record["seconds"])
            if found.invertible:
                errors.append(found.round_trips["float32", "eval"].relative)
            announce(f"{name}: seed {seed}: {found.summary()}, {run.record['seconds']:.0f} s")
        if errors:
            row.round_trip_error = float(torch.tensor(errors).max())  # NaN where any is: Python's max would lose it
    return Comparison(score, rows)
