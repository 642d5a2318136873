"""Flows: maximum likelihood, in nats, and for images in bits per dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from ...models import Flow, bits_per_dimension, dequantize
from ...spec.document import Spec
from ...spec.training import Training
from ...state import flat_size
from ..data import test_loader
from ..module import ModelTraining, evaluation_draws
from .base import Evaluation, Score, Task, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...diagnostics.pictures import Curve

NLL = Score("nll", "negative log-likelihood", " nats", digits=3, factor=1, higher_is_better=False, narrowest=0.1)
BITS = Score("bits_per_dim", "bits per dimension", " bits/dim", 3, 1, higher_is_better=False, narrowest=0.1)
DRAWN = 2000  # samples beside a density of points
SHOWN = 64  # images


class FlowTraining(ModelTraining):
    """Maximum-likelihood training of a flow: the loss is the negative log-likelihood in nats, of images in bits per
    dimension, so that learning rates and clipping mean the same for images of every size.

    Args:
        task: the flow and its data.
        options: the spec's training block.
    """

    def __init__(self, task: Density, options: Training) -> None:
        super().__init__(task.model, options, task.data.train)
        self.task = task

    def measure(self, stage: str, values: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor | Metric]]:
        log_prob = self.model(self.task.inputs(values)).mean()
        if self.task.data.levels is None:
            return -log_prob, {NLL.name: -log_prob}
        bits = bits_per_dimension(log_prob, flat_size(self.task.data.shape), self.task.data.levels)
        return bits, {NLL.name: -log_prob, BITS.name: bits}


@dataclass(frozen=True)
class FlowEvaluation(Evaluation):
    """What a trained flow is worth on the test samples.

    Attributes:
        test_nll: the mean negative log-density, in nats; of images the density of dequantised pixels in [0, 1).
        test_bits_per_dim: of images, with one draw of the noise an upper bound of theirs in bits per dimension.
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
    """The training of a flow."""

    @property
    def score(self) -> Score:  # type: ignore[override]
        return BITS if self.data.holds_images else NLL

    def check(self, spec: Spec) -> None:
        if spec.training is not None and spec.training.label_smoothing:
            message = "label_smoothing is for classifiers: a flow learns without labels"
            raise spec.error(("training", "label_smoothing"), message)

    def inputs(self, values: Tensor) -> Tensor:
        return values if self.data.levels is None else dequantize(values, self.data.levels)

    def module(self, options: Training) -> ModelTraining:
        return FlowTraining(self, options)

    def evaluate(self) -> FlowEvaluation:
        total = torch.zeros((), dtype=torch.float64)
        with evaluating(self.model):
            for index, (values, _) in enumerate(test_loader(self.data.test)):
                with evaluation_draws(index):
                    total -= self.model.log_prob(self.inputs(values)).double().sum()
        nll = total / len(self.data.test)
        levels, dimensions = self.data.levels, flat_size(self.data.shape)
        return FlowEvaluation(
            parameters=self.parameters(),
            invertible=True,
            round_trips=self.round_trips(),
            test_nll=float(nll),
            test_bits_per_dim=None if levels is None else float(bits_per_dimension(-nll, dimensions, levels)),
        )

    def curves(self) -> Sequence[Curve]:
        from ...diagnostics.pictures import Curve

        return [Curve(self.score.name, f"{self.score.label}{'' if self.data.holds_images else ', nats'}")]

    def figures(self) -> dict[str, Figure]:
        drawn = self.draw(SHOWN if self.data.holds_images else DRAWN)
        return {"samples" if self.data.holds_images else "density": self.picture(drawn)}

    def draw(self, count: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Samples of the flow, in eval mode, which the seed decides."""
        with evaluating(self.model), evaluation_draws(seed):
            drawn: Tensor = self.model.sample(count, temperature=temperature)
        return drawn

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of each sample in nats, in eval mode and without gradients."""
        with evaluating(self.model), evaluation_draws(0):
            found: Tensor = self.model.log_prob(x)
        return found

    def picture(self, drawn: Tensor) -> Figure:
        """Samples: images side by side, points beside the data and the flow's density."""
        from ...diagnostics.pictures import gallery
        from ...diagnostics.plane import density

        if self.data.holds_images:
            return gallery(drawn, f"{len(drawn)} samples of the flow")
        with evaluating(self.model):
            return density(self.model, self.data.test.values[:DRAWN], drawn)
