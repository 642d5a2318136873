"""What it means to train a model of each kind."""

from __future__ import annotations

from typing import Any

from ...models import Classifier, Flow
from ..data import DataSet
from .base import Evaluation, Score, Task
from .classification import Classification
from .density import Density

__all__ = ["Classification", "Density", "Evaluation", "Score", "Task", "task_of"]

_TASKS: dict[type[Classifier | Flow], type[Task[Any]]] = {Classifier: Classification, Flow: Density}


def task_of(model: Classifier | Flow, data: DataSet) -> Task[Any]:
    """The task of training this model on these data."""
    return _TASKS[type(model)](model, data)
