"""The Lightning module that all trainings share, optimisers and schedules."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader
from torchmetrics import Metric

from ..errors import DivergedError
from ..samples import Batch
from ..spec.training import OneCycle, Optimizer, Schedule, Training
from .augment import Augment
from .data import seed_at, train_loader

if TYPE_CHECKING:
    from .tasks import Task


class ModelTraining(lightning.LightningModule):
    """The order of samples, augmentation, seeds, optimiser and schedule that a spec's training block describes.

    Each kind of model overrides `measure`.

    Args:
        task: the model and its data.
        options: the spec's training block.
    """

    def __init__(self, task: Task[Any], options: Training) -> None:
        super().__init__()
        self.task = task
        self.model: nn.Module = task.model
        self.options = options
        self.augment = Augment(options.data.augmentation) if options.data.augmentation else nn.Identity()

    @abstractmethod
    def measure(self, stage: str, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor | Metric]]:
        """The loss of a batch, and other quantities to log.

        Args:
            stage: "train", "val" or "test".
            batch: samples of the data set; augmented in training.
        """

    # The seed and the epoch or step determine the order of the samples and every random number: augmentation, noise,
    # dropout, probes of log-determinants. A resumed training therefore repeats what an uninterrupted one would do. (The
    # trainer requests a new loader every epoch.)

    def train_dataloader(self) -> DataLoader[Batch]:
        seed = seed_at(self.options.seed, self.current_epoch)
        return train_loader(self.task.data.train, self.options.batch_size, seed)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        torch.manual_seed(seed_at(self.options.seed, self.global_step))
        loss = self._measure("train", batch._replace(values=self.augment(batch.values)))
        if not loss.isfinite():
            self.refuse(f"the loss is {loss.item()}")
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        with evaluation_draws(index):
            self._measure(self.task.data.judge[0], batch)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.options.optimizer, self.model)
        if self.options.schedule is None:
            return optimizer
        scheduler = make_schedule(self.options.schedule, optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def refuse(self, why: str) -> None:
        """End the training: raise DivergedError."""
        place = f"epoch {self.current_epoch + 1}, step {self.global_step}"
        advice = "try a lower learning rate (--lr), or clip_gradient in the spec's training block"
        raise DivergedError(f"training diverged in {place}: {why}; {advice}")

    def _measure(self, stage: str, batch: Batch) -> Tensor:
        loss, more = self.measure(stage, batch)
        known = {f"{stage}_loss": loss, **{f"{stage}_{name}": value for name, value in more.items()}}
        self.log_dict(known, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch.values))
        return loss


@contextlib.contextmanager
def evaluation_draws(seed: int) -> Iterator[None]:
    """Seed the random numbers inside of the context and leave those outside unchanged. Each batch has its own seed."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def make_optimizer(options: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that a spec names, over the model's parameters."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    made: torch.optim.Optimizer = kinds[options.type](model.parameters(), **options.model_dump(exclude={"type"}))
    return made


def make_schedule(options: Schedule, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """The learning-rate schedule that a spec names, over ``steps`` optimiser steps."""
    peak = optimizer.param_groups[0]["lr"]
    if isinstance(options, OneCycle):
        return OneCycleLR(
            optimizer,
            max_lr=peak,
            total_steps=steps,
            pct_start=options.warmup,
            div_factor=options.start_factor,
            final_div_factor=options.final_factor,
            cycle_momentum=False,  # the spec's momentum is constant
        )
    return CosineAnnealingLR(optimizer, T_max=steps, eta_min=options.final_lr)
