"""The training of a run, to its end or from where it was interrupted."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from pydantic import ValidationError

from ..data.given import NAME as GIVEN
from ..errors import DivergedError, InvflowError, RunError
from ..fields import describe
from ..models import Classifier, Flow, Hybrid
from ..models.freezing import freeze
from ..numerics import Exact
from ..samples import BYTES, DataSet
from ..spec.build import build_model
from ..spec.checkpoint import SPEC_FILE, write_checkpoint
from ..spec.diff import diff_specs
from ..spec.document import Spec
from ..spec.training import Hardware, Training
from ..state import common_dtype, is_tensor_shape
from .classification import Classification
from .data import batches_of, load_data
from .density import Density
from .fit import fit
from .hybrid import HybridTask
from .learning_rate import find_lr
from .midpoints import unfit_for_midpoints
from .processes import Processes, accelerator, processes_of
from .run_folder import Run, begin, misfit, owned, require_empty
from .saving import SAVE_EVERY, Interval
from .tasks import CPU, FREEZING_SAMPLES, Task
from .warned import noting_warnings

FLOAT = "float"
DTYPES: Mapping[Any, torch.dtype] = {32: torch.float32, 64: torch.float64}
"""Of weights, by the precision of a training."""
WITHIN = {"lr": "optimizer", "train_size": "data", **dict.fromkeys(Hardware.model_fields, "hardware")}
"""The blocks of the training block whose entries options override by name."""


def train(
    spec: Spec,
    folder: Path,
    *,
    data: DataSet | None = None,
    model: Classifier | Flow | None = None,
    data_root: Path | None = None,
    download: bool = False,
    overrides: dict[str, Any] | None = None,
    save_every: int | str = SAVE_EVERY,
    progress: bool = True,
) -> Run:
    """Train the classifier or the flow that a spec describes.

    Args:
        spec: a spec with a head or a prior; the training block may be absent.
        folder: the run folder to write; it must be empty or absent.
        data: the data; None for those that the spec names.
        model: the model, which the spec describes, with the weights to begin with; None for random weights.
        data_root: see `load_data`.
        download: see `load_data`.
        overrides: entries that override those of the training block; see `overridden`.
        save_every: how often to save the state in the middle of an epoch: steps, such as 200, or minutes, such as "5m".
            The ends of epochs are saved too, at most one a second.
        progress: whether to show a progress bar.

    Each of several processes calls it with the same arguments, and one of them writes the run. SIGTERM and Ctrl-C act
    after the next step, when the state is saved; a second one acts at once.

    Raises:
        RunError: the folder is not empty, another process trains there, or it was removed meanwhile.
        DataError: the data set is missing or too small.
        SpecError: the spec has no head and no prior, or its shapes do not fit the data.
        DivergedError: the loss or a weight is no longer finite; the folder keeps the last finite weights.
        InvflowError: this machine does not have the device, or ``save_every`` is no interval.
        OSError: a file cannot be written; what was saved before stays valid.
    """
    interval = Interval.parse(save_every)
    overrides = {name: value for name, value in (overrides or {}).items() if value is not None}
    spec = overridden(spec, overrides)
    processes = processes_of((spec.training or Training()).hardware)
    if processes.leads:
        require_empty(folder)
    data = check_trainable(spec, data_root, data=data, download=download).data
    to_freeze: dict[str, Any] = {}
    if spec.top.numerics.integer_nets:
        to_freeze, spec = {"freeze": spec.top.numerics.model_dump(mode="json")}, spec.replace(numerics=None)
    task = _initialized(spec, data, model)
    if processes.shards and any(weight.dim() == 0 for weight in task.model.parameters()):
        why = "PyTorch shards no weight that is a single number, which a layer has; take ddp"
        raise spec.error(("training", "hardware", "strategy"), why)
    found_lr: dict[str, Any] = {}
    options = spec.training or Training()
    if options.find_lr:
        found_lr = {"found_lr": find_lr(task, options)}
        spec = overridden(spec, {"lr": found_lr["found_lr"]})
    with owned(folder) if processes.leads else contextlib.nullcontext():
        if not processes.leads:
            return _trained(Run(folder, spec, {**to_freeze}), task, interval, processes, progress)
        started: dict[str, Any] = {"name": spec.name, "status": "training", "overrides": overrides, **found_lr}
        started |= {"epochs_done": 0, "steps_done": 0}
        if spec.folder is not None:  # to which the paths of files are relative
            started["data_folder"] = str(spec.folder.resolve())
        started |= {"training": (spec.training or Training()).model_dump(mode="json")}
        started |= {"hardware": processes.hardware.model_dump(mode="json")}
        started |= {"save_every": str(save_every), "versions": versions(), **to_freeze}
        run = begin(folder, spec.document, task.model, started)
        return _trained(run, task, interval, processes, progress)


def resume(
    folder: Path,
    *,
    data: DataSet | None = None,
    model: Classifier | Flow | None = None,
    data_root: Path | None = None,
    download: bool = False,
    save_every: int | str | None = None,
    hardware: dict[str, Any] | None = None,
    progress: bool = True,
) -> Run:
    """Resume a run that was interrupted, from where it was saved last.

    On the CPU, with as many processes as before, the result is the same as without the interruption, to the bit. A
    finished run is returned unchanged. The arguments are those of `train`; by default, ``save_every`` is what it was,
    and so are the entries of the training block's ``hardware``, which ``hardware`` overrides.

    Raises:
        RunError: the folder holds no run, its state cannot be read, its training options were changed, another process
            trains it, or it cannot be written.
        CheckpointError: the layers of its spec were changed.
        DivergedError: the run diverged, before the interruption or now.
        InvflowError: this machine does not have the device, or ``save_every`` is no interval.
        OSError: as `train` does.
    """
    before = Run.open(folder)  # before a folder without a run is changed
    every = before.record.get("save_every", SAVE_EVERY) if save_every is None else save_every
    interval = Interval.parse(every)
    processes = processes_of(_elsewhere(before, hardware))
    with owned(folder) if processes.leads else contextlib.nullcontext():
        run = Run.open(folder)  # as the owner before left it
        if not run.record:
            raise RunError(f"{folder}: a model that a program saved: there is no training to resume")
        if run.record.get("status") == "finished":
            return run
        if run.record.get("status") == "diverged":
            raise DivergedError(f"{folder}: {run.record.get('why', 'training diverged')}; it would diverge again")
        if "frozen_from" in run.record:
            raise RunError(f"{folder}: frozen from {run.record['frozen_from']}; resume that run, then freeze it again")
        _require_unedited(run)
        if processes.leads:
            run.update(save_every=str(every), hardware=processes.hardware.model_dump(mode="json"))
        if "freeze" in run.record:  # the interruption may have come after the exact model was written
            run = Run(folder, run.spec.replace(numerics=None), run.record)
        options: dict[str, Any] = {"data": data, "folder": run.data_folder, "download": download}
        task = _initialized(run.spec, check_trainable(run.spec, data_root, **options).data, model)
        return _trained(run, task, interval, processes, progress)


def _elsewhere(run: Run, hardware: dict[str, Any] | None) -> Hardware:
    """Where a run goes on: where it was trained before, unless entries say otherwise."""
    known = {name: value for name, value in (hardware or {}).items() if value is not None}
    try:
        return Hardware.model_validate({**run.record.get("hardware", run.training.hardware.model_dump()), **known})
    except ValidationError as error:
        raise InvflowError(f"hardware: {describe(error.errors(include_url=False)[0])}") from None


def _require_unedited(run: Run) -> None:
    """Raise RunError if the training options are not those with which the run began."""
    known = run.record.get("training")
    changed = known and diff_specs(run.spec.replace(training=known), run.spec)
    if changed:
        edited = f"the training options were edited after the run began: {changed[0]}"
        raise RunError(f"{run.folder / SPEC_FILE}: {edited}; undo that, or train the spec into another folder")


def _trained(run: Run, task: Task[Any], interval: Interval, processes: Processes, progress: bool) -> Run:
    """The run, trained to its end, and frozen if its numerics are exact."""
    with noting_warnings(run.record):  # which is written at the ends of epochs
        seconds = fit(run, task, interval, processes, progress)
    with processes.in_turn(run.folder) as folder:
        if processes.leads:
            _finish(run, task, seconds)
    return Run.open(folder)  # whose spec is that of the exact model, if there is one


def _finish(run: Run, task: Task[Any], seconds: float) -> None:
    """Write what a run has at its end: the exact model, if its numerics are exact, and how it went."""
    if "freeze" in run.record:
        write_checkpoint(run.spec.document, task.model.state_dict(), run.folder / FLOAT)
        document = run.spec.replace(numerics=run.record["freeze"]).document
        seen = task.data.train.first(FREEZING_SAMPLES)
        exact = freeze(task.model, seen.values, Exact.model_validate(run.record["freeze"]), seen.context)
        write_checkpoint(document, exact.state_dict(), run.folder)
    run.update(status="finished", seconds=seconds, parameters=task.parameters())


def check_trainable(
    spec: Spec,
    data_root: Path | None = None,
    *,
    data: DataSet | None = None,
    folder: Path | None = None,
    download: bool = False,
) -> Task[Any]:
    """The task of training a spec's model, on the meta device. Raises the errors of `train` if it cannot be trained.

    Args:
        spec: the spec.
        data_root: see `load_data`.
        data: the data; None for those that the spec names.
        folder: to which the paths of data are relative; by default the spec's own.
        download: see `load_data`.
    """
    options = spec.training or Training()
    if data is None:
        data = load_data(options.data, data_root, folder=folder or spec.folder, download=download)
    if spec.input_shape != data.shape or spec.context_shape != data.context_shape:
        raise spec.error(*misfit(spec, data, True))
    with torch.device("meta"):
        model = build_model(spec)
    if isinstance(model, Flow) and spec.top.numerics.on_grid and not model.prior.discrete:
        raise spec.error(("numerics",), "a density is trained on numbers off the grid; leave numerics out")
    task = task_of(model, data)
    task.check(spec)
    if options.draw_every is not None and not task.drawable:
        why = f"images and points of the plane can be drawn, {data.name} has samples of shape {data.shape}"
        raise spec.error(("training", "draw_every"), why)
    why_not = None if options.midpoints is None else unfit_for_midpoints(task)
    if why_not is not None:
        raise spec.error(("training", "midpoints"), why_not)
    if "density_weight" in options.model_fields_set and not isinstance(model, Hybrid):
        why = "density_weight is for a model of both, with a head and a prior"
        raise spec.error(("training", "density_weight"), why)
    batches = batches_of(data.train, options.batch_size)
    unfit = options.unfit(options.planned_steps(batches), batches)
    if unfit is not None:
        raise spec.error(("training", unfit[0]), unfit[1])
    return task


def overridden(spec: Spec, overrides: dict[str, Any]) -> Spec:
    """The spec with overrides in its training block, or in the blocks in it: `WITHIN` names those of each."""
    known = {name: value for name, value in overrides.items() if value is not None}
    lengths = {"steps", "epochs"}  # of which one overrides the other
    left_out = lengths if known.keys() & lengths else set()
    training = {name: value for name, value in (spec.expanded.get("training") or {}).items() if name not in left_out}
    defaults = Training().model_dump(mode="json", exclude_none=True)
    for name, value in known.items():
        block = WITHIN.get(name)
        training |= {name: value} if block is None else {block: {**training.get(block, defaults[block]), name: value}}
    return spec.replace(training=training) if known else spec


def versions() -> dict[str, str]:
    """The versions that a result depends on, besides spec and seed."""
    from importlib.metadata import version

    names = ("invflow", "torch", "torchvision", "lightning", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def task_of_run(
    run: Run, data_root: Path | None = None, device: str = "auto", named: dict[str, Any] | None = None
) -> Task[Any]:
    """The task of evaluating the trained model of a run on the data of its spec, or on others.

    Args:
        run: the run.
        data_root: see `load_data`.
        device: see `device_of`.
        named: the document of other data.
    """
    return task_of(run.load(), run.data(data_root, named), device_of(device))


def task_to_sample(
    run: Run, data_root: Path | None = None, device: str = "auto", named: dict[str, Any] | None = None
) -> Task[Any]:
    """The same, without data if the spec names none that can be loaded: to sample, a model needs none."""
    shape, training = run.spec.input_shape, run.spec.training
    loads = named is not None or (training is not None and training.data.name != GIVEN)
    if loads or not is_tensor_shape(shape):
        return task_of_run(run, data_root, device, named)
    are_images = len(shape) == len(("channels", "height", "width"))
    data = DataSet.without_samples(shape, BYTES if are_images else None)
    return task_of(run.load(), data, device_of(device))


def _initialized(spec: Spec, data: DataSet, model: Classifier | Flow | None) -> Task[Any]:
    """The task of training a spec's model, by default with random weights; the first batch initializes its layers."""
    options = spec.training or Training()
    torch.manual_seed(options.seed)
    model = build_model(spec) if model is None else model
    task = task_of(model.to(DTYPES.get(options.precision)), data)
    task.check_range(spec)
    some = task.data.train.first(options.batch_size)
    task.initialize(some)
    return task


def device_of(name: str) -> torch.device:
    """The device on which to evaluate a model: auto, cpu, cuda, cuda:1, mps.

    As in training, but auto prefers the CPU to mps, which has no float64.

    Raises:
        InvflowError: this machine does not have the device.
    """
    device: torch.device = Fabric(**accelerator(name)).device
    return CPU if name == "auto" and device.type == "mps" else device


def task_of(model: Classifier | Flow, data: DataSet, device: torch.device = CPU) -> Task[Any]:
    """The task of training or evaluating this model on these data, which it takes in the dtype of its weights."""
    data = data.of_dtype(common_dtype(model))
    if isinstance(model, Hybrid):
        return HybridTask(model, data, device)
    return Density(model, data, device) if isinstance(model, Flow) else Classification(model, data, device)
