"""What a trained classifier is worth: accuracy, and how exactly its trunk runs backwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from ..diagnostics.roundtrip import RoundTrip, round_trips
from ..models import Classifier
from .data import DataSet, Images, load_data, test_loader
from .run import Run

ROUND_TRIP_IMAGES = 1000


@dataclass(frozen=True)
class Evaluation:
    """Results on the test images.

    Attributes:
        test_accuracy: 0 to 1.
        test_loss: mean cross-entropy, in nats.
        parameters: how many numbers the model trains.
        invertible: whether the head is one linear layer, so that all before it runs backwards.
        round_trips: the trunk's round trip on the first 1,000 test images, by dtype and mode.
    """

    test_accuracy: float
    test_loss: float
    parameters: int
    invertible: bool
    round_trips: dict[tuple[str, str], RoundTrip]


def evaluate(model: Classifier, data: DataSet) -> Evaluation:
    """Accuracy and loss on all test images, and the trunk's round trips."""
    accuracy, loss = accuracy_and_loss(model, data.test, data.classes)
    return Evaluation(
        test_accuracy=accuracy,
        test_loss=loss,
        parameters=sum(weight.numel() for weight in model.parameters()),
        invertible=model.linear_head,
        round_trips=round_trips(model.bijection, data.test.pixels[:ROUND_TRIP_IMAGES]),
    )


def evaluate_run(run: Run, data_root: Path | None = None) -> Evaluation:
    """`evaluate` for the model of a run, on the data that its spec names."""
    return evaluate(run.load(), load_data(run.training.data, data_root))


@torch.no_grad()
def accuracy_and_loss(model: Classifier, images: Images, classes: int) -> tuple[float, float]:
    """Test accuracy, 0 to 1, and mean cross-entropy, in nats, in eval mode."""
    was_training = model.training
    model.eval()
    metric = MulticlassAccuracy(classes, average="micro")
    total = torch.zeros((), dtype=torch.float64)
    for pixels, labels in test_loader(images):
        logits = model(pixels)
        metric.update(logits, labels)
        total += nn.functional.cross_entropy(logits, labels, reduction="sum")
    model.train(was_training)
    return round(float(metric.compute()), 6), float(total) / len(images)
