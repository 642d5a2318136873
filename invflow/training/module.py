"""The Lightning module that all trainings share, optimisers and schedules."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .._torch import is_shard
from ..draws import rows_of
from ..errors import DivergedError, InvflowError
from ..samples import Batch, as_batch
from ..spec.training import Cosine, MultiStep, OneCycle, Optimizer, Plateau, Training
from .augment import Augment
from .data import Share, Sharing, batches_of, seed_at, train_loader
from .divergence import broken_weight, culprit
from .midpoints import MidpointLoss
from .processes import shard

if TYPE_CHECKING:
    from .tasks import Task


@dataclass
class Averages:
    """Averages over the samples of an epoch, in float64.

    Attributes:
        samples: how many there were.
        sums: of each quantity, over the samples.

    Examples:
        >>> averages = Averages()
        >>> averages.add({"loss": torch.tensor(1.0)}, 3)
        >>> averages.add({"loss": torch.tensor(5.0)}, 1)
        >>> averages.means()
        {'loss': 2.0}
    """

    samples: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, means: Mapping[str, Tensor], samples: int) -> None:
        """Add the mean values of a batch."""
        self.samples += samples
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + (samples * mean.item() if samples else 0.0)

    def of_all(self, reduce: Callable[[Tensor], Tensor]) -> Averages:
        """The averages over the samples of all processes, given the sum of a tensor over them."""
        names = sorted(self.sums)
        mine = torch.tensor([float(self.samples), *(self.sums[name] for name in names)], dtype=torch.float64)
        samples, *sums = reduce(mine).tolist()
        return Averages(int(samples), dict(zip(names, sums, strict=True)))

    def means(self) -> dict[str, float]:
        """The averages."""
        return {name: total / self.samples for name, total in self.sums.items()}


class ModelTraining(lightning.LightningModule):
    """The order of samples, augmentation, seeds, optimiser and schedule that a spec's training block describes.

    Each kind of model overrides `measure`.

    Args:
        task: the model and its data.
        options: the spec's training block.

    Attributes:
        batches_done: the number of batches of this epoch that were trained on.
        sharing: how processes, and the parts of a step, share batches.
        values: the averages of this epoch, by their names in logs.
        in_run: whether a run logs them, which takes less time than Lightning's `log`.
        shards: whether each of several processes has only a part of the weights.
        trial: the losses of a trial of learning rates, which ends at none that is not finite; None if it is no trial.
    """

    def __init__(self, task: Task[Any], options: Training) -> None:
        super().__init__()
        self.task = task
        self.model = task.model
        self.options = options
        self.augment = Augment(options.data.augmentation) if options.data.augmentation else nn.Identity()
        self.batches_done = self._parts_done = 0
        self.sharing = Sharing(parts=options.accumulate)
        self.values: dict[str, float] = {}
        self.in_run = False
        self.shards = False
        self.trial: list[float] | None = None
        self.__dict__["_compiled"] = None  # no module of its own: weights keep their names
        self.midpoints: MidpointLoss | None = None
        self._midpoints_begin = 0.0
        if options.midpoints is not None:
            self.midpoints = MidpointLoss(task, options.midpoints)
        self.averaged: AveragedModel | None = None
        if options.average is not None:
            average: Any = get_ema_multi_avg_fn
            self.averaged = AveragedModel(task.model, multi_avg_fn=average(options.average.decay))
            self.averaged.requires_grad_(False)  # or several processes would wait for its gradients
        self._averages = {"train": Averages(), task.data.judge[0]: Averages()}

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes the hook that it calls, 50 times a step, where ``nn.Module`` would look for parameters."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @property
    def result(self) -> nn.Module:
        """The model that is evaluated and saved: the one that is trained, or its moving average."""
        return self.model if self.averaged is None else self.averaged.module

    @property
    def between_steps(self) -> bool:
        """Whether no part of a step is done alone."""
        return self._parts_done == 0

    def model_in(self, stage: str) -> Any:
        """The model that is measured in a stage, "train" or another."""
        if stage != "train":
            return self.result
        if not self.options.compile:
            return self.model
        if self._compiled is None:
            self.__dict__["_compiled"] = torch.compile(self.model)
        return self._compiled

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)

    # Where Lightning or PyTorch would take a tenth of a millisecond of each step, as much as a small layer:

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.gradient_clip_val is not None:
            super().configure_gradient_clipping(*args, **kwargs)

    @abstractmethod
    def measure(self, stage: str, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of a batch, and other quantities to log.

        Args:
            stage: "train", "val" or "test".
            batch: samples of the data set; augmented in training.
        """

    def configure_model(self) -> None:
        """Shard the weights, if several processes share them; the task's model stays whole, for the end of a run."""
        if self.shards and self.model is self.task.model:
            self.model = copy.deepcopy(self.model)
            if self.device.type == "cuda":  # as Lightning does itself for ddp
                self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # type: ignore[no-untyped-call]
            assert self.device_mesh is not None  # a strategy that shards has made it
            mesh = self.device_mesh["data_parallel"]
            for model in (self.model, *([] if self.averaged is None else [self.averaged.module])):
                shard(model, mesh)

    # The seed and the epoch or step determine the order of the samples and every random number: augmentation, noise,
    # dropout, probes of log-determinants. A resumed training therefore repeats what an uninterrupted one would do. (The
    # trainer requests a new loader every epoch.)

    def begin_in_epoch(self, batches_done: int, averages: Mapping[str, Any]) -> None:
        """Begin after some batches of an epoch, with what `averages_so_far` returned there."""
        self.batches_done = batches_done
        if self.sharing.rank == 0:  # they are of all processes
            self._averages["train"] = Averages(**averages)

    def averages_so_far(self) -> dict[str, Any]:
        """The averages over the training samples of this epoch so far, of all processes, as plain data."""
        return asdict(self._of_all(self._averages["train"]))

    def train_dataloader(self) -> Iterable[Share]:
        seed = seed_at(self.options.seed, self.current_epoch)
        return train_loader(self.task.data.train, self.options.batch_size, seed, self.batches_done, self.sharing)

    def on_before_batch_transfer(self, batch: Any, _: int) -> Share:
        return batch if isinstance(batch, Share) else Share.whole(as_batch(batch))

    def transfer_batch_to_device(self, share: Share, device: torch.device, _: int) -> Share:
        return share._replace(batch=share.batch.to(device))

    def on_train_batch_start(self, share: Share, index: int) -> None:
        if index == 0 and self.global_step == 0 and self.task.awaits_data:  # under a trainer that is not a run's
            self.task.initialize(share.batch)

    def on_train_start(self) -> None:
        if self.options.midpoints is not None:  # from the first step on, if nobody knows how many there will be
            self._midpoints_begin = self.options.midpoints.start * (self._planned_steps() or 0)

    def on_train_epoch_start(self) -> None:
        self.values = {}

    def training_step(self, share: Share, _: int) -> Tensor:
        with self._draws(share):
            augmented = share.batch._replace(values=self.augment(share.batch.values))
            loss = self._measure("train", augmented, share.number)
            if self.midpoints is not None and self.global_step >= self._midpoints_begin:
                loss = loss + self.midpoints(augmented, self.model)
        self._require_finite_loss(share, loss)
        self._parts_done = (self._parts_done + 1) % self.sharing.parts
        if self.between_steps:
            self.batches_done += 1
        if self.sharing.processes * self.sharing.parts == 1:
            return loss
        # The mean over the processes and the parts of a step is the mean over the samples of the whole batch.
        return loss * (share.number * self.sharing.processes * self.sharing.parts / share.of)

    def _require_finite_loss(self, share: Share, loss: Tensor) -> None:
        """Raise DivergedError in every process if the loss of one is not finite."""
        if self.trial is not None:
            self.trial.append(loss.item())
            return
        finite = math.isfinite(loss.item() if share.of_several else self._averages["train"].sums["loss"])
        if self.in_run and self.sharing.processes > 1:
            if not self.trainer.strategy.reduce_boolean_decision(not finite, all=False):
                return
        elif finite:
            return
        why = f"the loss is {loss.item()}"
        if self.sharing.processes == 1:
            with self._draws(share):
                values = self.task.inputs(self.augment(share.batch.values))  # and then the model's own noise
                found = culprit(self.task.model, values, share.batch.context)
            why += f", and the first output that is not finite is that of {found}"
        self.refuse(why if not finite else "the loss of another process is not finite")

    # Lightning asks for it in each step, and finding it takes a while.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def on_train_epoch_end(self) -> None:
        self.batches_done = 0
        self._report("train")
        watched = self.watched[0]
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau) and watched in self.values:
                config.scheduler.step(self.values[watched])

    def validation_step(self, share: Share, index: int) -> None:
        with evaluation_draws(index), _draws_of(share, index):
            self._measure(self.task.data.judge[0], share.batch, share.number)

    def on_validation_epoch_end(self) -> None:
        self._report(self.task.data.judge[0])

    def configure_optimizers(self) -> Any:
        if self.options.find_lr and self.sharing.processes > 1:
            found = self.options.optimizer.model_copy(
                update={"lr": self.trainer.strategy.broadcast(self.options.optimizer.lr)}
            )
            self.options = self.options.model_copy(update={"optimizer": found})
        optimizer = make_optimizer(self.options.optimizer, self.model)
        name, higher_is_better = self.watched
        schedules = make_schedules(self.options, optimizer, self._planned_steps(), higher_is_better)
        return [optimizer], [{**schedule, "monitor": name} for schedule in schedules]

    @property
    def watched(self) -> tuple[str, bool]:
        """What tells improvement, never on test samples: its name in `values`, and whether higher is better."""
        if self.task.data.validation is None or not (self.in_run or self.trainer.enable_validation):
            return "train_loss", False
        return f"val_{self.task.score.name}", self.task.score.higher_is_better

    def _planned_steps(self) -> int | None:
        """The number of steps of the whole training; None if nobody knows it."""
        if self.in_run:  # where the first epoch may be the rest of one
            return self.options.planned_steps(batches_of(self.task.data.train, self.options.batch_size))
        steps = self.trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) and steps > 0 else None

    def refuse(self, why: str) -> None:
        """End the training: raise DivergedError."""
        place = f"epoch {self.current_epoch + 1}, step {self.global_step}"
        advice = "try a lower learning rate (--lr), or clip_gradient in the spec's training block"
        raise DivergedError(f"training diverged in {place}: {why}; {advice}")

    def require_finite(self) -> None:
        """Raise DivergedError if a weight is not finite."""
        broken = broken_weight(self.model)
        if broken is not None:
            self.refuse(f"{broken} is not finite")

    def _draws(self, share: Share) -> AbstractContextManager[None]:
        """Inside, random numbers are those of this step: of samples those of the whole batch, others of this share."""
        seed = seed_at(self.options.seed, self.global_step)
        _seed_draws(seed_at(seed, share.place) if share.place else seed)
        return _draws_of(share, seed)

    def _measure(self, stage: str, batch: Batch, number: int) -> Tensor:
        loss, more = self.measure(stage, batch)
        self._averages[stage].add({"loss": loss, **more}, number)
        return loss

    def _of_all(self, averages: Averages) -> Averages:
        """The averages over the samples of all processes."""
        if self.trainer.world_size == 1:
            return averages
        strategy, device = self.trainer.strategy, self.device
        return averages.of_all(lambda mine: strategy.reduce(mine.to(device), reduce_op="sum"))

    def _report(self, stage: str) -> None:
        """Note the averages of an epoch. Lightning's own would be lost if the epoch is interrupted."""
        found = {f"{stage}_{name}": value for name, value in self._of_all(self._averages[stage]).means().items()}
        self._averages[stage] = Averages()
        self.values.update(found)
        if not self.in_run:
            self.log_dict(found, prog_bar=True)
        elif self.options.early_stopping is not None and self.watched[0] in found:
            self.log(self.watched[0], found[self.watched[0]])  # where Lightning's callback looks


def _draws_of(share: Share, seed: int) -> AbstractContextManager[None]:
    """Inside, samples have the random numbers that a batch of which they are a share would draw for them."""
    return rows_of(share.start, share.of, seed) if share.of_several else contextlib.nullcontext()


def _seed_draws(seed: int) -> None:
    """``torch.manual_seed`` for the devices in use: for others it formats the call stack, which takes 1 ms a step."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def evaluation_draws(seed: int) -> Iterator[None]:
    """Seed the random numbers inside of the context and leave those outside unchanged. Each batch has its own seed."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def make_optimizer(options: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that a spec names, over the model's parameters, which one kernel updates if PyTorch has one."""
    fused = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    others = {"adamax": torch.optim.Adamax, "rmsprop": torch.optim.RMSprop}
    one_kernel = options.type in fused and not any(map(is_shard, model.parameters()))
    choices = options.model_dump(exclude={"type"}) | ({"fused": True} if one_kernel else {})
    made: torch.optim.Optimizer = (fused | others)[options.type](model.parameters(), **choices)
    return made


def make_schedules(
    options: Training, optimizer: torch.optim.Optimizer, steps: int | None, higher_is_better: bool = False
) -> list[dict[str, Any]]:
    """The learning-rate schedules that a training block asks for, as Lightning takes them.

    Args:
        options: the training block.
        optimizer: the optimiser, with the peak learning rate.
        steps: the number of its steps; None if nobody knows it.
        higher_is_better: whether what a plateau watches improves by rising.

    Raises:
        InvflowError: the block does not fit that number.
    """
    unfit = options.unfit(steps)
    if unfit is not None:
        raise InvflowError(": ".join(unfit))
    schedule, warmup, found = options.schedule, options.warmup_steps(steps), list[dict[str, Any]]()
    if warmup:  # from one part of warmup + 1, so that step number `warmup` is the first at the full rate
        found.append({"scheduler": LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup), "interval": "step"})
    if isinstance(schedule, MultiStep):
        falling: LRScheduler = MultiStepLR(optimizer, list(schedule.milestones), schedule.factor)
        found.append({"scheduler": falling, "interval": "step" if options.epochs is None else "epoch"})
    elif isinstance(schedule, Plateau):
        falling = ReduceLROnPlateau(
            optimizer,
            "max" if higher_is_better else "min",
            schedule.factor,
            schedule.patience,
            schedule.threshold,
            threshold_mode="abs",  # a part of a score has no meaning: log-likelihoods have both signs
            min_lr=schedule.final_lr,
            eps=0,
        )
        # The module does each step itself, because Lightning's come after the end of an epoch, where a run is saved.
        found.append({"scheduler": falling, "interval": "epoch", "frequency": sys.maxsize})
    elif schedule is not None:
        assert steps is not None  # or it would not fit
        after = make_schedule(schedule, optimizer, steps - warmup)
        parts = [*(one["scheduler"] for one in found), after]
        found = [{"scheduler": SequentialLR(optimizer, parts, [warmup]) if warmup else after, "interval": "step"}]
    return found


def make_schedule(options: OneCycle | Cosine, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    """The learning-rate schedule that a spec names, over ``steps`` optimiser steps."""
    peak = optimizer.param_groups[0]["lr"]
    if isinstance(options, Cosine):
        return CosineAnnealingLR(optimizer, T_max=steps, eta_min=options.final_lr)
    return OneCycleLR(
        optimizer,
        max_lr=peak,
        total_steps=steps,
        pct_start=options.warmup,
        div_factor=options.start_factor,
        final_div_factor=options.final_factor,
        cycle_momentum=False,  # the spec's momentum is constant
    )
