"""Lightning's trainer, as runs use it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from lightning.pytorch.callbacks import Callback, EarlyStopping, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import (
    AdvancedProfiler,
    PassThroughProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)
from rich.console import Console

from ..errors import DivergedError, InvflowError
from ..spec.training import Training
from .data import batches_of, ordered_loader
from .module import ModelTraining
from .processes import Processes, whole
from .saving import BEST, HeldSignals, Interval, Saving, Stopped

if TYPE_CHECKING:
    from .run_folder import Run
    from .tasks import Task


def fit(run: Run, task: Task[Any], interval: Interval, processes: Processes, progress: bool) -> float:
    """Train the model of a task to the end, from where the run was saved, and return how many seconds that took.

    Args:
        run: the run, whose folder the process that leads owns.
        task: the task, with a model that is initialized.
        interval: how often to save in the middle of an epoch.
        processes: that train.
        progress: whether to show a progress bar.

    Raises:
        RunError: the state of the run cannot be read, its folder was removed, or another process ended.
        DivergedError: the loss or a weight is no longer finite.
        KeyboardInterrupt: it was interrupted; what other signals do, their handlers say. The state is saved before.
    """
    options, module = run.training, task.training(task, run.training)
    module.in_run, module.sharing, module.shards = True, processes.sharing(options.accumulate), processes.shards
    progress = progress and processes.leads
    processes.require_statistics(task, options)
    with HeldSignals() as signals:
        saving = Saving(run, task.score, interval, signals, processes.leads)
        logs = run.folder / "logs"
        callbacks = [saving, *([_progress_bar()] if progress else []), *_stopping(options, module)]
        with quiet_lightning(), processes.guarded(run.folder):
            trainer = lightning.Trainer(
                max_epochs=options.planned_epochs(batches_of(task.data.train, options.batch_size)),
                check_val_every_n_epoch=options.evaluate_every,
                gradient_clip_val=options.clip_gradient,
                inference_mode=False,  # a log-determinant may take derivatives of its own
                accumulate_grad_batches=options.accumulate,
                precision="bf16-mixed" if options.precision == "bf16-mixed" else "32-true",  # as weights are
                deterministic=options.deterministic or None,  # False would switch off what a program has chosen
                **processes.arguments(task.model),
                logger=TensorBoardLogger(logs, name="tensorboard") if processes.leads else False,
                callbacks=callbacks,
                enable_progress_bar=progress,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                log_every_n_steps=0,  # an epoch's averages are logged
                profiler=_profiler(options.profile, logs) if processes.leads else _NoProfiler(),
                reload_dataloaders_every_n_epochs=1,
            )
            saving.restore(trainer, module)
            try:
                with _quick_look_for_cuda():
                    judging = ordered_loader(task.data.judge[1], processes.sharing(1))
                    trainer.fit(module, val_dataloaders=judging)
            except Stopped:
                if signals.received is None:  # another process received a signal
                    raise KeyboardInterrupt from None
            except SystemExit as ended:  # Lightning turns Ctrl-C into SystemExit
                interrupt = ended.__context__
                raise interrupt if isinstance(interrupt, KeyboardInterrupt) else KeyboardInterrupt from None
            except RuntimeError as error:
                if options.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    why = next(iter(str(error).splitlines()), "")
                    told = f"{run.folder}: the model does not compile: {why}; see 'invflow doctor'"
                    raise InvflowError(told) from error
                if signals.received is None:  # a process that loads data obeys a signal to its group at once
                    raise
            except OSError:
                if processes.leads:
                    saving.require_folder()  # if it is gone, that is what to say
                raise
            except DivergedError as error:
                if processes.leads:
                    run.update(status="diverged", why=str(error))
                raise DivergedError(f"{run.folder}: {error}; {_kept(run)}") from None
    if signals.received is not None:
        signal.raise_signal(signals.received)
        raise KeyboardInterrupt
    if module.result is not task.model:
        task.model.load_state_dict(whole(module.result.state_dict()))
    return saving.seconds


def _profiler(name: str | None, logs: Path) -> Profiler:
    """Lightning's profiler of this name, which writes to a file in the logs."""
    kinds: dict[str | None, type[Profiler]] = {
        "simple": SimpleProfiler,
        "advanced": AdvancedProfiler,
        "pytorch": PyTorchProfiler,
    }
    if name is None:
        return _NoProfiler()
    logs.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"acc_events": True} if name == "pytorch" else {}
    return kinds[name](dirpath=logs, filename="profile", **options)


class _NoProfiler(PassThroughProfiler):
    """Lightning's default makes a context of its own for each of the 25 calls of a step that it does not measure."""

    _none = contextlib.nullcontext()

    def profile(self, action_name: str) -> Any:
        return self._none


class _Stopping(EarlyStopping):
    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if f"{pl_module.task.data.judge[0]}_loss" in pl_module.values:  # not every epoch is evaluated
            super().on_train_epoch_end(trainer, pl_module)


def _stopping(options: Training, module: ModelTraining) -> list[Callback]:
    """The callback that ends a training early, if one is asked for."""
    if options.early_stopping is None:
        return []
    name, higher_is_better = module.watched
    patience, mode = options.early_stopping.patience + 1, "max" if higher_is_better else "min"
    return [_Stopping(name, options.early_stopping.threshold, patience, mode=mode, check_on_train_epoch_end=True)]


def _progress_bar() -> ProgressBar:
    """Of rich, on stderr; in a notebook that of tqdm, because rich's needs ipywidgets there."""
    if Console().is_jupyter:
        return _NotebookBar()
    return _RichBar(leave=False, console_kwargs={"stderr": True})


class _Values(ProgressBar):
    """A bar that shows the averages of this epoch, the score in its unit; before there are some, those of the last."""

    _shown: Mapping[str, float] = {}

    def get_metrics(self, trainer: lightning.Trainer, pl_module: Any) -> dict[str, Any]:
        self._shown = pl_module.values or self._shown
        score = pl_module.task.score
        known = self._shown.items()
        return {name: score.text(value) if name.endswith(f"_{score.name}") else value for name, value in known}


class _RichBar(_Values, RichProgressBar):
    pass


class _NotebookBar(_Values, TQDMProgressBar):
    pass


def _kept(run: Run) -> str:
    """Where the last finite weights of a run are, in words."""
    done = run.record.get("epochs_done", 0)
    last = f"{run.folder} holds the weights after {done} {'epoch' if done == 1 else 'epochs'}"
    return f"{last}, {run.folder / BEST} the best" if (run.folder / BEST).is_dir() else last


@contextlib.contextmanager
def _quick_look_for_cuda() -> Iterator[None]:
    """Without a variable that Lightning sets: with it, each step of an optimiser loads the driver's library again."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Hide Lightning's advice about workers, devices and logging intervals, and failures that are reported twice."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    hook = threading.excepthook
    threading.excepthook = lambda failed: issubclass(failed.exc_type, OSError) or hook(failed)  # TensorBoard's thread
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            # No layer changes its input in place, which is a promise that each one is tested for.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            yield
    finally:
        threading.excepthook = hook
