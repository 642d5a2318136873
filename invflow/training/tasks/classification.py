"""Classifiers: cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from ...models import Classifier
from ...spec.document import Spec
from ...spec.training import Training
from ..module import ModelTraining
from .base import Evaluation, Score, Task, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...diagnostics.pictures import Curve

SHOWN = 32
ACCURACY = Score("accuracy", "accuracy", "%", digits=2, factor=100, higher_is_better=True, narrowest=2.0)


class ClassifierTraining(ModelTraining):
    """Cross-entropy training of a classifier."""

    def __init__(self, task: Classification, options: Training) -> None:
        super().__init__(task, options)
        self.train_accuracy = MulticlassAccuracy(task.data.classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(task.data.classes, average="micro")

    def measure(self, stage: str, values: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor | Metric]]:
        logits, metric = self.model(values), getattr(self, f"{stage}_accuracy")
        metric.update(logits, labels)
        smoothing = self.options.label_smoothing if stage == "train" else 0.0
        return nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing), {ACCURACY.name: metric}


@dataclass(frozen=True)
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

    score = ACCURACY
    training = ClassifierTraining

    def check(self, spec: Spec) -> None:
        wanted = self.data.classes if spec.head is None else spec.head.values.get("classes", self.data.classes)
        if wanted != self.data.classes:
            name = (spec.training or Training()).data.name
            raise spec.error(("head", "classes"), f"{name} has {self.data.classes} classes, the head {wanted}")

    def evaluate(self) -> ClassifierEvaluation:
        logits, labels = self.outputs(), self.data.test.labels
        return ClassifierEvaluation(
            parameters=self.parameters(),
            invertible=self.model.linear_head,
            round_trips=self.round_trips(),
            test_accuracy=round(float((logits.argmax(1) == labels).float().mean()), 6),
            test_loss=float(nn.functional.cross_entropy(logits.double(), labels)),
        )

    def curves(self) -> Sequence[Curve]:
        from ...diagnostics.pictures import CLASSIFIER_CURVES

        return CLASSIFIER_CURVES

    def figures(self) -> dict[str, Figure]:
        from ...diagnostics.pictures import samples
        from ...diagnostics.plane import decisions

        if not self.data.holds_images:
            return {"decisions": decisions(self.model, self.data.test.values, self.data.test.labels)}
        values, labels = self.data.test.values[:SHOWN], self.data.test.labels[:SHOWN]
        with evaluating(self.model):
            guesses = self.model(values).argmax(1)
        return {"samples": samples(values, labels, guesses)}
