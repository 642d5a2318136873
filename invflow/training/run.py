"""Runs: a training and the folder that holds all of it.

A run folder is a checkpoint (``spec.json`` and its weights, so `invflow.load` reads it) with ``best/``, another one,
``run.json`` (what was overridden, versions, results), ``logs/`` (CSV and TensorBoard), ``resume/`` (what Lightning
needs to go on) and ``pictures/``. A spec in exact numerics is trained in float and frozen at the end: the float model
stays in ``float/``, and the one in ``best/`` is float too. Each file is replaced in one step, so that an interruption
leaves a readable folder.
"""

from __future__ import annotations

import csv
import json
import logging
import platform
import re
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from ..errors import DivergedError, InvflowError, RunError
from ..files import write_atomically
from ..models import Classifier, Flow
from ..models.freezing import freeze
from ..numerics import Exact
from ..spec.build import build_model
from ..spec.checkpoint import load, read_checkpoint_spec, write_checkpoint
from ..spec.document import Spec
from ..spec.training import Training
from .data import DataSet, load_data, test_loader
from .module import ModelTraining
from .tasks import Score, Task, task_of

RUN_FILE = "run.json"
BEST = "best"
FLOAT = "float"
PICTURES = "pictures"
_LAST = "last.ckpt"
_LARGEST_RECORD = 2**20


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: where it is.
        spec: the spec that it trains, overrides included.
        record: what ``run.json`` holds.
    """

    folder: Path
    spec: Spec
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run in a folder that `train` wrote. Raises RunError where there is none."""
        path = folder / RUN_FILE
        try:
            with path.open("rb") as file:
                record = json.loads(file.read(_LARGEST_RECORD))
            if not isinstance(record, dict):
                raise ValueError("no JSON object")
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(
                f"{folder}: no run here: expected a folder with {RUN_FILE}, as 'invflow train' writes it"
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read: {error}") from None
        return cls(folder, read_checkpoint_spec(folder)[0], record)

    @property
    def training(self) -> Training:
        """The spec's training block, or its defaults."""
        return self.spec.training or Training()

    def load(self) -> Classifier | Flow:
        """The trained model, with the weights of the last evaluation."""
        model = load(self.folder)
        if not isinstance(model, Classifier | Flow):
            raise RunError(f"{self.folder}: a chain without a head or a prior: nothing to evaluate")
        return model

    def update(self, **entries: Any) -> None:
        """Adds to ``run.json``."""
        self.record.update(entries)
        write_atomically(self.folder / RUN_FILE, json.dumps(self.record, indent=2).encode() + b"\n")

    def metrics(self) -> list[dict[str, float]]:
        """One row per epoch, from the CSV logs of all stretches; a later stretch's word counts."""
        rows: dict[int, dict[str, float]] = {}
        stretches = sorted((self.folder / "logs" / "csv").glob("version_[0-9]*"), key=lambda path: int(path.name[8:]))
        for stretch in stretches:
            if (stretch / "metrics.csv").is_file():
                with (stretch / "metrics.csv").open(newline="") as file:
                    for row in csv.DictReader(file):
                        known = {name: float(value) for name, value in row.items() if value and name != "step"}
                        # The evaluation at the very end is logged under an epoch that there is not.
                        known["epoch"] = min(known["epoch"], self.training.epochs - 1)
                        rows.setdefault(int(known["epoch"]), {}).update(known)
        return [rows[epoch] for epoch in sorted(rows)]


class _KeepCheckpoints(lightning.Callback):
    """After each evaluation writes the weights to the run folder, and to ``best/`` where it is the best so far."""

    def __init__(self, run: Run, score: Score) -> None:
        self.run = run
        self.score = score

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, ModelTraining)
        weights = module.model.state_dict()
        if not all(weight.isfinite().all() for weight in weights.values()):
            module.refuse("a weight is not finite")
        name = f"test_{self.score.name}"
        value = round(float(trainer.callback_metrics[name]), 6)  # float32: the rest is noise
        best: float | None = self.run.record.get(f"best_{name}")
        write_checkpoint(self.run.spec.document, weights, self.run.folder)
        if self.score.beats(value, best):
            best = value
            write_checkpoint(self.run.spec.document, weights, self.run.folder / BEST)
        self.run.update(
            **{name: value, f"best_{name}": best}, epochs_done=min(trainer.current_epoch + 1, self.run.training.epochs)
        )


def train(
    spec: Spec,
    folder: Path,
    *,
    data_root: Path | None = None,
    download: bool = False,
    overrides: dict[str, Any] | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Run:
    """Trains the classifier or the flow that a spec describes.

    Args:
        spec: with a head or a prior; without a training block the defaults count.
        folder: the run folder to make; it must be empty or absent.
        data_root: see `load_data`.
        download: see `load_data`.
        overrides: entries of the training block that replace the spec's: seed, epochs, batch_size, lr, train_size.
        device: auto, cpu, cuda, cuda:1, mps.
        progress: whether to show a progress bar.

    Raises:
        RunError: the folder holds something.
        DataError: the data set is absent, or does not fit.
        SpecError: the spec is of a chain alone, or its shapes do not fit the data.
        DivergedError: the loss or a weight is no longer finite; the folder keeps the last weights that were.
        InvflowError: this machine does not have the device.
    """
    accelerator = _accelerator(device)
    require_empty(folder)
    overrides = {name: value for name, value in (overrides or {}).items() if value is not None}
    spec = overridden(spec, overrides)
    data = check_trainable(spec, data_root, download=download).data
    to_freeze = {}
    if spec.top.numerics.integer_nets:
        to_freeze = {"freeze": spec.top.numerics.model_dump(mode="json")}
        spec = spec.replace(numerics=None)
    task = _initialized(spec, data)
    write_checkpoint(spec.document, task.model.state_dict(), folder)
    run = Run(folder, spec, {})
    run.update(name=spec.name, status="training", overrides=overrides, epochs_done=0, versions=versions(), **to_freeze)
    return _fit(run, task, progress, None, accelerator)


def require_empty(folder: Path) -> None:
    """Raises RunError where a folder holds something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: exists already; name another folder with --out, or resume it with --resume")


def resume(
    folder: Path,
    *,
    data_root: Path | None = None,
    download: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Run:
    """Goes on with a run that was interrupted; the result is the one that it would have had.

    A run that is finished is returned as it is.

    Raises:
        RunError: no run, or one whose state cannot be read.
        DivergedError: it diverged, then or now.
        InvflowError: this machine does not have the device.
    """
    accelerator = _accelerator(device)
    run = Run.open(folder)
    if run.record.get("status") == "finished":
        return run
    if run.record.get("status") == "diverged":
        raise DivergedError(f"{folder}: {run.record.get('why', 'training diverged')}; it would do so again")
    if "freeze" in run.record:  # it may have been interrupted with the exact model written already
        run = Run(folder, run.spec.replace(numerics=None), run.record)
    task = _initialized(run.spec, _fitting_data(run.spec, run.training, data_root, download))
    last = folder / "resume" / _LAST
    if last.is_file():
        _require_readable(last)
    return _fit(run, task, progress, last if last.is_file() else None, accelerator)


def _require_readable(checkpoint: Path) -> None:
    try:
        torch.load(checkpoint, map_location="meta", weights_only=True)
    except Exception as error:  # truncated, altered, or another kind of file: each raises its own
        raise RunError(f"{checkpoint}: cannot be resumed ({type(error).__name__}); train the spec again") from None


def folder_name(spec: Spec) -> str:
    """A name for a spec's folder: its own without what leads elsewhere, for specs may come from strangers."""
    return re.sub(r"[^\w.-]+", "-", spec.name or "").strip(".-")[:60] or "run"


def check_trainable(spec: Spec, data_root: Path | None = None, *, download: bool = False) -> Task[Any]:
    """The task of training a spec's model, which is without memory, if it can be; raises as `train` does."""
    options = spec.training or Training()
    data = _fitting_data(spec, options, data_root, download)
    with torch.device("meta"):
        model = build_model(spec)
    if isinstance(model, Flow) and spec.top.numerics.on_grid:
        raise spec.error(("numerics",), "a density is trained on numbers that lie on no grid; leave numerics out")
    task = task_of(model, data)
    task.check(spec)
    return task


def overridden(spec: Spec, overrides: dict[str, Any]) -> Spec:
    """The spec with entries of its training block replaced; ``lr`` is the optimiser's, ``train_size`` the data's."""
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if not overrides:
        return spec
    defaults = Training().model_dump(mode="json", exclude_none=True)
    training = {**defaults, **(spec.expanded.get("training") or {})}
    for name, value in overrides.items():
        if name == "lr":
            training["optimizer"] = {**training["optimizer"], "lr": value}
        elif name == "train_size":
            training["data"] = {**training["data"], "train_size": value}
        else:
            training[name] = value
    return spec.replace(training=training)


def versions() -> dict[str, str]:
    """What a result depends on besides spec and seed."""
    from importlib.metadata import version

    names = ("invflow", "torch", "torchvision", "lightning", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _initialized(spec: Spec, data: DataSet) -> Task[Any]:
    """The task of training a spec's model as it starts: its weights drawn, what awaits data shown the first batch."""
    options = spec.training or Training()
    torch.manual_seed(options.seed)
    task = task_of(build_model(spec), data)
    task.model.bijection.initialize(task.inputs(data.train.values[: options.batch_size]))
    return task


def _fitting_data(spec: Spec, options: Training, root: Path | None, download: bool) -> DataSet:
    """The spec's data, whose samples fit its input."""
    data = load_data(options.data, root, download=download)
    if spec.input_shape != data.shape:
        kind = "images" if data.holds_images else "points"
        message = f"{options.data.name} has {kind} of shape {data.shape}, the spec expects {spec.input_shape}"
        raise spec.error(("input", "shape"), message)
    if spec.context_shape is not None:
        raise spec.error(("input", "context_shape"), f"{options.data.name} has no context to train with")
    return data


def _accelerator(device: str) -> dict[str, Any]:
    """A device in Lightning's words. Raises InvflowError if this machine does not have it."""
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    there += ["mps"] * torch.backends.mps.is_available()
    if device not in ("auto", *there, *("cuda" for name in there if name == "cuda:0")):
        raise InvflowError(f"device {device!r} is not available; expected auto or one of: {', '.join(there)}")
    kind, _, index = device.partition(":")
    return {"accelerator": kind, "devices": [int(index)] if index else 1}


def _fit(run: Run, task: Task[Any], progress: bool, checkpoint: Path | None, accelerator: dict[str, Any]) -> Run:
    options = run.training
    logs = run.folder / "logs"
    callbacks: list[lightning.Callback] = [
        _KeepCheckpoints(run, task.score),
        ModelCheckpoint(
            run.folder / "resume", filename="last", save_on_train_epoch_end=True, enable_version_counter=False
        ),
    ]
    if progress:
        callbacks.append(RichProgressBar(leave=False, console_kwargs={"stderr": True}))
    module, samples = task.module(options), test_loader(task.data.test)
    started = time.monotonic()
    with _quiet_lightning():
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            check_val_every_n_epoch=options.evaluate_every,
            gradient_clip_val=options.clip_gradient,
            inference_mode=False,  # a log-determinant may take derivatives of its own
            **accelerator,
            logger=[CSVLogger(logs, name="csv"), TensorBoardLogger(logs, name="tensorboard")],
            callbacks=callbacks,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            reload_dataloaders_every_n_epochs=1,
        )
        try:
            trainer.fit(module, val_dataloaders=samples, ckpt_path=checkpoint, weights_only=True)
            if options.epochs % options.evaluate_every:
                trainer.validate(module, samples, verbose=False)
        except SystemExit:  # what Lightning makes of Ctrl-C, having switched Ctrl-C off
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from None
        except DivergedError as error:
            run.update(status="diverged", why=str(error))
            raise DivergedError(f"{run.folder}: {error}") from None
    if "freeze" in run.record:
        run = _frozen(run, task)
    seconds = float(run.record.get("seconds", 0.0)) + time.monotonic() - started
    run.update(status="finished", seconds=seconds, parameters=task.parameters())
    return run


def _frozen(run: Run, task: Task[Any]) -> Run:
    """The run with its model made exact; the float one is kept in ``float/``."""
    numerics = Exact.model_validate(run.record["freeze"])
    write_checkpoint(run.spec.document, task.model.state_dict(), run.folder / FLOAT)
    spec = run.spec.replace(numerics=run.record["freeze"])
    frozen = freeze(task.model, task.data.train.values, numerics)
    write_checkpoint(spec.document, frozen.state_dict(), run.folder)
    return Run(run.folder, spec, run.record)


class _quiet_lightning(warnings.catch_warnings):  # noqa: N801 -- used like the function that it replaces
    """Keeps Lightning's advice about workers, devices and logging intervals from the user's screen."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        return entered
