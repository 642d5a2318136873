"""Training and evaluation of models of both the class and the density."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..models import BayesHead, GaussianMixture, Hybrid
from ..samples import Batch
from ..spec.document import Spec
from ..state import flat_size
from .classification import ACCURACY, check_classes, require_known
from .density import BITS, NLL, Density, FlowEvaluation, bits_of
from .module import ModelTraining
from .tasks import Score


class HybridTraining(ModelTraining):
    """Training of a hybrid by the cross-entropy, plus `density_weight` times the negative log-density per dimension."""

    def measure(self, stage: str, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        logits, log_prob = self.task.of_inputs(self.model_in(stage), batch)
        labels, nll = batch.labels, -log_prob.mean()
        assert labels is not None  # `HybridTask.check` has seen that there are some
        smoothing = self.options.label_smoothing if stage == "train" else 0.0
        entropy = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        loss = entropy + self.options.density_weight * nll / flat_size(self.task.data.shape)
        bits = bits_of(self.task.model, self.task.data, -nll)
        more = {} if bits is None else {BITS.name: bits}
        return loss, {ACCURACY.name: (logits.argmax(1) == labels).mean(dtype=torch.float), NLL.name: nll, **more}


@dataclass(frozen=True, repr=False)
class HybridEvaluation(FlowEvaluation):
    """The evaluation of a trained hybrid on the test samples.

    Attributes:
        test_accuracy: from 0 to 1; for images, that of dequantised pixels.
        test_loss: mean cross-entropy, in nats.
    """

    test_accuracy: float
    test_loss: float

    @property
    def scores(self) -> dict[str, float]:
        return {"test_accuracy": self.test_accuracy, **super().scores}

    def summary(self) -> str:
        return f"test accuracy {ACCURACY.text(self.test_accuracy)}, {super().summary()}"


class HybridTask(Density):
    """The training and evaluation of a hybrid."""

    model: Hybrid
    training = HybridTraining

    @property
    def score(self) -> Score:
        return ACCURACY

    def check(self, spec: Spec) -> None:
        self.check_prior(spec)
        prior, head = self.model.prior, self.model.head
        components = len(prior.means) if isinstance(head, BayesHead) and isinstance(prior, GaussianMixture) else None
        check_classes(self.data, spec, components)

    def of_model(self, batch: Batch) -> Tensor:
        """The logits, and behind them the log-density."""
        logits, log_prob = super().of_model(batch)
        return torch.cat([logits, log_prob[:, None]], dim=1)

    def evaluate(self) -> HybridEvaluation:
        made, labels = self.outputs()
        if labels is None:
            raise DataError(f"a hybrid is measured on samples with labels, {self.data.name} has some without")
        logits, log_prob = made[:, :-1], made[:, -1].double().mean()
        require_known(self.data, labels, logits.shape[1])
        accuracy = round(float((logits.argmax(1) == labels).float().mean()), 6)
        loss = float(nn.functional.cross_entropy(logits, labels))
        bits = bits_of(self.model, self.data, log_prob)
        scores = -float(log_prob), None if bits is None else float(bits)
        trips = self.round_trips()
        return HybridEvaluation(self.parameters(), True, self.model.caveat, trips, *scores, accuracy, loss)
