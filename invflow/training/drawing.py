"""Pictures of a model that is still being trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from ..spec.build import build_model
from ..state import common_dtype
from .module import ModelTraining, evaluation_draws
from .run_folder import PICTURES

if TYPE_CHECKING:
    from .run_folder import Run


def draw_so_far(run: Run, module: ModelTraining, weights: Mapping[str, Tensor], epoch: int) -> None:
    """Draw the pictures of a task after an epoch, counted from 1, each time with the same random numbers.

    They are drawn by another model with the same weights, so that the mode, the device and the buffers of the one
    that is trained stay as they are.
    """
    from ..diagnostics.pictures import write_figure

    task = module.task
    with evaluation_draws(0):
        model = build_model(run.spec)
        model.to(common_dtype(module.result)).load_state_dict(weights)
        for name, figure in type(task)(model, task.data, module.device).figures().items():
            write_figure(figure, run.folder / PICTURES / f"{name}-{epoch:04d}.png")
