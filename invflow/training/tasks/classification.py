"""Classifiers: cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from ...models import Classifier
from ...spec.document import Spec
from ...spec.training import Training
from ..data import Samples, test_loader
from ..module import ModelTraining
from .base import Evaluation, Score, Task, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...diagnostics.pictures import Curve

SHOWN = 32
ACCURACY = Score("accuracy", "accuracy", "%", digits=2, factor=100, higher_is_better=True, narrowest=2.0)


class ClassifierTraining(ModelTraining):
    """Cross-entropy training of a classifier.

    Args:
        model: the classifier.
        options: the spec's training block.
        samples: the training samples.
        classes: how many labels there are.
    """

    def __init__(self, model: Classifier, options: Training, samples: Samples, classes: int) -> None:
        super().__init__(model, options, samples)
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def measure(self, stage: str, values: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor | Metric]]:
        logits = self.model(values)
        smoothing, metric = (
            (self.options.label_smoothing, self.train_accuracy) if stage == "train" else (0.0, self.test_accuracy)
        )
        metric.update(logits, labels)
        return nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing), {ACCURACY.name: metric}


@dataclass(frozen=True)
class ClassifierEvaluation(Evaluation):
    """What a trained classifier is worth on the test samples.

    Attributes:
        test_accuracy: 0 to 1.
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
    """The training of a classifier."""

    score = ACCURACY

    def check(self, spec: Spec) -> None:
        wanted = self.data.classes if spec.head is None else spec.head.values.get("classes", self.data.classes)
        if wanted != self.data.classes:
            name = (spec.training or Training()).data.name
            raise spec.error(("head", "classes"), f"{name} has {self.data.classes} classes, the head {wanted}")

    def module(self, options: Training) -> ModelTraining:
        return ClassifierTraining(self.model, options, self.data.train, self.data.classes)

    def evaluate(self) -> ClassifierEvaluation:
        metric = MulticlassAccuracy(self.data.classes, average="micro")
        total = torch.zeros((), dtype=torch.float64)
        with evaluating(self.model):
            for values, labels in test_loader(self.data.test):
                logits = self.model(values)
                metric.update(logits, labels)
                total += nn.functional.cross_entropy(logits, labels, reduction="sum")
        return ClassifierEvaluation(
            parameters=self.parameters(),
            invertible=self.model.linear_head,
            round_trips=self.round_trips(),
            test_accuracy=round(float(metric.compute()), 6),
            test_loss=float(total) / len(self.data.test),
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
