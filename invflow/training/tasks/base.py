"""What a kind of model has to say about its training: `Task`."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from ...diagnostics.roundtrip import RoundTrip, round_trips
from ...models import Classifier, Flow
from ...spec.document import Spec
from ...spec.training import Training
from ..data import DataSet
from ..module import ModelTraining, evaluation_draws

if TYPE_CHECKING:  # matplotlib loads only where something is drawn
    from matplotlib.figure import Figure

    from ...diagnostics.pictures import Curve

ROUND_TRIP_SAMPLES = 1000
ITERATED_SAMPLES = 200
"""The same where inverting takes an iteration for each layer."""

M = TypeVar("M", bound=Classifier | Flow)


@dataclass(frozen=True)
class Score:
    """The one number that says how good a model is.

    Attributes:
        name: what it is logged and recorded as, after ``train_`` or ``test_``.
        label: what people call it.
        unit: what it is shown in, with a space before it where one belongs there.
        digits: how many are shown after the point.
        factor: what it is multiplied by to be shown.
        higher_is_better: whether the best is the largest.
        narrowest: the range, in that unit, that a picture of a comparison shows at least; a closer look shows noise.
    """

    name: str
    label: str
    unit: str
    digits: int
    factor: float
    higher_is_better: bool
    narrowest: float

    def text(self, value: float) -> str:
        """The value as people read it.

        Examples:
            >>> Score("accuracy", "accuracy", "%", 2, 100, True, 2).text(0.8512)
            '85.12%'
        """
        return f"{self.factor * value:.{self.digits}f}{self.unit}"

    def beats(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best so far, None where there is none. NaN is never better."""
        if best is None:
            return value == value  # noqa: PLR0124 -- false for NaN
        return value > best if self.higher_is_better else value < best


@dataclass(frozen=True)
class Evaluation(ABC):
    """What a trained model is worth on the test samples.

    Attributes:
        parameters: how many numbers the model trains.
        invertible: whether all but a last linear layer runs backwards.
        round_trips: the chain's round trip on the first test samples, by dtype and mode.
    """

    parameters: int
    invertible: bool
    round_trips: dict[tuple[str, str], RoundTrip]

    @property
    @abstractmethod
    def scores(self) -> dict[str, float]:
        """The test scores by their names in ``run.json``, the one that counts first."""

    @abstractmethod
    def summary(self) -> str:
        """The scores in words."""


class Task(ABC, Generic[M]):
    """The training of one kind of model on one data set: what fits, what is measured, what is drawn.

    Args:
        model: the model.
        data: the data set.
    """

    score: Score

    def __init__(self, model: M, data: DataSet) -> None:
        self.model = model
        self.data = data

    @abstractmethod
    def check(self, spec: Spec) -> None:
        """Raises SpecError where the model that the spec describes does not fit the data."""

    def inputs(self, values: Tensor) -> Tensor:
        """What the model sees of samples of the data set; it may draw from torch's global generator."""
        return values

    @abstractmethod
    def module(self, options: Training) -> ModelTraining:
        """What Lightning trains."""

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Scores on all test samples and the chain's round trips, in eval mode; the model stays in its mode."""

    @abstractmethod
    def curves(self) -> Sequence[Curve]:
        """The panels of the picture of training."""

    @abstractmethod
    def figures(self) -> dict[str, Figure]:
        """Pictures of the trained model by name, besides those that every model has."""

    def parameters(self) -> int:
        """How many numbers the model trains."""
        return sum(weight.numel() for weight in self.model.parameters())

    def round_trips(self) -> dict[tuple[str, str], RoundTrip]:
        """The chain's round trips on what the model sees of the first test samples."""
        chain = self.model.bijection
        with evaluation_draws(0):
            x = self.inputs(self.data.test.values[: ROUND_TRIP_SAMPLES if chain.cheap_inverse else ITERATED_SAMPLES])
        return round_trips(chain, x)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and nothing has a gradient."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
