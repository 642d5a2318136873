"""Runs in other numerics: a trained run becomes one that is exact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..diagnostics.images_back import images_back
from ..errors import RunError
from ..models import Classifier
from ..models.freezing import freeze
from ..numerics import Mode
from ..spec import to_spec
from ..spec.checkpoint import read_checkpoint_spec, write_checkpoint
from .data import load_data
from .evaluate import evaluate
from .run import Run, require_empty, versions


@dataclass(frozen=True)
class Frozen:
    """What freezing a run came to, on the test images.

    Attributes:
        accuracy_before: 0 to 1.
        accuracy_after: likewise, of the frozen model.
        images: how many test images there are.
        bit_equal: how many of them come back without one wrong bit, by the way in which they are inverted.
    """

    accuracy_before: float
    accuracy_after: float
    images: int
    bit_equal: dict[str, int]


def freeze_run(run: Run, folder: Path, numerics: Mode, data_root: Path | None = None) -> tuple[Run, Frozen]:
    """Writes a trained run's model in other numerics into a run folder of its own.

    What has to be learned from data, the ranges of activations, is read off the run's training images.

    Args:
        run: trained, not exact already.
        folder: empty or absent.
        numerics: of the new run.
        data_root: see `load_data`.

    Raises:
        RunError: the folder holds something.
        NumericsError: the model cannot be so exact.
    """
    require_empty(folder)
    if folder.resolve() == run.folder.resolve():
        raise RunError(f"{folder}: is the run itself; name another folder with --out")
    data = load_data(run.training.data, data_root)
    before = run.load()
    if not isinstance(before, Classifier):
        raise RunError(f"{run.folder}: a density, whose data lie on no grid; freeze expects the run of a classifier")
    after = freeze(before, data.train.values, numerics)
    found = Frozen(
        accuracy_before=evaluate(before, data).scores["test_accuracy"],
        accuracy_after=evaluate(after, data).scores["test_accuracy"],
        images=len(data.test),
        bit_equal=images_back(after.bijection, data.test.values),
    )
    document: dict[str, Any] = {key: run.spec.expanded[key] for key in ("name", "training") if key in run.spec.expanded}
    write_checkpoint({**document, **to_spec(after)}, after.state_dict(), folder)
    frozen = Run(folder, read_checkpoint_spec(folder)[0], {})
    frozen.update(
        name=run.spec.name,
        status="finished",
        frozen_from=str(run.folder),
        versions=versions(),
        epochs_done=run.record.get("epochs_done"),
        seconds=run.record.get("seconds", 0.0),
        test_accuracy=found.accuracy_after,
    )
    return frozen, found
