"""The base of all tasks, and of the scores and evaluations that they return."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ...diagnostics.roundtrip import RoundTrip, round_trips
from ...models import Classifier, Flow
from ...spec.document import Spec
from ..data import TEST_BATCH, DataSet
from ..module import ModelTraining, evaluation_draws

if TYPE_CHECKING:  # matplotlib is imported only to draw
    from matplotlib.figure import Figure

    from ...diagnostics.pictures import Curve

CPU = torch.device("cpu")
ROUND_TRIP_SAMPLES = 1000
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
            >>> Score("accuracy", "accuracy", "%", 2, 100, True, 2).text(0.8512)
            '85.12%'
        """
        return f"{self.factor * value:.{self.digits}f}{self.unit}"

    def beats(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far, which is None at first. NaN is never better."""
        if best is None:
            return not math.isnan(value)
        return value > best if self.higher_is_better else value < best


@dataclass(frozen=True)
class Evaluation(ABC):
    """The evaluation of a trained model on the test samples.

    Attributes:
        parameters: the number of trained parameters.
        invertible: whether the whole model is invertible, apart from a last linear layer.
        round_trips: the chain's round trip on the first test samples, by dtype and mode.
    """

    parameters: int
    invertible: bool
    round_trips: dict[tuple[str, str], RoundTrip]

    @property
    @abstractmethod
    def scores(self) -> dict[str, float]:
        """The test scores by their names in ``run.json``, the main one first."""

    @abstractmethod
    def summary(self) -> str:
        """The scores in words."""


class Task(ABC, Generic[M]):
    """The training and evaluation of one kind of model on one data set.

    Args:
        model: the model, on the CPU.
        data: the data set, on the CPU.
        device: where the model is evaluated and sampled; afterwards it is on the CPU again, as all results are.

    Attributes:
        score: the score of this kind of model.
        training: the Lightning module that trains it.
    """

    score: Score
    training: ClassVar[type[ModelTraining]]

    def __init__(self, model: M, data: DataSet, device: torch.device = CPU) -> None:
        self.model = model
        self.data = data
        self.device = device

    @abstractmethod
    def check(self, spec: Spec) -> None:
        """Raise SpecError if the model that the spec describes does not fit the data."""

    def inputs(self, values: Tensor) -> Tensor:
        """The model's input for samples of the data set; it may draw from torch's global generator."""
        return values

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Scores on all test samples and the chain's round trips, in eval mode; the model stays in its mode."""

    @abstractmethod
    def curves(self) -> Sequence[Curve]:
        """The panels of the training curves."""

    @abstractmethod
    def figures(self) -> dict[str, Figure]:
        """Pictures of the trained model by name, in addition to those of every model."""

    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(weight.numel() for weight in self.model.parameters())

    def outputs(self) -> Tensor:
        """The model's outputs for all test samples, in eval mode."""
        found = []
        with evaluating(self.model, self.device):
            for index, values in enumerate(torch.split(self.data.test.values, TEST_BATCH)):
                with evaluation_draws(index):
                    found.append(self.model(self.inputs(values).to(self.device)).cpu())
        return torch.cat(found)

    @property
    def float64_device(self) -> torch.device:
        """The device, or the CPU in place of one without float64."""
        return CPU if self.device.type == "mps" else self.device

    def round_trips(self) -> dict[tuple[str, str], RoundTrip]:
        """The chain's round trips on the model's input for the first test samples."""
        chain, device = self.model.bijection, self.float64_device
        with evaluating(self.model, device), evaluation_draws(0):
            x = self.inputs(self.data.test.values[: ROUND_TRIP_SAMPLES if chain.cheap_inverse else ITERATED_SAMPLES])
            return round_trips(chain, x.to(device))


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
