"""The evaluation of a trained run: its scores, and how exactly its chain is inverted."""

from __future__ import annotations

from pathlib import Path

from ..models import Classifier, Flow
from ..samples import DataSet
from .run import Run, device_of
from .tasks import Evaluation, task_of


def evaluate(model: Classifier | Flow, data: DataSet, device: str = "auto") -> Evaluation:
    """The scores on all test samples, and the chain's round trips; see `device_of` for the device."""
    return task_of(model, data, device_of(device)).evaluate()


def evaluate_run(run: Run, data_root: Path | None = None, device: str = "auto") -> Evaluation:
    """`evaluate` for the model of a run, on the data that its spec names."""
    return run.task(data_root, device).evaluate()
