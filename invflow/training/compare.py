"""Several specs, each trained with several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import DivergedError, InvflowError
from ..spec.document import Spec
from ..spec.training import Training
from .run import check_trainable, overridden, task_of_run, train
from .run_folder import folder_name
from .tasks import Score

_UNTESTED = {"train_size", "validation_size", "augmentation"}  # of the data, what does not change the test samples
_COMPARED = 1000


@dataclass
class Row:
    """The results of one spec.

    Attributes:
        scores: one number per seed by the name of the score in ``run.json``, for example ``test_accuracy``; NaN if the
            training diverged.
        round_trip_error: relative, float32, eval mode, the largest of all seeds; None if the head hides the chain, or
            all trainings diverged.
        caveat: see `invflow.models.caveat`.
        seconds: the duration of each training that did not diverge.
    """

    spec: str
    parameters: int
    diverged: int = 0
    scores: dict[str, list[float]] = field(default_factory=dict)
    round_trip_error: float | None = None
    caveat: str = ""
    seconds: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The row as JSON data, with each score under its own name."""
        rest = {"round_trip_error": self.round_trip_error, "caveat": self.caveat, "seconds": self.seconds}
        return {"spec": self.spec, "parameters": self.parameters, "diverged": self.diverged, **self.scores, **rest}


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        score: the main score of the models.
        rows: one for each spec.
    """

    score: Score
    rows: list[Row]

    def values(self, row: Row) -> list[float]:
        """The main score of a row, one number per seed, in the score's unit."""
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
    """Train each spec with the seeds 0 .. ``seeds`` - 1, each in its own run folder below ``folder``.

    Args:
        specs: ``(name, spec)`` pairs.
        seeds: the number of trainings of each spec.
        folder: the run folders are ``folder/<spec's name>-<position>/seed-<seed>``.
        overrides: as in `train`.
        announce: called with a line before and after each training.
        **options: as in `train`: data_root, download, progress.

    Raises:
        InvflowError: the specs do not have the same main score, some are classifiers and some flows, or they are not
            tested on the same samples.
    """
    overrides, data_root, download = overrides or {}, options.get("data_root"), options.get("download", False)
    # All specs are checked before any is trained.
    changed = [overridden(spec, overrides) for _, spec in specs]
    for spec in changed:
        if spec.training is not None and spec.training.hardware.devices * spec.training.hardware.nodes > 1:
            raise spec.error(("training", "hardware"), "compare trains in one process; leave devices and nodes out")
    tasks = [check_trainable(spec, data_root, download=download) for spec in changed]
    score = tasks[0].score
    for (name, _), task in zip(specs, tasks, strict=True):
        if task.score != score:
            found = f"{specs[0][0]} has {score.label}, {name} has {task.score.label}"
            raise InvflowError(f"compare expects models with the same score: {found}")
    tested = [
        (spec.training or Training()).data.model_dump_json(exclude=_UNTESTED, exclude_defaults=True) for spec in changed
    ]
    for (name, _), task, data in zip(specs, tasks, tested, strict=True):
        first, other = tasks[0].data.test, task.data.test
        same = len(first) == len(other) and torch.equal(first.first(_COMPARED).values, other.first(_COMPARED).values)
        if not same:
            found = f"{specs[0][0]} has {tested[0]}, {name} has {data}"
            raise InvflowError(f"compare expects specs with the same test samples: {found}")
    rows = [
        Row(name, task.parameters(), caveat=task.model.caveat) for (name, _), task in zip(specs, tasks, strict=True)
    ]
    for position, ((name, spec), row) in enumerate(zip(specs, rows, strict=True)):
        for seed in range(seeds):
            announce(f"{name}: seed {seed} ({seed + 1} of {seeds})")
            place = folder / f"{folder_name(spec)}-{position}" / f"seed-{seed}"
            try:
                run = train(spec, place, overrides={**overrides, "seed": seed}, **options)
            except DivergedError as error:  # the other trainings continue
                announce(str(error))
                row.scores.setdefault(f"test_{score.name}", []).append(math.nan)
                row.diverged += 1
                continue
            result = task_of_run(run, data_root, run.training.hardware.accelerator).evaluate()
            run.update(**result.scores)
            for key, value in result.scores.items():
                row.scores.setdefault(key, []).append(value)
            row.seconds.append(run.record["seconds"])
            if result.invertible:
                errors = [row.round_trip_error or 0.0, result.round_trips["float32", "eval"].relative]
                row.round_trip_error = float(torch.tensor(errors).max())  # keeps NaN, which Python's max may lose
            announce(f"{name}: seed {seed}: {result.summary()}, {run.record['seconds']:.0f} s")
    return Comparison(score, rows)
