"""Runs in other numerics: a trained run becomes one that is exact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..diagnostics.images_back import images_back
from ..errors import RunError
from ..models.freezing import freeze
from ..numerics import Mode
from ..spec import to_spec
from .classification import Classification
from .run import task_of_run, versions
from .run_folder import Run, begin, owned, require_empty
from .tasks import FREEZING_SAMPLES, Task, evaluating

INVERTED_IMAGES = 10_000


@dataclass(frozen=True)
class Frozen:
    """The result of freezing a run, measured on the test images.

    Attributes:
        accuracy_before: of the run's model, from 0 to 1.
        accuracy_after: of the frozen model.
        images: the number of test images that were inverted, the first ones.
        bit_equal: the number of images that are reconstructed without one wrong bit, by the way of inversion; empty if
            the head hides the chain.
        caveat: see `invflow.models.caveat`.
    """

    accuracy_before: float
    accuracy_after: float
    images: int
    bit_equal: dict[str, int]
    caveat: str


def freeze_run(
    run: Run,
    folder: Path,
    numerics: Mode,
    data_root: Path | None = None,
    device: str = "auto",
    named: dict[str, Any] | None = None,
) -> tuple[Run, Frozen]:
    """Write a trained run's model in other numerics into a new run folder.

    The ranges of activations are measured on the run's training images, on the CPU: the frozen model does not depend on
    the device.

    Args:
        run: a trained run that is not exact.
        folder: the new run folder, empty or absent.
        numerics: the numerics of the new run.
        data_root: see `load_data`.
        device: where both models are evaluated; see `device_of`.
        named: the document of other data than those of the run's spec.

    Raises:
        RunError: the folder is not empty, another process writes there, or the run is of a flow.
        NumericsError: the model cannot have these numerics.
        InvflowError: this machine does not have the device.
    """
    require_empty(folder)
    task: Task[Any] = task_of_run(run, data_root, device, named)
    if not isinstance(task, Classification):
        raise RunError(f"{run.folder}: a density, whose data are off the grid; freeze expects the run of a classifier")
    seen = task.data.train.first(FREEZING_SAMPLES)
    after, place = freeze(task.model, seen.values, numerics, seen.context), task.float64_device
    tested = task.data.test.first(INVERTED_IMAGES)
    with evaluating(after, place):
        reaches = after.linear_head and tested.context is None
        bit_equal = images_back(after.bijection, tested.values.to(place)) if reaches else {}
    before, frozen_task = task.evaluate(), Classification(after, task.data, place)
    accuracy, images = frozen_task.evaluate().test_accuracy, len(tested.values)
    found = Frozen(before.test_accuracy, accuracy, images, bit_equal, after.caveat)
    document: dict[str, Any] = {key: run.spec.expanded[key] for key in ("name", "training") if key in run.spec.expanded}
    record: dict[str, Any] = {"frozen_from": str(run.folder), "versions": versions()}
    record |= {key: run.record[key] for key in ("name", "status", "why", "epochs_done") if key in run.record}
    record |= {"seconds": run.record.get("seconds", 0.0), "test_accuracy": found.accuracy_after}
    with owned(folder):
        frozen = begin(folder, {**document, **to_spec(after)}, after, record)
    return frozen, found
