"""The training of a run, to its end or from where it was interrupted."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric

from ..data.given import NAME as GIVEN
from ..errors import DivergedError, InvflowError, RunError
from ..models import Classifier, Flow, Hybrid
from ..models.freezing import freeze
from ..numerics import Exact
from ..samples import BYTES, DataSet
from ..spec.build import build_model
from ..spec.checkpoint import SPEC_FILE, write_checkpoint
from ..spec.diff import diff_specs
from ..spec.document import Spec
from ..spec.training import Training
from ..state import is_tensor_shape
from .classification import Classification
from .data import batches_of, load_data
from .density import Density
from .fit import fit
from .hybrid import HybridTask
from .midpoints import unfit_for_midpoints
from .run_folder import Run, begin, misfit, owned, require_empty
from .saving import SAVE_EVERY, Interval
from .tasks import CPU, FREEZING_SAMPLES, Task

FLOAT = "float"


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
    device: str = "auto",
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
        overrides: entries that override those of the training block: seed, epochs, steps, batch_size, lr, train_size.
        save_every: how often to save the state in the middle of an epoch: steps, such as 200, or minutes, such as "5m".
            The ends of epochs are saved too, at most one a second.
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
    data = check_trainable(spec, data_root, data=data, download=download).data
    to_freeze: dict[str, Any] = {}
    if spec.top.numerics.integer_nets:
        to_freeze, spec = {"freeze": spec.top.numerics.model_dump(mode="json")}, spec.replace(numerics=None)
    task = _initialized(spec, data, model)
    with owned(folder):
        started: dict[str, Any] = {"name": spec.name, "status": "training", "overrides": overrides}
        started |= {"epochs_done": 0, "steps_done": 0}
        if spec.folder is not None:  # to which the paths of files are relative
            started["data_folder"] = str(spec.folder.resolve())
        options = (spec.training or Training()).model_dump(mode="json")
        started |= {"training": options, "save_every": str(save_every), "versions": versions(), **to_freeze}
        run = begin(folder, spec.document, task.model, started)
        return _trained(run, task, interval, accelerator, progress)


def resume(
    folder: Path,
    *,
    data: DataSet | None = None,
    model: Classifier | Flow | None = None,
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
        if not run.record:
            raise RunError(f"{folder}: a model that a program saved: there is no training to resume")
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
        options: dict[str, Any] = {"data": data, "folder": run.data_folder, "download": download}
        task = _initialized(run.spec, check_trainable(run.spec, data_root, **options).data, model)
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
    """The spec with overrides in its training block; ``lr`` is the optimiser's, ``train_size`` the data's."""
    known = {name: value for name, value in overrides.items() if value is not None}
    lengths = {"steps", "epochs"}  # of which one overrides the other
    left_out = lengths if known.keys() & lengths else set()
    training = {name: value for name, value in (spec.expanded.get("training") or {}).items() if name not in left_out}
    defaults = Training().model_dump(mode="json", exclude_none=True)
    for name, value in known.items():
        block = {"lr": "optimizer", "train_size": "data"}.get(name)
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
    task = task_of(build_model(spec) if model is None else model, data)
    task.check_range(spec)
    some = data.train.first(options.batch_size)
    task.initialize(some)
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


def task_of(model: Classifier | Flow, data: DataSet, device: torch.device = CPU) -> Task[Any]:
    """The task of training or evaluating this model on these data."""
    if isinstance(model, Hybrid):
        return HybridTask(model, data, device)
    return Density(model, data, device) if isinstance(model, Flow) else Classification(model, data, device)
