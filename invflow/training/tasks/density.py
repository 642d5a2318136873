"""Flows: maximum likelihood, in nats, and for images in bits per dimension."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torchmetrics import Metric

from ...models import Flow, bits_per_dimension, dequantize
from ...spec.document import Spec
from ...state import flat_size, map_state
from ..module import ModelTraining, evaluation_draws
from .base import Evaluation, Score, Task, evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ...diagnostics.pictures import Curve

NLL = Score("nll", "negative log-likelihood", " nats", digits=3, factor=1, higher_is_better=False, narrowest=0.1)
BITS = Score("bits_per_dim", "bits per dimension", " bits/dim", 3, 1, higher_is_better=False, narrowest=0.1)
DRAWN = 2000  # samples next to a density of points
SHOWN = 64  # images


class FlowTraining(ModelTraining):
    """Maximum-likelihood training of a flow.

    The loss is the negative log-likelihood in nats, or for images in bits per dimension, so that learning rates and
    clipping have the same effect for images of every size.
    """

    def measure(self, stage: str, values: Tensor, labels: Tensor) -> tuple[Tensor, Mapping[str, Tensor | Metric]]:
        log_prob, data = self.model(self.task.inputs(values)).mean(), self.task.data
        if data.levels is None:
            return -log_prob, {NLL.name: -log_prob}
        bits = bits_per_dimension(log_prob, flat_size(data.shape), data.levels)
        return bits, {NLL.name: -log_prob, BITS.name: bits}


@dataclass(frozen=True)
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
    def score(self) -> Score:  # type: ignore[override]
        return BITS if self.data.holds_images else NLL

    def check(self, spec: Spec) -> None:
        if spec.training is not None and spec.training.label_smoothing:
            why = "label_smoothing is for classifiers: a flow learns without labels"
            raise spec.error(("training", "label_smoothing"), why)

    def inputs(self, values: Tensor) -> Tensor:
        return values if self.data.levels is None else dequantize(values, self.data.levels)

    def evaluate(self) -> FlowEvaluation:
        nll = -self.outputs().double().mean()
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
        name, count = ("samples", SHOWN) if self.data.holds_images else ("density", DRAWN)
        return {name: self.picture(self.draw(count))}

    def draw(self, count: int, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
        """Samples of the flow in eval mode, determined by the seed, up to rounding on every device."""
        with evaluation_draws(seed):
            with evaluating(self.model):  # on the CPU, because each device has its own random numbers
                latent = self.model.prior.sample(count, temperature)
            with evaluating(self.model, self.device):
                latent = map_state(lambda leaf: leaf.to(self.device), latent)
                drawn: Tensor = self.model.inverse(self.model.bijection.numerics.nearest(latent))
        return drawn.cpu()

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-density of each sample in nats, in eval mode and without gradients."""
        with evaluating(self.model, self.device), evaluation_draws(0):
            found: Tensor = self.model.log_prob(x.to(self.device))
        return found.cpu()

    def picture(self, drawn: Tensor) -> Figure:
        """Samples: images side by side, or points next to the data and the flow's density."""
        from ...diagnostics.pictures import gallery
        from ...diagnostics.plane import density

        if self.data.holds_images:
            return gallery(drawn, f"{len(drawn)} samples of the flow")
        with evaluating(self.model):
            return density(self.model, self.data.test.values[:DRAWN], drawn)
