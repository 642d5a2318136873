"""A learning rate that suits a model, found by a short trial."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import lightning
from lightning.pytorch.tuner.tuning import Tuner

from ..errors import InvflowError
from ..spec.training import Training
from .fit import quiet_lightning
from .processes import accelerator
from .tasks import Task

TRIAL_STEPS = 100


def find_lr(task: Task[Any], options: Training) -> float:
    """The learning rate at which the loss of a copy of the model falls fastest, as Lightning's finder suggests it.

    The rate rises from step to step, from 1e-8 to 1, until the loss grows. Each of several processes does the same.

    Raises:
        InvflowError: the loss does not fall at any rate.
    """
    trial = copy.copy(task)
    trial.model = copy.deepcopy(task.model)
    module = trial.training(trial, options.model_copy(update={"schedule": None, "warmup": None, "average": None}))
    module.on_trial = True
    hardware = options.hardware
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        trainer = lightning.Trainer(
            max_epochs=-1,
            **accelerator(hardware.accelerator),
            accumulate_grad_batches=options.accumulate,
            gradient_clip_val=options.clip_gradient,
            inference_mode=False,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        found = Tuner(trainer).lr_find(module, num_training=TRIAL_STEPS, update_attr=False)
    rate = None if found is None else found.suggestion()
    if rate is None:
        raise InvflowError("find_lr found no learning rate at which the loss falls; give one with --lr")
    return float(f"{rate:.3g}")
