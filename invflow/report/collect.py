"""What a report shows of a run: what its folder holds, and what is measured of its model in bounded time.

What cannot be measured is `Missing`, with the reason, and everything else is shown all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..data.given import NAME as GIVEN
from ..diagnostics import plane
from ..diagnostics.analysis import Analysis
from ..diagnostics.memory import ActivationMemory, activation_memory
from ..diagnostics.roundtrip import RoundTrip, errors_on_the_way_back, in_dtype, round_trip
from ..diagnostics.walks import outside
from ..errors import DataError, InvflowError
from ..measures import LARGEST_JACOBIAN
from ..models import Classifier, Flow
from ..samples import BYTES, DataSet
from ..state import Shape, TensorShape, flat_size, is_tensor_shape
from ..training.analysing import analyse, drawn
from ..training.density import DRAWN_CLASSES, Density
from ..training.illustrate import walks
from ..training.module import evaluation_draws
from ..training.run import device_of, task_of
from ..training.run_folder import Metrics, Run
from ..training.tasks import Task, evaluating
from ..training.warned import noting_warnings

T = TypeVar("T")

ERROR_SAMPLES = 100
ITERATED_SAMPLES = 20
"""The same if the inverse of a layer is an iteration."""
MOST_NUMBERS = 2**20
"""In the states of the samples whose errors are measured; of larger states there are fewer samples."""
RECONSTRUCTED = 8
WALKS = 5
WALK_STEPS = 11
PREDICTED = 24
DRAWN = 32
DRAWN_IN_A_ROW = 4
"""Images of a class."""
POINTS = 600
PLANE_SIDE = 100
PLANE_CLASSES = 4
DEPTHS = 6
DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Missing:
    """What a report has not, and why."""

    why: str


@dataclass(frozen=True)
class Depth:
    """A step of the chain.

    Attributes:
        name: its name in the chain.
        layer: its description, on one line.
        shape: of the whole state after it.
        parameters: the number of its trained numbers.
        exactness: the level that its inverse reaches.
        alone: by dtype, the relative error of its round trip alone; None for a joint, which has no inverse.
        back: by dtype, the relative error of its input when the chain runs backwards from its output.
    """

    name: str
    layer: str
    shape: Shape
    parameters: int
    exactness: str
    alone: dict[str, float | None]
    back: dict[str, float]


@dataclass(frozen=True)
class Errors:
    """How accurately the chain runs backwards on test samples: as a whole, by dtype, and step by step."""

    samples: int
    whole: dict[str, RoundTrip]
    depths: list[Depth]


@dataclass(frozen=True)
class Reconstructions:
    """Test images, what the inverse makes of their features, and how many pixels have their grey level again."""

    originals: Tensor
    back: Tensor
    names: list[str]
    equal: int


@dataclass(frozen=True)
class Walks:
    """Walks between test images: the frames, ``(pairs, steps, channels, height, width)``, and the names of the ends."""

    frames: Tensor
    ends: list[tuple[str, str]]

    def clipped(self, pair: int) -> float:
        """The part of a walk's pixels outside [0, 1], between its ends."""
        return outside(self.frames[pair, 1:-1])


@dataclass(frozen=True)
class Gallery:
    """Images, each with a caption, and whether it is one of a mistake."""

    images: Tensor
    captions: list[str]
    wrong: list[bool]

    @property
    def clipped(self) -> float:
        """The part of the pixels outside [0, 1]."""
        return outside(self.images)


@dataclass(frozen=True)
class PlaneDensity:
    """A density of the plane: some test points, samples, and the log-density on a grid, all in one region.

    Attributes:
        name: of the class that it is of; empty if it is of all.
        low: the lower left corner of the region.
        high: the upper right one.
        points: ``(n, 2)``.
        drawn: ``(m, 2)``, of the flow.
        log_density: ``(PLANE_SIDE, PLANE_SIDE)``, in nats, row after row from below.
    """

    name: str
    low: tuple[float, float]
    high: tuple[float, float]
    points: Tensor
    drawn: Tensor
    log_density: Tensor


@dataclass(frozen=True)
class Decisions:
    """The picture of a classifier's decisions in the plane, a PNG file."""

    png: bytes


Samples: TypeAlias = Gallery | list[PlaneDensity] | Decisions


@dataclass(frozen=True, eq=False)
class Portrait:
    """All that a report shows of one run."""

    run: Run
    model: Classifier | Flow
    data: str
    metrics: Metrics
    scores: dict[str, float] | Missing
    errors: Errors | Missing
    reconstructions: Reconstructions | Missing
    walks: Walks | Missing
    samples: Samples | Missing
    spectra: Analysis | Missing
    memory: ActivationMemory | Missing
    warned: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the page calls the run."""
        return self.run.spec.name or self.run.folder.resolve().name


PARTS = 7
"""That are measured of a run."""


def portrait(
    run: Run, data_root: Path | None = None, device: str = "auto", advance: Callable[[], None] = lambda: None
) -> Portrait:
    """Measure what a report shows of a run.

    Args:
        run: the run.
        data_root: see `load_data`.
        device: see `device_of`.
        advance: called after each of `PARTS`.

    Raises:
        InvflowError: there is no model in the folder, or this machine does not have the device.
    """
    model, place = run.load(), device_of(device)
    data = _tried(lambda: run.data(data_root))
    task = task_of(model, _no_data(run) if isinstance(data, Missing) else data, place)

    def part(measure: Callable[[], T]) -> T | Missing:
        found: T | Missing = data if isinstance(data, Missing) else _tried(measure)
        advance()
        return found

    warned: dict[str, Any] = {}
    with noting_warnings(warned), evaluation_draws(0):
        found = Portrait(
            run,
            task.model,
            _data_name(run) if isinstance(data, Missing) else task.data.name,
            run.metrics,
            _recorded_scores(run) or part(lambda: task.evaluate().scores),
            part(lambda: _errors(task)),
            part(lambda: _reconstructions(task)),
            part(lambda: _walks(task)),
            part(lambda: _samples(task)),
            part(lambda: _spectra(task)),
            _tried(lambda: _memory(run, task)),
            _recorded_warnings(run),
        )
        advance()
    found.warned.extend(warned.get("warnings", []))
    return found


def _tried(measure: Callable[[], T]) -> T | Missing:
    """What is measured, or why that is not possible: a page with a gap is better than none, whatever the fault is."""
    try:
        return measure()
    except InvflowError as error:
        return Missing(str(error))
    except Exception as error:  # of libraries, or of layers that others wrote
        return Missing(f"{type(error).__name__}: {error}")


def _no_data(run: Run) -> DataSet:
    """A data set without samples, of the shape that a run's model takes."""
    shape = run.spec.input_shape
    known: TensorShape = shape if is_tensor_shape(shape) else (1,)
    return DataSet.without_samples(known, BYTES if len(known) == len(("channels", "height", "width")) else None)


def _data_name(run: Run) -> str:
    """What data that are not here are called."""
    name = run.training.data.name
    return "passed by a program" if name == GIVEN else name


def _recorded_scores(run: Run) -> dict[str, float]:
    """The test scores that its training or its freezing has left."""
    names = ("test_accuracy", "test_bits_per_dim", "test_nll")
    return {name: run.record[name] for name in names if isinstance(run.record.get(name), float)}


def _recorded_warnings(run: Run) -> list[dict[str, Any]]:
    """The warnings of its training, of a record that a stranger may have written."""
    found = run.record.get("warnings")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _spectra(task: Task[Any]) -> Analysis:
    numbers = max(map(flat_size, task.model.bijection.shapes(task.data.shape)))
    if numbers > LARGEST_JACOBIAN:
        raise InvflowError(f"a state has {numbers:,} numbers, whose singular values take long: see invflow analyse RUN")
    return analyse(task, depths=DEPTHS, inputs=1, separate=False)


def _errors(task: Task[Any]) -> Errors:
    chain, place = task.model.bijection, task.float64_device
    shapes = chain.shapes(task.data.shape)
    most = max(2, MOST_NUMBERS // max(map(flat_size, shapes)))
    with evaluating(task.model, place):
        some = task.data.test.first(min(most, ERROR_SAMPLES if chain.cheap_inverse else ITERATED_SAMPLES))
        there = some._replace(values=task.inputs(some.values)).to(place)
        context = task.model.for_layers(there.context)
        whole, back = {}, {}
        for name in DTYPES:
            inputs = in_dtype(chain, there.values, context, getattr(torch, name))
            whole[name], back[name] = round_trip(*inputs), errors_on_the_way_back(*inputs)
    depths = []
    for i, step in enumerate(chain.steps(task.data.shape)):
        count = sum(weight.numel() for weight in step.layer.parameters())
        alone = {name: whole[name].by_step[i] for name in DTYPES}
        errors = {name: back[name][i] for name in DTYPES}
        depths.append(Depth(step.name, step.title, shapes[i + 1], count, step.layer.exactness, alone, errors))
    return Errors(len(some.values), whole, depths)


def _reconstructions(task: Task[Any]) -> Reconstructions:
    _require_images(task)
    if task.model.caveat:
        raise InvflowError(task.model.caveat)
    chain, some = task.model.bijection, task.data.test.first(RECONSTRUCTED)
    with evaluating(task.model, task.device):
        there = some._replace(values=task.centered(some.values)).to(task.device)
        context = task.model.for_layers(there.context)
        back = chain.inverse(chain(there.values, context), context)
    equal = int((task.rounded(back) == task.rounded(there.values)).sum())
    names = [_named(task, label) for label in _labels(some.labels, len(some.values))]
    return Reconstructions(there.values.cpu(), back.cpu(), names, equal)


def _walks(task: Task[Any]) -> Walks:
    frames, ends = walks(task, WALKS, WALK_STEPS)
    labels = task.data.test.labels
    names = [tuple(_named(task, None if labels is None else one) for one in pair) for pair in ends]
    return Walks(frames, names)  # type: ignore[arg-type]


def _samples(task: Task[Any]) -> Samples:
    if task.data.holds_images:
        return _drawn_images(task) if isinstance(task, Density) else _predicted(task)
    if task.data.shape != (2,):
        raise InvflowError(f"samples of shape {task.data.shape} have no picture")
    if isinstance(task, Density):
        return _of_the_plane(task)
    from ..diagnostics.figure import png

    if not task.drawable:
        raise InvflowError("the decisions of a classifier that takes a context have no picture")
    return Decisions(png(task.figures()["decisions"]))


def _predicted(task: Task[Any]) -> Gallery:
    some = task.data.test.first(PREDICTED)
    with evaluating(task.model, task.device):
        guesses = task.of_model(some).argmax(1).tolist()
    labels = _labels(some.labels, len(guesses))
    pairs = zip(labels, guesses, strict=True)
    captions = [_named(task, a) if a == b else f"{_named(task, a)} taken for {_named(task, b)}" for a, b in pairs]
    return Gallery(some.values, captions, [a != b for a, b in zip(labels, guesses, strict=True)])


def _drawn_images(task: Density) -> Gallery:
    classes, names = task.rows_of_classes(), task.data.class_names[:DRAWN_CLASSES]
    if classes is None:
        samples = task.draw(DRAWN, task.data.test.first(DRAWN).context)
        captions = [""] * len(samples)
    else:
        samples = task.draw(DRAWN_IN_A_ROW * len(names), classes[: len(names)].repeat_interleave(DRAWN_IN_A_ROW, 0))
        captions = [name for name in names for _ in range(DRAWN_IN_A_ROW)]
    return Gallery(samples, captions, [False] * len(samples))


def _of_the_plane(task: Density) -> list[PlaneDensity]:
    some, classes = drawn(task.data.test, POINTS, 0).all(), task.rows_of_classes()
    low, high = plane.window(some.values)
    place = plane.grid(low, high, PLANE_SIDE)

    def one(name: str, points: Tensor, given: Any) -> PlaneDensity:
        samples = task.draw(len(points), given)
        with evaluating(task.model):
            found = plane.log_density(task.model, place, given)
        corners = tuple(low.tolist()), tuple(high.tolist())
        return PlaneDensity(name, *corners, points, samples, found.reshape(PLANE_SIDE, PLANE_SIDE))

    if classes is None or some.labels is None:
        return [one("", some.values, some.context)]
    of_class = [(name, some.values[some.labels == k], classes[[k]]) for k, name in enumerate(task.data.class_names)]
    return [one(*known) for known in of_class if len(known[1])][:PLANE_CLASSES]


def _memory(run: Run, task: Task[Any]) -> ActivationMemory:
    log_det = isinstance(task.model, Flow)
    return activation_memory(task.model.bijection, run.training.batch_size, log_det=log_det)


def _require_images(task: Task[Any]) -> None:
    if not task.data.holds_images:
        raise DataError(f"there is no picture of samples of shape {task.data.shape}")


def _labels(labels: Tensor | None, count: int) -> Sequence[int | None]:
    return [None] * count if labels is None else labels.tolist()


def _named(task: Task[Any], label: int | None) -> str:
    """The name of a class; empty if it is not known."""
    names = task.data.class_names
    return "" if label is None else names[label] if label < len(names) else str(label)
