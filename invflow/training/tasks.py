"""Training and evaluation of each kind of model: classifiers and flows."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..diagnostics.roundtrip import RoundTrip, round_trips
from ..errors import DataError
from ..models import Classifier, Flow, bits_per_dimension, dequantize
from ..samples import Batch, DataSet
from ..spec.document import Spec
from ..state import flat_size, map_state
from .data import test_loader
from .module import ModelTraining, evaluation_draws

if TYPE_CHECKING:  # matplotlib is imported only to draw
    from ..diagnostics.figure import Figure

CPU = torch.device("cpu")
SHOWN_IMAGES = 32
DRAWN_IMAGES = 64
DRAWN_POINTS = 2000
ROUND_TRIP_SAMPLES = 1000
MOST_NAMES = 12
"""Of classes, in a message."""
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
            >>> Score("accuracy", "accuracy", "%", 2, 100, True, 2).text(0.8512)
            '85.12%'
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

    @abstractmethod
    def evaluate(self) -> Evaluation:
        """Scores on all test samples and the chain's round trips, in eval mode; the model stays in its mode."""

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
            for index, batch in enumerate(test_loader(self.data.test)):
                with evaluation_draws(index):
                    found.append(self.of_model(batch).cpu())
                labels.append(batch.labels)
        known = [one for one in labels if one is not None]
        return torch.cat(found), torch.cat(known) if len(known) == len(found) else None

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
            return round_trips(chain, there.values, there.context)


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


ACCURACY = Score("accuracy", "accuracy", "%", digits=2, factor=100, higher_is_better=True, narrowest=2.0)
NLL = Score("nll", "negative log-likelihood", " nats", digits=3, factor=1, higher_is_better=False, narrowest=0.1)
BITS = Score("bits_per_dim", "bits per dimension", " bits/dim", 3, 1, higher_is_better=False, narrowest=0.1)


class ClassifierTraining(ModelTraining):
    """Cross-entropy training of a classifier."""

    def measure(self, stage: str, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits, labels = self.model_in(stage)(batch.values, batch.context), batch.labels
        assert labels is not None  # `Classification.check` has seen that there are some
        smoothing = self.options.label_smoothing if stage == "train" else 0.0
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        return loss, {ACCURACY.name: (logits.argmax(1) == labels).mean(dtype=torch.float)}


@dataclass(frozen=True, repr=False)
class ClassifierEvaluation(Evaluation):
    """The evaluation of a trained classifier on the test samples.

    Attributes:
        test_accuracy: from 0 to 1.
        test_loss: mean cross-entropy, in nats.
    """

    test_accuracy: float
    test_loss: float

    @property
    def scores(self) -> dict[str, float]:
        return {"test_accuracy": self.test_accuracy}

    def summary(self) -> str:
        return f"test accuracy {ACCURACY.text(self.test_accuracy)}"


class Classification(Task[Classifier]):
    """The training and evaluation of a classifier."""

    training = ClassifierTraining

    @property
    def score(self) -> Score:
        return ACCURACY

    def check(self, spec: Spec) -> None:
        if not self.data.classes:
            raise spec.error(("head",), f"{self.data.name} has no labels, which a classifier learns")
        wanted = self.data.classes if spec.head is None else spec.head.values.get("classes", self.data.classes)
        if wanted != self.data.classes:
            raise spec.error(
                ("head", "classes"), f"{self.data.name} has {self.data.classes} classes, the head {wanted}"
            )

    def evaluate(self) -> ClassifierEvaluation:
        logits, labels = self.outputs()
        if labels is None:
            raise DataError(f"a classifier is measured on samples with labels, {self.data.name} has some without")
        accuracy = round(float((logits.argmax(1) == labels).float().mean()), 6)
        loss = float(nn.functional.cross_entropy(logits, labels, reduction="sum")) / len(labels)
        invertible, caveat = self.model.linear_head, self.model.caveat
        return ClassifierEvaluation(self.parameters(), invertible, caveat, self.round_trips(), accuracy, loss)

    def figures(self) -> dict[str, Figure]:
        from ..diagnostics.pictures import samples
        from ..diagnostics.plane import decisions

        if not self.data.holds_images:
            if self.data.shape != (2,) or self.data.context_shape is not None:
                return {}
            some = self.data.test.first(DRAWN_POINTS)
            with evaluating(self.model):
                return {"decisions": decisions(self.model, some.values, _labels(some))}
        some = self.data.test.first(SHOWN_IMAGES)
        with evaluating(self.model):
            guesses = self.model(some.values, some.context).argmax(1)
        return {"samples": samples(some.values, _labels(some), guesses)}


def _labels(batch: Batch) -> Tensor:
    """The labels of samples, of which `Classification.check` has seen that they have some."""
    assert batch.labels is not None
    return batch.labels


class FlowTraining(ModelTraining):
    """Maximum-likelihood training of a flow.

    The loss is the negative log-likelihood in nats, or for images in bits per dimension, so that learning rates and
    clipping have the same effect for images of every size.
    """

    def measure(self, stage: str, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        log_prob = self.model_in(stage)(self.task.inputs(batch.values), batch.context).mean()
        bits = bits_of(self.task.model, self.task.data, log_prob)
        if bits is None:
            return -log_prob, {NLL.name: -log_prob}
        return bits, {NLL.name: -log_prob, BITS.name: bits}


@dataclass(frozen=True, repr=False)
class FlowEvaluation(Evaluation):
    """The evaluation of a trained flow on the test samples.

    Attributes:
        test_nll: the mean negative log-density, in nats; for images, that of dequantised pixels in [0, 1).
        test_bits_per_dim: for images, an upper bound of their bits per dimension, from one draw of the noise.
    """

    test_nll: float
    test_bits_per_dim: float | None

    @property
    def scores(self) -> dict[str, float]:
        nll = {"test_nll": self.test_nll}
        return nll if self.test_bits_per_dim is None else {"test_bits_per_dim": self.test_bits_per_dim, **nll}

    def summary(self) -> str:
        nll = f"test {NLL.label} {NLL.text(self.test_nll)}"
        return nll if self.test_bits_per_dim is None else f"test {BITS.text(self.test_bits_per_dim)}, {nll}"


class Density(Task[Flow]):
    """The training and evaluation of a flow."""

    training = FlowTraining

    @property
    def score(self) -> Score:
        return BITS if self.data.holds_images else NLL

    def check(self, spec: Spec) -> None:
        if spec.training is not None and spec.training.label_smoothing:
            why = "label_smoothing is for classifiers: a flow learns without labels"
            raise spec.error(("training", "label_smoothing"), why)
        if self.model.prior.discrete and self.data.levels is None:
            why = f"a prior on a grid is for images, and {self.data.name} has numbers off any grid; take another prior"
            raise spec.error(("prior",), why)

    def check_range(self, spec: Spec) -> None:
        levels, discrete, high = self.data.levels, self.model.prior.discrete, self.data.high
        if levels is None:
            return
        if discrete:
            high -= 1 / levels  # the last pixel, which is not dequantised
        some = torch.tensor([0.0, 1 / levels, high])
        constant = some.view(-1, *[1] * len(self.data.shape)).expand(-1, *self.data.shape)
        if (self.log_prob(constant, self.data.train.first(1).context) == -math.inf).any():
            if discrete:
                why = f"{self.data.name} has pixels from 0 to {high} in steps of 1/{levels}, and the prior gives them 0"
                raise spec.error(("prior",), f"{why}; fit its levels and its bounds")
            why = f"dequantised pixels of {self.data.name} lie in [0, {high}], and the model has no density at its ends"
            raise spec.error(("layers",), f"{why}; give its logit a larger alpha")

    def inputs(self, values: Tensor) -> Tensor:
        levels = self.data.levels
        return values if levels is None or self.model.prior.discrete else dequantize(values, levels)

    def evaluate(self) -> FlowEvaluation:
        log_prob = self.outputs()[0].double().mean()
        bits = bits_of(self.model, self.data, log_prob)
        scores = -float(log_prob), None if bits is None else float(bits)
        return FlowEvaluation(self.parameters(), True, self.model.caveat, self.round_trips(), *scores)

    def figures(self) -> dict[str, Figure]:
        shape, context = self.data.shape, self.data.test.first(DRAWN_POINTS).context
        if self.data.holds_images:
            given = None if context is None else context[:DRAWN_IMAGES]
            return {"samples": self.picture(self.draw(DRAWN_IMAGES, given))}
        if shape != (2,):
            return {}
        return {"density": self.picture(self.draw(DRAWN_POINTS, context))}

    def draw(self, count: int, context: Tensor | None = None, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Samples of the flow in eval mode, determined by the seed, up to rounding on every device.

        Args:
            count: the number of samples.
            context: rows that the samples take in turn.
            temperature: as in `Flow.sample`.
            seed: of the random numbers.
        """
        with evaluation_draws(seed):
            with evaluating(self.model):  # on the CPU, because each device has its own random numbers
                rows = in_turn(context, count)
                latent, _ = self.model.latent(count if rows is None else 1, rows, temperature=temperature)
            with evaluating(self.model, self.device):
                there = map_state(lambda leaf: leaf.to(self.device), latent)
                drawn: Tensor = self.model.inverse(there, None if rows is None else rows.to(self.device))
        return drawn.cpu()

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The log-density of each sample in nats, in eval mode and without gradients."""
        with evaluating(self.model, self.device), evaluation_draws(0):
            return self.model.log_prob(x.to(self.device), in_turn(context, len(x), self.device)).cpu()

    def rows_of_context(self, texts: Sequence[str]) -> Tensor | None:
        """The rows of a context in words, for samples; of the test samples, if there are no words but a context.

        A row is a class by its number or its name, if the context is one-hot of the classes, or else its numbers,
        separated by commas.

        Args:
            texts: one per row.

        Raises:
            DataError: the model takes no context, or a row does not fit.
        """
        shape, data = self.model.bijection.declared_context_shape, self.data
        if shape is None:
            if texts:
                raise DataError("--context expects a flow that takes a context, got one that takes none")
            return None
        if not texts:
            found = data.test.first(DRAWN_POINTS).context
            if found is None:
                raise DataError("the flow takes a context, and there are no data that have one: pass --context")
            return found
        of_classes, rows = shape == (data.classes,), []
        for text in texts:
            named = [text in (str(place), name) for place, name in enumerate(data.class_names)]
            if of_classes and any(named):
                rows.append(torch.tensor(named).float())
                continue
            try:
                rows.append(torch.tensor([float(word) for word in text.split(",")]).reshape(shape))
            except (ValueError, RuntimeError):
                classes = f"a class ({', '.join(data.class_names[:MOST_NAMES])}) or " if of_classes else ""
                numbers = f"{classes}{flat_size(shape)} numbers with commas"
                raise DataError(f"--context expects {numbers}, got {text!r}") from None
        return torch.stack(rows)

    def picture(self, drawn: Tensor, context: Tensor | None = None) -> Figure:
        """Samples: images side by side, or points next to the data and the flow's density.

        Args:
            drawn: the samples.
            context: that the samples have, if it is not that of the test samples: the test samples that have it too,
                if there are some, are shown.
        """
        from ..diagnostics.pictures import gallery
        from ..diagnostics.plane import density

        if self.data.holds_images:
            return gallery(drawn, f"{len(drawn)} samples of the flow")
        if self.data.shape != (2,):
            raise DataError(f"a picture shows images or points of the plane, got samples of shape {self.data.shape}")
        some = self.data.test.first(DRAWN_POINTS)
        if not len(some.values):
            some = Batch(drawn)
        if context is not None and some.context is not None:
            alike = (some.context[:, None] == context).flatten(2).all(2).any(1)
            some = some.rows(alike) if bool(alike.any()) else some
        with evaluating(self.model):
            return density(self.model, some.values, drawn, some.context if context is None else context)


def bits_of(flow: Flow, data: DataSet, log_prob: Tensor) -> Tensor | None:
    """Bits per dimension of images, of which a discrete prior gives the probability, and any other the density."""
    if data.levels is None:
        return None
    return bits_per_dimension(log_prob, flat_size(data.shape), 1 if flow.prior.discrete else data.levels)


def in_turn(context: Tensor | None, count: int, device: torch.device = CPU) -> Tensor | None:
    """The rows of a context, one for each of ``count`` samples, from the first again after the last."""
    return None if context is None else context[torch.arange(count) % len(context)].to(device)


def task_of(model: Classifier | Flow, data: DataSet, device: torch.device = CPU) -> Task[Any]:
    """The task of training or evaluating this model on these data."""
    return Density(model, data, device) if isinstance(model, Flow) else Classification(model, data, device)
