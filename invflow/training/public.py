"""What a Python program calls: `fit`, `evaluate`, `analyse`, `lightning`, and tools of the command line for models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..arguments import arguments_of
from ..bijection import Bijection
from ..context import Context, ContextShape
from ..data.given import NAME as GIVEN
from ..diagnostics import interpolation, roundtrip
from ..diagnostics.analysis import Analysis
from ..errors import InvflowError
from ..models import BayesHead, Classifier, Flow, GaussianMixture, Hybrid
from ..samples import DataSet
from ..sequential import Sequential
from ..source import Request
from ..spec import load_spec, to_spec
from ..spec.document import Spec, SpecSource
from ..spec.training import Data, Hardware, Training
from ..state import common_dtype, is_tensor_shape
from . import run as runs
from .analysing import analyse as analyse_task
from .data import load_data
from .given import Given, data_set, samples_of
from .module import ModelTraining
from .run import device_of, task_of
from .run_folder import Run, folder_name, new_folder, parsed_data
from .saving import SAVE_EVERY
from .tasks import Evaluation

Model: TypeAlias = Classifier | Flow


def fit(
    model: Model | SpecSource,
    data: Given,
    folder: str | Path | None = None,
    *,
    test: Given | None = None,
    validation: Given | None = None,
    context: str | Mapping[str, str] | None = None,
    levels: int | None = None,
    resume: bool = False,
    data_root: str | Path | None = None,
    device: str | None = None,
    save_every: int | str = SAVE_EVERY,
    progress: bool = True,
    **training: Any,
) -> Run:
    """Train a model, or the model of a spec, on data of this program.

    A model that is passed is trained itself. What the command line does with a run it does with this one too, except
    that the data must be named for it.

    Args:
        model: a classifier or a flow; or the spec of one, as a path, a dict or a `Spec`.
        data: tensors or numpy arrays, ``values`` or ``(values, labels)`` or ``(values, labels, context)``, where a
            second entry that is no vector of integers is the context; a Dataset, a DataLoader or a LightningDataModule
            of these; a source of `invflow.data`; a data set's name, or its document as in a spec.
        folder: the run folder, empty or absent; None for a new one below ``runs``.
        test: the test data; by default a fifth of the data, drawn at random (``test_size`` and ``split_seed`` in the
            data of a spec's training block say otherwise).
        validation: the data by which the best weights are chosen; by default the test data are.
        context: "labels", to make the classes the context, one-hot; {"class": "labels"} makes them an entry of it.
        levels: the number of grey levels of pixels, multiples of 1 / levels, as integers or already divided; by default
            256 for bytes, and none for other numbers.
        resume: whether to go on with the run in the folder, with the same model and the same data.
        data_root: the folder of data that are named.
        device: auto, cpu, cuda, cuda:1, mps; None for the accelerator that the training block names.
        save_every: as in `invflow.train`.
        progress: whether to show a progress bar.
        **training: entries of the training block: epochs or steps, batch_size, seed, lr, optimizer, schedule, devices,
            strategy, precision, accumulate, compile, ... Of several devices, each has a process that runs this program.

    Raises:
        DataError: the data are missing, damaged, or of an unknown kind.
        SpecError: the model does not fit the data, or an entry of the training block is wrong.
        RunError: the folder is not empty, or it holds no run to resume.
        DivergedError: the loss or a weight is no longer finite.

    Examples:
        >>> import tempfile, torch, invflow
        >>> spec = {"input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"}}
        >>> run = invflow.fit(spec, torch.randn(100, 2), tempfile.mkdtemp(), epochs=1, progress=False)
        >>> run.model.log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """
    given = model if isinstance(model, Classifier | Flow) else None
    if given is not None and given.bijection.numerics.integer_nets:
        raise InvflowError("fit expects a model that is not exact yet: integers have no gradients; pass its spec")
    spec = None if given is not None else load_spec(model)  # type: ignore[arg-type]
    parts = Data() if spec is None or spec.training is None else spec.training.data
    if context is not None:
        parts = parts.model_copy(update={"context": context})
    root = None if data_root is None else Path(data_root)
    if isinstance(data, str | dict):
        named = {"name": data} if isinstance(data, str) else data
        found = load_data(parsed_data(named), root, folder=None if spec is None else spec.folder)
    else:
        named = {**parts.model_dump(mode="json", exclude_defaults=True, exclude={*parts.of_source}), "name": GIVEN}
        request = Request(**{**parts.model_dump(exclude={"augmentation", *parts.of_source}), "name": GIVEN})
        classes = _classes(given, spec)
        found = data_set(
            data, request, test=test, validation=validation, levels=levels, classes=classes, dtype=_dtype(given)
        )
    if given is not None:
        spec = load_spec(to_spec(given, None if given.bijection.declared_shape else found.shape))
    assert spec is not None
    training = {"accelerator": device, **training}
    spec = runs.overridden(spec, {"data": named, **training})
    place = Path(folder) if folder is not None else new_folder(folder_name(spec))
    options: dict[str, Any] = {"data": found, "model": given, "progress": progress}
    if resume:
        hardware = {name: training[name] for name in Hardware.model_fields if name in training}
        return runs.resume(place, save_every=save_every, hardware=hardware, **options)
    return runs.train(spec, place, save_every=save_every or SAVE_EVERY, **options)


def analyse(
    run_or_model: Run | Model | str | Path,
    data: Given | None = None,
    *,
    test: Given | None = None,
    levels: int | None = None,
    data_root: str | Path | None = None,
    device: str = "auto",
    **options: Any,
) -> Analysis:
    """What a model does layer by layer: singular values of the Jacobian, linear separation and contraction.

    `invflow.plot.spectra` and `invflow.plot.separation` draw it.

    Args:
        run_or_model: a run, its folder or that of `invflow.save`, or a model.
        data: as in `fit`: training samples, from which classifiers learn, and test samples. None for the data that the
            run's spec names.
        test: the test data; by default a fifth of the data, which `fit` takes too.
        levels: as in `fit`.
        data_root: the folder of data that are named.
        device: auto, cpu, cuda, cuda:1, mps.
        **options: depths, inputs, train_samples, test_samples, dense, leading, seed: as in
            `invflow.training.analysing.analyse`.

    Raises:
        DataError: the data are missing, damaged, or do not fit the model.
        InvflowError: nothing applies to the model and the data, or an option is out of range.

    Examples:
        >>> import torch, invflow
        >>> flow = invflow.build_model(
        ...     {"input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"}}
        ... )
        >>> found = invflow.analyse(flow, torch.randn(10, 2), inputs=1)
        >>> found.spectra[0].values, found.notes
        ([[1.0, 1.0]], ['no separation: the data name no two classes'])
    """
    root = None if data_root is None else Path(data_root)
    run = open_run(run_or_model) if isinstance(run_or_model, str | Path) else run_or_model
    if data is None:
        if not isinstance(run, Run):
            raise InvflowError("analyse expects data along with a model; only a run names its own")
        return analyse_task(runs.task_of_run(run, root, device), **options)
    model = run.load() if isinstance(run, Run) else run
    if isinstance(data, str | dict):
        found = load_data(parsed_data({"name": data} if isinstance(data, str) else data), root)
    else:
        known: dict[str, Any] = {"classes": _classes(model, None), "dtype": _dtype(model)}
        found = data_set(data, Request(name=GIVEN), test=test, levels=levels, **known)
    return analyse_task(task_of(model, found, device_of(device)), **options)


def evaluate(
    run_or_model: Run | Model | str | Path,
    data: Given | None = None,
    *,
    levels: int | None = None,
    data_root: str | Path | None = None,
    device: str = "auto",
) -> Evaluation:
    """The scores of a model on data, and how exactly its chain is inverted.

    Args:
        run_or_model: a run, its folder or that of `invflow.save`, or a model.
        data: the data to measure on, all of them: as in `fit`. None for the test data that the run's spec names.
        levels: as in `fit`.
        data_root: the folder of data that are named.
        device: auto, cpu, cuda, cuda:1, mps.

    Raises:
        DataError: the data are missing, damaged, or do not fit the model.

    Examples:
        >>> import torch, invflow
        >>> flow = invflow.build_model(
        ...     {"input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"}}
        ... )
        >>> evaluate(flow, torch.zeros(10, 2)).test_nll  # log(2 pi)
        1.8378770351409912
    """
    root = None if data_root is None else Path(data_root)
    run = open_run(run_or_model) if isinstance(run_or_model, str | Path) else run_or_model
    if data is None:
        if not isinstance(run, Run):
            raise InvflowError("evaluate expects data along with a model; only a run names its own")
        return runs.task_of_run(run, root, device).evaluate()
    model = run.load() if isinstance(run, Run) else run
    return task_of(model, _to_measure_on(model, data, levels, root), device_of(device)).evaluate()


def lightning(model: Model, *, levels: int | None = None, **training: Any) -> ModelTraining:
    """The LightningModule that trains a model, for a Trainer of your own.

    Its batches are values, ``(values, labels)``, ``(values, labels, context)`` or dicts of these, as in `fit`; it logs
    ``train_loss``, ``val_loss`` and the model's score.

    Args:
        model: a classifier or a flow.
        levels: the number of grey levels of pixels, multiples of 1 / levels, for a flow of images; None for numbers.
        **training: entries of the training block: optimizer, lr, schedule, warmup, label_smoothing, seed.

    Examples:
        >>> import invflow
        >>> flow = invflow.Flow(invflow.Sequential(), invflow.models.StandardNormal(shape=(2,)))
        >>> type(invflow.lightning(flow, optimizer={"type": "adam", "lr": 0.01})).__name__
        'FlowTraining'
    """
    shape = model.bijection.declared_shape
    if shape is None and isinstance(model, Flow) and (levels is not None or isinstance(model, Classifier)):
        shape = model.shape  # the loss is in units of a dimension
    known = shape if shape is not None and is_tensor_shape(shape) else (1,)
    data = DataSet.without_samples(known, levels, _classes(model, None))
    task = task_of(model, data)
    document = {"input": {"shape": [1]}, "layers": []}  # of which only the training block counts
    options = runs.overridden(load_spec(document), training).training or Training()
    return task.training(task, options)


def open_run(folder: str | Path) -> Run:
    """The run in a folder, or the model that `invflow.save` wrote there.

    Raises:
        RunError: there is neither.

    Examples:
        >>> import tempfile
        >>> open_run(tempfile.mkdtemp())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        invflow.errors.RunError: ...
    """
    return Run.open(Path(folder))


def train(spec: SpecSource, folder: str | Path | None = None, **options: Any) -> Run:
    """Train the model of a spec on the data that it names: as `fit`, and as ``invflow train``.

    Args:
        spec: a path, a dict or a `Spec`.
        folder: the run folder, empty or absent; None for a new one below ``runs``.
        **options: data_root, download, save_every, device, progress, and entries of the training block as overrides.

    Examples:
        >>> import tempfile, invflow
        >>> spec = {
        ...     "input": {"shape": [2]}, "layers": [{"type": "affine"}], "prior": {"type": "standard_normal"},
        ...     "training": {"data": {"name": "moons", "train_size": 200, "test_size": 100}, "epochs": 1},
        ... }
        >>> run = invflow.train(spec, tempfile.mkdtemp(), progress=False)
        >>> run.record["status"]
        'finished'
    """
    document = load_spec(spec)
    names = ("data_root", "download", "save_every", "progress")
    given = {name: options.pop(name) for name in names if name in options}
    if given.get("data_root") is not None:
        given["data_root"] = Path(given["data_root"])
    place = Path(folder) if folder is not None else new_folder(folder_name(document))
    overrides = {"accelerator" if name == "device" else name: value for name, value in options.items()}
    return runs.train(document, place, overrides=overrides, **given)


def round_trip(model: Model | Bijection, x: Any, context: Context = None) -> roundtrip.RoundTrip:
    """How exactly a model's chain, or a chain, returns x: forward and back, in its current mode.

    Args:
        model: a model, a chain or a single bijection.
        x: a batch of inputs.
        context: as the model, or the chain, takes it.

    Examples:
        >>> import torch
        >>> from invflow.bijections import Psi
        >>> round_trip(Psi(2), torch.randn(3, 1, 4, 4)).absolute
        0.0
    """
    return roundtrip.round_trip(_chain(model), x, _for_layers(model, context))


def interpolate(
    model: Model | Bijection,
    x0: Tensor,
    x1: Tensor,
    steps: int = 9,
    context0: Context = None,
    context1: Context = None,
) -> Tensor:
    """Walks from inputs to others, straight in the feature space of a model or a chain.

    Args:
        model: a model, a chain or a single bijection, in its current mode.
        x0: the first inputs, ``(pairs, ...)``.
        x1: the last ones.
        steps: the number of inputs in each walk.
        context0: of the first inputs.
        context1: of the last ones.

    Returns:
        ``(pairs, steps, ...)``.

    Examples:
        >>> import torch
        >>> from invflow.bijections import Psi
        >>> interpolate(Psi(2), torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), steps=3).flatten().tolist()[4:8]
        [0.5, 0.5, 0.5, 0.5]
    """
    ends = (_for_layers(model, context) for context in (context0, context1))
    return interpolation.interpolate(_chain(model), x0, x1, steps, *ends)


def _for_layers(model: Model | Bijection, context: Context) -> Any:
    if context is None or not isinstance(model, Classifier | Flow):
        return context
    return model.for_layers(context)


def _chain(model: Model | Bijection) -> Sequential:
    if isinstance(model, Classifier | Flow):
        return model.bijection
    return model if isinstance(model, Sequential) else Sequential(model)


def _dtype(model: Model | None) -> torch.dtype:
    """That of a model's weights; of one that is still to be built, the default."""
    return torch.get_default_dtype() if model is None else common_dtype(model) or torch.get_default_dtype()


def _classes(model: Model | None, spec: Spec | None) -> int:
    """The number of classes that a model tells apart or is told; 0 if it knows of none."""
    if isinstance(model, Hybrid) and isinstance(model.head, BayesHead) and isinstance(model.prior, GaussianMixture):
        return len(model.prior.means)
    if isinstance(model, Classifier):
        return int((arguments_of(model.head) or {}).get("classes", 0))
    if spec is not None and spec.head is not None:
        return int(spec.head.values.get("classes", 0))
    context: ContextShape = None if spec is None else spec.context_shape
    if model is not None:
        context = model.context_shape
    return context[0] if isinstance(context, tuple) and len(context) == 1 else 0


def _to_measure_on(model: Model, data: Given, levels: int | None, root: Path | None) -> DataSet:
    """A data set of test samples only."""
    if isinstance(data, str | dict):
        return load_data(parsed_data({"name": data} if isinstance(data, str) else data), root)
    if isinstance(data, DataSet):
        return data
    samples = samples_of(data, levels, _dtype(model))
    labels = samples.labels
    count = max(_classes(model, None), 0 if labels is None else int(labels.max()) + 1)
    names = tuple(map(str, range(count if isinstance(model, Classifier) or labels is not None else 0)))
    return DataSet(GIVEN, samples, samples, levels=getattr(samples, "levels", levels), class_names=names)
