"""How a training is saved while it runs, so that it goes on from there after whatever ends it.

``resume/last.ckpt`` is the one file that a resumption starts from. It is written between two steps: weights, optimiser,
schedule, the number of batches that its epoch has had, and the averages over them. The rest of a run folder follows
from it: an epoch that was interrupted is repeated from there, and gives the same files again.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint

from ..errors import InvflowError, RunError
from ..files import remove_partial, write_atomically
from ..sequential import Sequential
from ..spec.checkpoint import write_checkpoint
from ..spec.record import RUN_FILE
from .drawing import draw_so_far
from .module import ModelTraining
from .processes import load_optimizer, whole
from .run_folder import PICTURES

if TYPE_CHECKING:
    from .run_folder import Run
    from .tasks import Score

BEST = "best"
LAST = Path("resume", "last.ckpt")
METRICS = Path("logs", "csv", "version_0", "metrics.csv")
SAVE_EVERY = "5m"
_SECONDS_APART = 1.0
"""The least time between the ends of two epochs that are saved, so that short epochs are not spent on it."""


@dataclass(frozen=True)
class Interval:
    """How often a training is saved in the middle of an epoch: every so many steps or seconds.

    Examples:
        >>> Interval.parse("200"), Interval.parse("1.5m")
        (Interval(steps=200, seconds=None), Interval(steps=None, seconds=90.0))
    """

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: int | str) -> Interval:
        """The interval in words: "200" is steps, "5m" minutes. Raise InvflowError if it is neither."""
        found = re.fullmatch(r"(\d+)|(\d+|\d*\.\d+)m", str(text).strip())
        if found is None or float(found[1] or found[2]) == 0:
            raise InvflowError(f"--save-every expects steps, such as 200, or minutes, such as 5m, got {text!r}")
        return cls(steps=int(found[1])) if found[1] else cls(seconds=60 * float(found[2]))

    def over(self, step: int, since: float) -> bool:
        """Whether to save after a step, counted from 1, if the last save was at this time of the monotonic clock."""
        if self.steps is not None:
            return step % self.steps == 0
        return self.seconds is not None and time.monotonic() - since >= self.seconds


class Stopped(BaseException):
    """The training has saved its state and stops, as a signal told it."""


class HeldSignals:
    """SIGINT and SIGTERM, held back until the training has saved its state; a second one acts at once.

    Attributes:
        received: the signal that is held back, if there is one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def hold(self) -> None:
        """Hold the signals back from now on; only the main thread can, and what is ignored stays ignored."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            self._release()
            signal.raise_signal(number)
        self.received = number

    def _release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> HeldSignals:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._before = {number: handler for number, handler in handlers.items() if handler is not None}
        return self

    def __exit__(self, *_: object) -> None:
        self._release()


class Saving(Checkpoint):
    """Lightning's callback that saves a run: its state, its weights and its metrics.

    Args:
        run: the run.
        score: of its kind of model.
        leads: whether this process writes; others only gather with it what is written.
        interval: how often to save in the middle of an epoch. The ends of epochs are saved too, at most one a second.
        signals: that end the training after it was saved.

    Raises:
        RunError: the state of the run cannot be read.
    """

    def __init__(self, run: Run, score: Score, interval: Interval, signals: HeldSignals, leads: bool = True) -> None:
        self._run = run
        self._leads = leads
        self._score = score
        self._interval = interval
        self._signals = signals
        self._path = run.folder / LAST
        self._state = _read(self._path)
        self._before = float(self._state["seconds"]) if self._state else 0.0
        self._started = self._saved = time.monotonic()
        self._epoch_saved = -math.inf
        self._rows: list[dict[str, float]] = []
        if not leads:
            return
        self._folder = run.folder.stat()
        for path in (self._path, run.folder / METRICS, run.folder / RUN_FILE):
            remove_partial(path)
            path.parent.mkdir(parents=True, exist_ok=True)
        for partial in (run.folder / PICTURES).glob(".*-[0-9]*.png.*"):
            partial.unlink(missing_ok=True)
        known = run.metrics
        self._rows = [row for row in known if self._state and row["epoch"] < self._state["epoch"]]
        if self._rows != known:
            self._write_rows()

    @property
    def seconds(self) -> float:
        """How long the run has been trained, what was lost by interruptions left out."""
        return self._before + time.monotonic() - self._started

    def restore(self, trainer: lightning.Trainer, module: ModelTraining) -> None:
        """Set a trainer and a module that have not begun to where the run was saved. Raise RunError if that fails."""
        if self._state is None:
            return
        try:
            loop, progress = trainer.fit_loop, trainer.fit_loop.epoch_progress
            module.model.load_state_dict(self._state["model"])
            if module.averaged is not None:
                module.averaged.load_state_dict(self._state["average"])
            module.begin_in_epoch(self._state["batches"], self._state["averages"])
            for name, kept in self._state["anchors"].items():
                module.model.get_submodule(name).reconstruction.anchors.update(kept)
            loop.load_state_dict(self._state["loops"])
            loop.restarting = False  # the rest of an epoch is an epoch that is shorter, not one that goes on
            epochs = dict.fromkeys(("ready", "started", "processed", "completed"), self._state["epoch"])
            progress.load_state_dict({"total": epochs, "current": epochs})
        except Exception as error:
            raise _unreadable(self._path, error) from None

    # In the order in which Lightning calls them.

    def on_fit_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        trainer.should_stop = self._all_steps_done(trainer)
        if self._state is None:
            return
        try:
            trainer.should_stop |= self._state["stops"]
            for callback, state in zip(trainer.early_stopping_callbacks, self._state["stopping"], strict=True):
                callback.load_state_dict(state)
            for optimizer, state in zip(trainer.optimizers, self._state["optimizers"], strict=True):
                load_optimizer(optimizer, state)
            for config, state in zip(trainer.lr_scheduler_configs, self._state["schedules"], strict=True):
                config.scheduler.load_state_dict(state)
        except Exception as error:
            raise _unreadable(self._path, error) from None
        self._state = None

    def on_train_start(self, *_: Any) -> None:
        self._signals.hold()  # only now, because Lightning has handlers of its own

    def on_train_epoch_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        options = self._run.training
        last = trainer.current_epoch + 1 == trainer.max_epochs
        trainer.check_val_every_n_epoch = 1 if last else options.evaluate_every

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        if self._all_steps_done(trainer):  # maybe in the middle of an epoch, which then ends as any other
            trainer.should_stop, trainer.check_val_every_n_epoch = True, 1
        if trainer.is_last_batch or trainer.should_stop:
            return  # the evaluation comes before the end of the epoch, where the state is saved
        if not module.between_steps:  # gradients of a part of a step would be lost
            return
        if self._due(trainer, self._interval.over(trainer.global_step, self._saved)):
            self._save(trainer, module, trainer.current_epoch)

    def _due(self, trainer: lightning.Trainer, over: bool) -> bool:
        """Whether to save now, because it is time, or a signal came, in any process."""
        due = over or self._signals.received is not None
        return due if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(due, all=False)

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        """Write the weights to the run folder, and to ``best/`` if they are the best so far."""
        module.require_finite()
        run, epoch, name = self._run, trainer.current_epoch, f"{module.task.data.judge[0]}_{self._score.name}"
        document, weights = run.spec.document, whole(module.result.state_dict())
        if not self._leads:
            return
        self.require_folder()
        value = round(module.values[name], 6)  # further digits of a float32 are noise
        best: float | None = run.record.get(f"best_{name}")
        write_checkpoint(document, weights, run.folder)
        if self._score.beats(value, best):
            best = value
            write_checkpoint(document, weights, run.folder / BEST)
        run.update(**{name: value, f"best_{name}": best}, epochs_done=epoch + 1, steps_done=trainer.global_step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        epoch, step = trainer.current_epoch, trainer.global_step
        self._rows.append({"epoch": float(epoch), "step": float(step), **module.values})
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": epoch, **module.values}, step)
        every = self._run.training.draw_every
        if every is not None and (epoch + 1) % every == 0:  # before the state, as the metrics are
            module.require_finite()
            weights = whole(module.result.state_dict())
            if self._leads:
                self.require_folder()
                draw_so_far(self._run, module, weights, epoch + 1)
        now = time.monotonic()
        over = self._interval.over(step, self._saved) or now - self._epoch_saved >= _SECONDS_APART
        if self._due(trainer, over or epoch + 1 == trainer.max_epochs or trainer.should_stop):
            self._epoch_saved = now
            self._save(trainer, module, epoch + 1)

    def on_exception(self, *_: Any) -> None:
        if not self._leads:
            return
        with contextlib.suppress(OSError, RunError):  # what went wrong is told already
            self.require_folder()
            self._write_rows()

    def _save(self, trainer: lightning.Trainer, module: ModelTraining, epoch: int) -> None:
        """Write the metrics and the state, in the given epoch; then stop if a signal told so."""
        module.require_finite()
        chains = [(name, part) for name, part in module.model.named_modules() if isinstance(part, Sequential)]
        state = {
            "epoch": epoch,
            "batches": module.batches_done,
            "averages": module.averages_so_far(),
            "seconds": self.seconds,
            "model": whole(module.model.state_dict()),
            "average": None if module.averaged is None else whole(module.averaged.state_dict()),
            "anchors": {name: sorted(chain.reconstruction.anchors) for name, chain in chains},
            "optimizers": [whole(optimizer.state_dict()) for optimizer in trainer.optimizers],
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "loops": trainer.fit_loop.state_dict(),
            "stopping": [callback.state_dict() for callback in trainer.early_stopping_callbacks],
            "stops": trainer.should_stop,
        }
        if self._leads:
            self.require_folder()
            self._write_rows()  # before the state: a row too many is dropped, one that is missing never comes again
            content = io.BytesIO()
            torch.save(state, content)
            write_atomically(self._path, content.getvalue())
        self._saved = time.monotonic()
        if self._due(trainer, False):
            raise Stopped

    def _write_rows(self) -> None:
        """Write the metrics of the epochs that have ended."""
        text = io.StringIO()
        table = csv.DictWriter(text, sorted(set().union(*self._rows)))
        table.writeheader()
        table.writerows(self._rows)
        write_atomically(self._run.folder / METRICS, text.getvalue().encode())

    def _all_steps_done(self, trainer: lightning.Trainer) -> bool:
        """Whether a run that is measured in steps has come to its end."""
        return trainer.global_step == self._run.training.steps

    def require_folder(self) -> None:
        """Raise RunError if the run folder is no longer the one in which the training began."""
        folder = self._run.folder
        if not (folder / RUN_FILE).is_file() or not os.path.samestat(folder.stat(), self._folder):
            found = "the run folder was deleted or moved during the training, which stops here"
            raise RunError(f"{folder}: {found}; resume it where it is now, or train again")


def _read(path: Path) -> dict[str, Any] | None:
    """The state that was saved; None if none was."""
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "epoch": int(state["epoch"]), "seconds": float(state["seconds"])}
    except Exception as error:  # each kind of damage raises its own
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> RunError:
    found = f"damaged, or of another run or version ({type(error).__name__})"
    return RunError(f"{path}: cannot be resumed: {found}; train the spec again")
