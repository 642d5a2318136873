"""Runs: a training and the folder that holds all of it.

A run folder is a checkpoint (``spec.json`` and its weights, so `invflow.load` reads it). It also has ``best/``, another
checkpoint, ``run.json`` (overrides, versions, results), ``logs/`` (CSV and TensorBoard), ``resume/`` (the state from
which an interrupted training goes on, see `saving`) and ``pictures/``. A spec in exact numerics is trained in float and
frozen at the end: the float model stays in ``float/``, and the one in ``best/`` is float too. Each file is written
beside its target and renamed, so that an interruption or a full disk leaves a folder to read and to resume; only
TensorBoard's events, which nothing here reads, are appended to.
"""

from __future__ import annotations

import contextlib
import csv
import json
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric

from ..errors import DivergedError, InvflowError, RunError
from ..files import locked, write_atomically
from ..models import Classifier, Flow
from ..models.freezing import freeze
from ..numerics import Exact
from ..samples import DataSet
from ..spec.build import build_model
from ..spec.checkpoint import SPEC_FILE, load, read_checkpoint_spec, write_checkpoint
from ..spec.diff import diff_specs
from ..spec.document import Spec
from ..spec.record import RUN_FILE, read_record, unfinished
from ..spec.training import Data, Training
from ..state import TensorShape
from .data import load_data
from .fit import fit
from .saving import SAVE_EVERY, Interval
from .tasks import CPU, FREEZING_SAMPLES, Task, task_of

FLOAT = "float"
PICTURES = "pictures"
_OWNER = ".training"


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: its path.
        spec: the spec that it trains, with its overrides.
        record: the content of ``run.json``.
    """

    folder: Path
    spec: Spec
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Open a folder that `train` wrote. Raise RunError if there is no run in it."""
        record = read_record(folder)
        if record is None:
            expected = f"expected a folder with {RUN_FILE}, as 'invflow train' writes it"
            raise RunError(f"{folder}: no run here: {expected}")
        return cls(folder, read_checkpoint_spec(folder)[0], record)

    @property
    def training(self) -> Training:
        """The spec's training block, or its defaults."""
        return self.spec.training or Training()

    @property
    def unfinished(self) -> str | None:
        """Why the training of the model did not reach its end, in words; None if it did."""
        return unfinished(self.record, self.spec.training)

    def load(self) -> Classifier | Flow:
        """The trained model, with the weights of the last evaluation. Warn if its training did not reach its end."""
        model = load(self.folder)
        if not isinstance(model, Classifier | Flow):
            raise RunError(f"{self.folder}: a chain without a head or a prior: nothing to evaluate")
        return model

    def task(self, data_root: Path | None = None, device: str = "auto") -> Task[Any]:
        """The task of evaluating the trained model on the data of its spec.

        Args:
            data_root: see `load_data`.
            device: see `device_of`.
        """
        place = device_of(device)
        return task_of(self.load(), self.data(data_root), place)

    def data(self, data_root: Path | None = None) -> DataSet:
        """The data set of its spec; see `load_data`."""
        return load_data(self.training.data, data_root, folder=self.data_folder)

    @property
    def data_folder(self) -> Path | None:
        """The folder of the spec that was trained, to which the paths of its data are relative."""
        known = self.record.get("data_folder")
        return Path(known) if isinstance(known, str) else None

    def update(self, **entries: Any) -> None:
        """Add entries to ``run.json``."""
        self.record.update(entries)
        write_atomically(self.folder / RUN_FILE, json.dumps(self.record, indent=2).encode() + b"\n")

    def metrics(self) -> list[dict[str, float]]:
        """One row per epoch, from the CSV logs of a run and its resumptions; a later log overrides an earlier one."""
        rows: dict[int, dict[str, float]] = {}
        logs = self.folder.glob("logs/csv/version_[0-9]*/metrics.csv")
        for log in sorted(logs, key=lambda path: int(path.parent.name.removeprefix("version_"))):
            for row in csv.DictReader(log.read_text().splitlines()):
                known = {name: float(value) for name, value in row.items() if value}
                # Version 0.2 logged the final evaluation under an epoch that does not exist.
                known["epoch"] = min(known["epoch"], self.training.epochs - 1)
                rows.setdefault(int(known["epoch"]), {}).update(known)
        return [rows[epoch] for epoch in sorted(rows)]


def train(
    spec: Spec,
    folder: Path,
    *,
    data_root: Path | None = None,
    download: bool = False,
    overrides: dict[str, Any] | None = None,
    save_every: int | str = SAVE_EVERY,
    device: str = "auto",
    progress: bool = True,
) -> Run:
    """Train the classifier or the flow that a spec describes.

    Args:
        spec: a spec with a head or a prior; the training block may be absent.
        folder: the run folder to write; it must be empty or absent.
        data_root: see `load_data`.
        download: see `load_data`.
        overrides: entries that override those of the training block: seed, epochs, batch_size, lr, train_size.
        save_every: how often to save the state in the middle of an epoch: steps, such as 200, or minutes, such as "5m".
            It is saved at the end of each epoch too.
        device: auto, cpu, cuda, cuda:1, mps.
        progress: whether to show a progress bar.

    SIGTERM and Ctrl-C act after the next step, when the state is saved; a second one acts at once.

    Raises:
        RunError: the folder is not empty, another process trains there, or it was removed meanwhile.
        DataError: the data set is missing or too small.
        SpecError: the spec has no head and no prior, or its shapes do not fit the data.
        DivergedError: the loss or a weight is no longer finite; the folder keeps the last finite weights.
        InvflowError: this machine does not have the device, or ``save_every`` is no interval.
        OSError: a file cannot be written; what was saved before stays valid.
    """
    accelerator, interval = _accelerator(device), Interval.parse(save_every)
    require_empty(folder)
    overrides = {name: value for name, value in (overrides or {}).items() if value is not None}
    spec = overridden(spec, overrides)
    data = check_trainable(spec, data_root, download=download).data
    to_freeze: dict[str, Any] = {}
    if spec.top.numerics.integer_nets:
        to_freeze, spec = {"freeze": spec.top.numerics.model_dump(mode="json")}, spec.replace(numerics=None)
    task = _initialized(spec, data)
    with owned(folder):
        started: dict[str, Any] = {"name": spec.name, "status": "training", "overrides": overrides, "epochs_done": 0}
        if spec.folder is not None:  # to which the paths of files are relative
            started["data_folder"] = str(spec.folder.resolve())
        options = (spec.training or Training()).model_dump(mode="json")
        started |= {"training": options, "save_every": str(save_every), "versions": versions(), **to_freeze}
        run = begin(folder, spec.document, task.model, started)
        return _trained(run, task, interval, accelerator, progress)


def begin(folder: Path, document: dict[str, Any], model: Classifier | Flow, record: dict[str, Any]) -> Run:
    """Write a new run into a folder that is owned. Raise RunError if it's not empty; after an error, nothing stays."""
    require_empty(folder)
    try:
        write_checkpoint(document, model.state_dict(), folder)
        run = Run(folder, read_checkpoint_spec(folder)[0], {})
        run.update(**record)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return run


def require_empty(folder: Path) -> None:
    """Raise RunError if a folder is not empty."""
    if folder.exists() and (not folder.is_dir() or any(path.name != _OWNER for path in folder.iterdir())):
        raise RunError(f"{folder}: exists already; name another folder with --out, or resume it with --resume")


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is created if necessary.

    Raises:
        RunError: another process holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / _OWNER, wait=False))
        except BlockingIOError:
            found = "another process writes this run; wait until it has ended, or name another folder with --out"
            raise RunError(f"{folder}: {found}") from None
        except OSError as error:
            raise RunError(f"{folder}: a run is written there, which is not possible: {error.strerror}") from None
        yield


def resume(
    folder: Path,
    *,
    data_root: Path | None = None,
    download: bool = False,
    save_every: int | str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Run:
    """Resume a run that was interrupted, from where it was saved last.

    On the CPU, the result is the same as without the interruption, to the bit. A finished run is returned unchanged.
    The arguments are those of `train`; by default, ``save_every`` is what it was.

    Raises:
        RunError: the folder holds no run, its state cannot be read, its training options were changed, another process
            trains it, or it cannot be written.
        CheckpointError: the layers of its spec were changed.
        DivergedError: the run diverged, before the interruption or now.
        InvflowError: this machine does not have the device, or ``save_every`` is no interval.
        OSError: as `train` does.
    """
    accelerator = _accelerator(device)
    recorded = Run.open(folder).record  # before a folder without a run is changed
    every = recorded.get("save_every", SAVE_EVERY) if save_every is None else save_every
    interval = Interval.parse(every)
    with owned(folder):
        run = Run.open(folder)  # as the owner before left it
        if run.record.get("status") == "finished":
            return run
        if run.record.get("status") == "diverged":
            raise DivergedError(f"{folder}: {run.record.get('why', 'training diverged')}; it would diverge again")
        if "frozen_from" in run.record:
            raise RunError(f"{folder}: frozen from {run.record['frozen_from']}; resume that run, then freeze it again")
        _require_unedited(run)
        run.update(save_every=str(every))
        if "freeze" in run.record:  # the interruption may have come after the exact model was written
            run = Run(folder, run.spec.replace(numerics=None), run.record)
        task = _initialized(
            run.spec, check_trainable(run.spec, data_root, folder=run.data_folder, download=download).data
        )
        return _trained(run, task, interval, accelerator, progress)


def _require_unedited(run: Run) -> None:
    """Raise RunError if the training options are not those with which the run began."""
    known = run.record.get("training")
    changed = known and diff_specs(run.spec.replace(training=known), run.spec)
    if changed:
        edited = f"the training options were edited after the run began: {changed[0]}"
        raise RunError(f"{run.folder / SPEC_FILE}: {edited}; undo that, or train the spec into another folder")


def _trained(run: Run, task: Task[Any], interval: Interval, accelerator: dict[str, Any], progress: bool) -> Run:
    """The run, trained to its end, and frozen if its numerics are exact."""
    seconds = fit(run, task, interval, accelerator, progress)
    if "freeze" in run.record:
        write_checkpoint(run.spec.document, task.model.state_dict(), run.folder / FLOAT)
        run = Run(run.folder, run.spec.replace(numerics=run.record["freeze"]), run.record)
        seen = task.data.train.first(FREEZING_SAMPLES)
        exact = freeze(task.model, seen.values, Exact.model_validate(run.record["freeze"]), seen.context)
        write_checkpoint(run.spec.document, exact.state_dict(), run.folder)
    run.update(status="finished", seconds=seconds, parameters=task.parameters())
    return run


def folder_name(spec: Spec) -> str:
    """A folder name for a spec: its own name without characters that lead elsewhere; the spec may be a stranger's."""
    return re.sub(r"[^\w.-]+", "-", spec.name or "").strip(".-")[:60] or "run"


def check_trainable(
    spec: Spec, data_root: Path | None = None, *, folder: Path | None = None, download: bool = False
) -> Task[Any]:
    """The task of training a spec's model, on the meta device. Raises the errors of `train` if it cannot be trained.

    Args:
        spec: the spec.
        data_root: see `load_data`.
        folder: to which the paths of data are relative; by default the spec's own.
        download: see `load_data`.
    """
    options = (spec.training or Training()).data
    data = load_data(options, data_root, folder=folder or spec.folder, download=download)
    if spec.input_shape != data.shape:
        kind = "images" if data.holds_images else "points"
        message = f"{options.name} has {kind} of shape {data.shape}, the spec expects {spec.input_shape}"
        raise spec.error(("input", "shape"), message)
    if spec.context_shape != data.context_shape:
        raise spec.error(("input", "context_shape"), _misfit(options, spec.context_shape, data.context_shape))
    with torch.device("meta"):
        model = build_model(spec)
    if isinstance(model, Flow) and spec.top.numerics.on_grid:
        raise spec.error(("numerics",), "a density is trained on numbers off the grid; leave numerics out")
    task = task_of(model, data)
    task.check(spec)
    return task


def _misfit(options: Data, wanted: TensorShape | None, there: TensorShape | None) -> str:
    """What is wrong if the data have another context than the spec expects."""
    if there is None:
        return f'{options.name} gives no context to train with; name one in training.data, such as "context": "labels"'
    expects = "no context_shape" if wanted is None else f"the context_shape {list(wanted)}"
    return f"{options.name} gives a context of shape {list(there)}, but the input has {expects}"


def overridden(spec: Spec, overrides: dict[str, Any]) -> Spec:
    """The spec with overrides in its training block; ``lr`` is the optimiser's, ``train_size`` the data's."""
    training = Training().model_dump(mode="json", exclude_none=True) | (spec.expanded.get("training") or {})
    known = {name: value for name, value in overrides.items() if value is not None}
    for name, value in known.items():
        block = {"lr": "optimizer", "train_size": "data"}.get(name)
        training |= {name: value} if block is None else {block: {**training[block], name: value}}
    return spec.replace(training=training) if known else spec


def versions() -> dict[str, str]:
    """The versions that a result depends on, besides spec and seed."""
    from importlib.metadata import version

    names = ("invflow", "torch", "torchvision", "lightning", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _initialized(spec: Spec, data: DataSet) -> Task[Any]:
    """The task of training a spec's model, with random weights, and layers initialized with the first batch."""
    options = spec.training or Training()
    torch.manual_seed(options.seed)
    task = task_of(build_model(spec), data)
    task.check_range(spec)
    some = data.train.first(options.batch_size)
    task.model.bijection.initialize(task.inputs(some.values), some.context)
    return task


def device_of(name: str) -> torch.device:
    """The device on which to evaluate a model: auto, cpu, cuda, cuda:1, mps.

    As in training, but auto prefers the CPU to mps, which has no float64.

    Raises:
        InvflowError: this machine does not have the device.
    """
    device: torch.device = Fabric(**_accelerator(name)).device
    return CPU if name == "auto" and device.type == "mps" else device


def _accelerator(device: str) -> dict[str, Any]:
    """Lightning's arguments for a device. Raises InvflowError if this machine does not have it."""
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    there += ["mps"] * torch.backends.mps.is_available()
    if device not in ("auto", *there, *("cuda" for name in there if name == "cuda:0")):
        raise InvflowError(f"device {device!r} is not available; expected auto or one of: {', '.join(there)}")
    kind, _, index = device.partition(":")
    return {"accelerator": kind, "devices": [int(index)] if index else 1}
