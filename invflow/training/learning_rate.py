"""A learning rate that suits a model, found by a short trial."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.tuner.tuning import Tuner

from ..errors import InvflowError
from ..spec.training import Training
from .fit import quiet_lightning
from .processes import accelerator
from .tasks import Task

TRIAL_STEPS = 100
SMOOTHED = 10
"""The number of steps whose mean loss counts."""
LEAST = 1e-6


def find_lr(task: Task[Any], options: Training) -> float:
    """A tenth of the rate up to which the loss of a copy of the model falls, in a trial by Lightning's finder.

    The rate rises from step to step, from 1e-6 to 1. (Where it falls fastest, which Lightning
    would suggest, is a matter of chance: the batches of a trial differ more than its small steps change.) Each of
    several processes makes the trial, and all take the rate of the first.

    Raises:
        InvflowError: the loss is not finite, or falls at no rate.
    """
    trial = copy.copy(task)
    trial.model = copy.deepcopy(task.model)
    plain = {"schedule": None, "warmup": None, "average": None, "accumulate": 1, "compile": False}
    module = trial.training(trial, options.model_copy(update=plain))
    module.trial = []
    hardware = options.hardware
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        trainer = lightning.Trainer(
            max_epochs=-1,
            **accelerator(hardware.accelerator, mine=True),
            gradient_clip_val=options.clip_gradient,
            inference_mode=False,
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):  # a bar of tqdm's
            # Its own end, at four times the smallest loss, would come at once with a loss below 0.
            limits: dict[str, Any] = {"min_lr": LEAST, "num_training": TRIAL_STEPS, "early_stop_threshold": None}
            Tuner(trainer).lr_find(module, update_attr=False, **limits)
    losses = torch.tensor([module.trial]).nan_to_num(nan=math.inf)  # Lightning's means of them begin too low
    if losses.shape[1] < SMOOTHED:
        raise InvflowError("find_lr expects a loss that is finite for some steps; give a learning rate with --lr")
    means = torch.nn.functional.avg_pool1d(losses, SMOOTHED)[0]
    best = int(means.argmin())
    if best == 0 or not math.isfinite(means[best]):
        raise InvflowError("find_lr found no learning rate at which the loss falls; give one with --lr")
    return float(f"{LEAST ** (1 - (best + 0.5) * SMOOTHED / TRIAL_STEPS) / 10:.3g}")
