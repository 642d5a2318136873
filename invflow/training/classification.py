"""Training and evaluation of classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..models import Classifier
from ..samples import Batch, DataSet
from ..spec.document import Spec
from .module import ModelTraining
from .tasks import DRAWN_POINTS, SHOWN_IMAGES, Evaluation, Score, Task, evaluating

if TYPE_CHECKING:  # matplotlib is imported only to draw
    from ..diagnostics.figure import Figure

ACCURACY = Score("accuracy", "accuracy", " %", digits=2, factor=100, higher_is_better=True, narrowest=2.0)


class ClassifierTraining(ModelTraining):
    """Cross-entropy training of a classifier."""

    def measure(self, stage: str, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits, labels = self.task.of_inputs(self.model_in(stage), batch), batch.labels
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
        check_classes(self.data, spec)

    def evaluate(self) -> ClassifierEvaluation:
        logits, labels = self.outputs()
        if labels is None:
            raise DataError(f"a classifier is measured on samples with labels, {self.data.name} has some without")
        require_known(self.data, labels, logits.shape[1])
        accuracy = round(float((logits.argmax(1) == labels).float().mean()), 6)
        loss = float(nn.functional.cross_entropy(logits, labels, reduction="sum")) / len(labels)
        invertible, caveat = self.model.linear_head and self.model.bijection.invertible, self.model.caveat
        return ClassifierEvaluation(self.parameters(), invertible, caveat, self.round_trips(), accuracy, loss)

    @property
    def drawable(self) -> bool:
        return self.data.holds_images or (super().drawable and self.data.context_shape is None)

    def figures(self) -> dict[str, Figure]:
        from ..diagnostics.pictures import samples
        from ..diagnostics.plane import decisions

        if not self.drawable:
            return {}
        if not self.data.holds_images:
            some = self.data.test.first(DRAWN_POINTS)
            with evaluating(self.model):
                return {"decisions": decisions(self.model, some.values, _labels(some))}
        some = self.data.test.first(SHOWN_IMAGES)
        with evaluating(self.model):
            guesses = self.model(some.values, some.context).argmax(1)
        return {"samples": samples(some.values, _labels(some), guesses)}


def require_known(data: DataSet, labels: Tensor, classes: int) -> None:
    """Raise DataError if samples have labels that a model does not know."""
    if len(labels) and int(labels.max()) >= classes:
        raise DataError(
            f"{data.name} has the label {int(labels.max())}, but the model knows the classes 0 to {classes - 1}"
        )


def check_classes(data: DataSet, spec: Spec, components: int | None = None) -> None:
    """Raise SpecError if the data have no labels, or not as many classes as the head, or the prior, has."""
    if not data.classes:
        raise spec.error(("head",), f"{data.name} has no labels, which a classifier learns")
    if components not in (None, data.classes):
        raise spec.error(("prior",), f"{data.name} has {data.classes} classes, the prior {components} components")
    wanted = data.classes if spec.head is None else spec.head.values.get("classes", data.classes)
    if wanted != data.classes:
        raise spec.error(("head", "classes"), f"{data.name} has {data.classes} classes, the head {wanted}")


def _labels(batch: Batch) -> Tensor:
    """The labels of samples, of which `Classification.check` has seen that they have some."""
    assert batch.labels is not None
    return batch.labels
