"""What training and evaluation of all kinds of models share."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..diagnostics.roundtrip import RoundTrip, round_trips
from ..models import Classifier, Flow
from ..samples import Batch, DataSet
from ..spec.document import Spec
from .data import ordered_loader
from .module import ModelTraining, evaluation_draws

if TYPE_CHECKING:  # matplotlib is imported only to draw
    from ..diagnostics.figure import Figure

CPU = torch.device("cpu")
SHOWN_IMAGES = 32
DRAWN_POINTS = 2000
ROUND_TRIP_SAMPLES = 1000
FREEZING_SAMPLES = 10_000
"""The number of training samples on which the ranges of activations are measured."""
ITERATED_SAMPLES = 200
"""The number of samples if the inverse of a layer is an iteration."""

M = TypeVar("M", bound=Classifier | Flow)


@dataclass(frozen=True)
class Score:
    """The one number that measures how good a model is.

    Attributes:
        name: its name in logs and records, after ``train_`` or ``test_``.
        label: its name for readers.
        unit: the unit, with the space that precedes it, if any.
        digits: the number of digits after the decimal point.
        factor: the factor that converts a value to the unit.
        higher_is_better: whether the best value is the largest.
        narrowest: the smallest range, in the unit, of the axis in a comparison's picture; a smaller one shows noise.
    """

    name: str
    label: str
    unit: str
    digits: int
    factor: float
    higher_is_better: bool
    narrowest: float

    def text(self, value: float) -> str:
        """The value with its unit.

        Examples:
            >>> Score("accuracy", "accuracy", " %", 2, 100, True, 2).text(0.8512)
            '85.12 %'
        """
        return f"{self.factor * value:.{self.digits}f}{self.unit}"

    def beats(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far, which is None at first. NaN is never better."""
        if best is None:
            return not math.isnan(value)
        return value > best if self.higher_is_better else value < best


@dataclass(frozen=True, repr=False)
class Evaluation(ABC):
    """The evaluation of a trained model on the test samples.

    Attributes:
        parameters: the number of trained parameters.
        invertible: whether the input of the whole model can be computed back, apart from a last linear layer.
        caveat: see `invflow.models.caveat`.
        round_trips: the chain's round trip on the first test samples, by dtype and mode.
    """

    parameters: int
    invertible: bool
    caveat: str
    round_trips: dict[tuple[str, str], RoundTrip]

    @property
    @abstractmethod
    def scores(self) -> dict[str, float]:
        """The test scores by their names in ``run.json``, the main one first."""

    @abstractmethod
    def summary(self) -> str:
        """The scores in words."""

    def __repr__(self) -> str:
        error = max(trip.relative for (dtype, _), trip in self.round_trips.items() if dtype == "float32")
        caveat = f"; {self.caveat}" if self.caveat else ""
        return f"<{self.summary()}, {self.parameters:,} parameters, round-trip error {error:.1e} in float32{caveat}>"


class Task(ABC, Generic[M]):
    """The training and evaluation of one kind of model on one data set.

    Args:
        model: the model, on the CPU.
        data: the data set, on the CPU.
        device: where the model is evaluated and sampled; afterwards it is on the CPU again, as all results are.

    Attributes:
        training: the Lightning module that trains it.
    """

    training: ClassVar[type[ModelTraining]]

    def __init__(self, model: M, data: DataSet, device: torch.device = CPU) -> None:
        self.model = model
        self.data = data
        self.device = device

    @property
    @abstractmethod
    def score(self) -> Score:
        """The score of this kind of model."""

    @abstractmethod
    def check(self, spec: Spec) -> None:
        """Raise SpecError if the model that the spec describes does not fit the data."""

    def check_range(self, spec: Spec) -> None:
        """Raise SpecError if values that the data may take have no density."""

    def inputs(self, values: Tensor) -> Tensor:
        """The model's input for samples of the data set; it may draw from torch's global generator."""
        return values

    def centered(self, values: Tensor) -> Tensor:
        """The model's input for samples of the data set without random numbers: the middle of what `inputs` draws."""
        return values

    def rounded(self, inputs: Tensor) -> Tensor:
        """The samples that inputs of the model stand for: pixels on their grid, but perhaps out of its range."""
        levels = self.data.levels
        return inputs if levels is None else (inputs * levels).round() / levels

    @property
    def awaits_data(self) -> bool:
        """Whether layers still have to be initialised from data."""
        return self.model.bijection.awaits_data

    def initialize(self, batch: Batch) -> None:
        """Initialises the layers that await data from samples of the data set."""
        self.model.bijection.initialize(self.inputs(batch.values), self.model.for_layers(batch.context))

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Scores on all test samples and the chain's round trips, in eval mode; the model stays in its mode."""

    @property
    def drawable(self) -> bool:
        """Whether `figures` has pictures of such data."""
        return self.data.holds_images or self.data.shape == (2,)

    @abstractmethod
    def figures(self) -> dict[str, Figure]:
        """Pictures of the trained model by name, in addition to those of every model."""

    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(weight.numel() for weight in self.model.parameters())

    def outputs(self) -> tuple[Tensor, Tensor | None]:
        """The model's outputs for all test samples, in eval mode, and their labels, if there are some."""
        found, labels = [], []
        with evaluating(self.model, self.device):
            for index, (batch, *_) in enumerate(ordered_loader(self.data.test)):
                with evaluation_draws(index):
                    found.append(self.of_model(batch).cpu())
                labels.append(batch.labels)
        known = [one for one in labels if one is not None]
        return torch.cat(found), torch.cat(known) if len(known) == len(found) else None

    def of_inputs(self, model: nn.Module, batch: Batch) -> Any:
        """What a model returns for samples of the data set, on their device."""
        return model(self.inputs(batch.values), batch.context)

    def of_model(self, batch: Batch) -> Tensor:
        """The model's outputs for samples of the data set."""
        there = batch._replace(values=self.inputs(batch.values)).to(self.device)
        made: Tensor = self.model(there.values, there.context)
        return made

    @property
    def float64_device(self) -> torch.device:
        """The device, or the CPU in place of one without float64."""
        return CPU if self.device.type == "mps" else self.device

    def round_trips(self) -> dict[tuple[str, str], RoundTrip]:
        """The chain's round trips on the model's input for the first test samples."""
        chain, device = self.model.bijection, self.float64_device
        with evaluating(self.model, device), evaluation_draws(0):
            some = self.data.test.first(ROUND_TRIP_SAMPLES if chain.cheap_inverse else ITERATED_SAMPLES)
            there = some._replace(values=self.inputs(some.values)).to(device)
            return round_trips(chain, there.values, self.model.for_layers(there.context))


@contextlib.contextmanager
def evaluating(model: nn.Module, device: torch.device = CPU) -> Iterator[None]:
    """Run the context with the model on the device and in eval mode, without gradients; then return it to the CPU."""
    was_training = model.training
    try:
        model.eval().to(device)
        with torch.no_grad():
            yield
    finally:
        model.train(was_training).to(CPU)
