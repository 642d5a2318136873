"""Training and evaluation of each kind of model."""

from __future__ import annotations

from typing import Any

import torch

from ...models import Classifier, Flow
from ..data import DataSet
from .base import CPU, Evaluation, Score, Task
from .classification import Classification
from .density import Density

__all__ = ["CPU", "Classification", "Density", "Evaluation", "Score", "Task", "task_of"]


def task_of(model: Classifier | Flow, data: DataSet, device: torch.device = CPU) -> Task[Any]:
    """The task of training or evaluating this model on these data."""
    return Density(model, data, device) if isinstance(model, Flow) else Classification(model, data, device)
