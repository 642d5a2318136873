"""What a trained model is worth: its scores, and how exactly its chain runs backwards."""

from __future__ import annotations

from pathlib import Path

from ..models import Classifier, Flow
from .data import DataSet, load_data
from .run import Run
from .tasks import Evaluation, task_of


def evaluate(model: Classifier | Flow, data: DataSet) -> Evaluation:
    """The scores on all test samples, and the chain's round trips."""
    return task_of(model, data).evaluate()


def evaluate_run(run: Run, data_root: Path | None = None) -> Evaluation:
    """`evaluate` for the model of a run, on the data that its spec names."""
    return evaluate(run.load(), load_data(run.training.data, data_root))
