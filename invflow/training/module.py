"""The Lightning module of a classifier."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from ..models import Classifier
from ..spec.training import SGD, AdamW, OneCycle, Optimizer, Schedule, Training
from .augment import Augment
from .data import Images, seed_at, train_loader


class ClassifierTraining(lightning.LightningModule):
    """Cross-entropy training of a classifier, as a spec's training block says.

    Args:
        model: the classifier.
        options: the spec's training block.
        images: the training images.
        classes: how many labels there are.
    """

    def __init__(self, model: Classifier, options: Training, images: Images, classes: int) -> None:
        super().__init__()
        self.images = images
        self.model = model
        self.options = options
        self.augment = Augment(options.data.augmentation) if options.data.augmentation else nn.Identity()
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)  # type: ignore[no-any-return]

    # The seed and how far training has come decide the order of the images, the augmentation and the dropout, so that
    # a resumed training sees what an uninterrupted one would have. (The trainer asks for a new loader every epoch.)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        seed = seed_at(self.options.seed, self.current_epoch)
        return train_loader(self.images, self.options.batch_size, seed)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        torch.manual_seed(seed_at(self.options.seed, self.global_step))
        logits = self.model(self.augment(images))
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing)
        self._log("train", loss, logits, labels)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, labels = batch
        logits = self.model(images)
        self._log("test", nn.functional.cross_entropy(logits, labels), logits, labels)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.options.optimizer, self.model)
        if self.options.schedule is None:
            return optimizer
        scheduler = make_schedule(self.options.schedule, optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _log(self, stage: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        accuracy = self.train_accuracy if stage == "train" else self.test_accuracy
        accuracy.update(logits, labels)
        values: dict[str, Tensor | Metric] = {f"{stage}_loss": loss, f"{stage}_accuracy": accuracy}
        self.log_dict(values, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))


def make_optimizer(options: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that a spec names, over the model's parameters."""
    arguments = options.model_dump(exclude={"type"})
    kind = torch.optim.SGD if isinstance(options, SGD) else torch.optim.AdamW if isinstance(options, AdamW) else None
    return (kind or torch.optim.Adam)(model.parameters(), **arguments)


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
            cycle_momentum=False,  # the spec's momentum stays what it says
        )
    return CosineAnnealingLR(optimizer, T_max=steps, eta_min=options.final_lr)
