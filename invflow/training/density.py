"""Training and evaluation of flows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from .._torch import unwrapped
from ..context import Context, each_entry, entries
from ..errors import DataError
from ..models import Flow, bits_per_dimension, dequantize
from ..samples import Batch, DataSet
from ..spec.document import Spec
from ..state import TensorShape, flat_size, map_state
from .module import ModelTraining, evaluation_draws
from .tasks import CPU, DRAWN_POINTS, Evaluation, Score, Task, evaluating

if TYPE_CHECKING:  # matplotlib is imported only to draw
    from ..diagnostics.figure import Figure

DRAWN_IMAGES = 64
IN_A_ROW = 8
"""Images of a class."""
DRAWN_CLASSES = 16
"""At most; of more classes, the first."""
MOST_NAMES = 12
"""Of classes, in a message."""

NLL = Score("nll", "negative log-likelihood", " nats", digits=3, factor=1, higher_is_better=False, narrowest=0.1)
BITS = Score("bits_per_dim", "bits per dimension", " bits/dim", 3, 1, higher_is_better=False, narrowest=0.1)


class FlowTraining(ModelTraining):
    """Maximum-likelihood training of a flow.

    The loss is the negative log-likelihood in nats, or for images in bits per dimension, so that learning rates and
    clipping have the same effect for images of every size.
    """

    def measure(self, stage: str, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        log_prob = self.task.of_inputs(self.model_in(stage), batch).mean()
        bits = bits_of(self.task.model, self.task.data, log_prob)
        if bits is None:
            return -log_prob, {NLL.name: -log_prob}
        return bits, {NLL.name: -log_prob, BITS.name: bits}


@dataclass(frozen=True, repr=False)
class FlowEvaluation(Evaluation):
    """The evaluation of a trained flow on the test samples.

    Attributes:
        test_nll: the mean negative log-density, in nats; for images, that of dequantised pixels in [0, 1).
        test_bits_per_dim: for images, an upper bound of their bits per dimension, from one draw of the noise, which is
            uniform, or that of the model's dequantisation.
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

    training: ClassVar[type[ModelTraining]] = FlowTraining

    @property
    def score(self) -> Score:
        return BITS if self.data.holds_images else NLL

    def check(self, spec: Spec) -> None:
        if spec.training is not None and spec.training.label_smoothing:
            why = "label_smoothing is for classifiers: a flow learns without labels"
            raise spec.error(("training", "label_smoothing"), why)
        self.check_prior(spec)

    def check_prior(self, spec: Spec) -> None:
        """Raise SpecError if the prior or the dequantisation does not fit the data."""
        if self.model.dequantizer is not None and (self.data.levels is None or self.model.prior.discrete):
            why = "dequantization is for pixels on a grid under a density"
            raise spec.error(("dequantization",), f"{why}; {self.data.name} has none, or the prior is on the grid")
        if self.model.prior.discrete and self.data.levels is None:
            why = f"a prior on a grid is for images, and {self.data.name} has numbers off any grid; take another prior"
            raise spec.error(("prior",), why)

    def check_range(self, spec: Spec) -> None:
        levels, discrete, high = self.data.levels, self.model.prior.discrete, self.data.high
        if levels is None:
            return
        if discrete:
            high -= 1 / levels  # the last pixel, which is not dequantised
        first = self.data.train.first(1)
        some = torch.tensor([0.0, 1 / levels, high], dtype=first.values.dtype)
        constant = some.view(-1, *[1] * len(self.data.shape)).expand(-1, *self.data.shape)
        if (self.log_prob(constant, first.context) == -math.inf).any():
            if discrete:
                why = f"{self.data.name} has pixels from 0 to {high} in steps of 1/{levels}, and the prior gives them 0"
                raise spec.error(("prior",), f"{why}; fit its levels and its bounds")
            why = f"dequantised pixels of {self.data.name} lie in [0, {high}], and the model has no density at its ends"
            raise spec.error(("layers",), f"{why}; give its logit a larger alpha")

    def inputs(self, values: Tensor) -> Tensor:
        levels = self.data.levels
        return values if levels is None or self.model.prior.discrete else dequantize(values, levels)

    def centered(self, values: Tensor) -> Tensor:
        levels = self.data.levels
        return values if levels is None or self.model.prior.discrete else values + 0.5 / levels

    def rounded(self, inputs: Tensor) -> Tensor:
        levels = self.data.levels
        if levels is None or self.model.prior.discrete:
            return super().rounded(inputs)
        return (inputs * levels).floor() / levels

    def of_inputs(self, model: nn.Module, batch: Batch) -> Any:
        flow = unwrapped(model)  # compiled, it has no attributes
        dequantizer = flow.dequantizer if isinstance(flow, Flow) else None
        if dequantizer is None:
            return super().of_inputs(model, batch)
        if self.data.levels is None:
            raise DataError(
                f"dequantization is for pixels on a grid, {self.data.name} has numbers off any; pass levels"
            )
        values, log_q = dequantizer(batch.values, self.data.levels)
        made = model(values, batch.context)
        return (*made[:-1], made[-1] - log_q) if isinstance(made, tuple) else made - log_q

    def of_model(self, batch: Batch) -> Tensor:
        if self.model.dequantizer is None:  # uniform noise is drawn on the CPU, so that every device has the same
            return super().of_model(batch)
        made: Tensor = self.of_inputs(self.model, batch.to(self.device))
        return made

    @property
    def awaits_data(self) -> bool:
        dequantizer = self.model.dequantizer
        return super().awaits_data or (dequantizer is not None and dequantizer.bijection.awaits_data)

    def initialize(self, batch: Batch) -> None:
        super().initialize(batch)
        if self.model.dequantizer is not None:
            self.model.dequantizer.bijection.initialize(torch.randn_like(batch.values), batch.values)

    def evaluate(self) -> FlowEvaluation:
        log_prob = self.outputs()[0].double().mean()
        bits = bits_of(self.model, self.data, log_prob)
        scores = -float(log_prob), None if bits is None else float(bits)
        return FlowEvaluation(self.parameters(), True, self.model.caveat, self.round_trips(), *scores)

    def figures(self) -> dict[str, Figure]:
        if not self.drawable:
            return {}
        of_classes = self.rows_of_classes()
        if self.data.holds_images:
            return {"samples": self._samples() if of_classes is None else self._samples_by_class(of_classes)}
        context = self.data.test.first(DRAWN_POINTS).context
        return {"density": self.picture(self.draw(DRAWN_POINTS, context), by_class=of_classes is not None)}

    def rows_of_classes(self) -> Tensor | None:
        """The context of each class, a row; None if the context of the data is not their class."""
        some, shape = self.data.test.first(DRAWN_IMAGES), (self.data.classes,)
        if not isinstance(some.context, Tensor) or some.labels is None or some.context.shape[1:] != shape:
            return None
        rows = torch.eye(*shape).to(some.context)
        return rows if torch.equal(rows[some.labels], some.context) else None

    def _samples(self) -> Figure:
        context = self.data.test.first(DRAWN_IMAGES).context
        return self.picture(self.draw(DRAWN_IMAGES, context))

    def _samples_by_class(self, rows: Tensor) -> Figure:
        from ..diagnostics.pictures import gallery

        names = self.data.class_names[:DRAWN_CLASSES]
        drawn = self.draw(len(names) * IN_A_ROW, rows[: len(names)].repeat_interleave(IN_A_ROW, 0))
        which = "each class" if len(names) == len(rows) else f"each of the first {len(names)} of {len(rows)} classes"
        return gallery(drawn, f"{IN_A_ROW} samples of the flow for {which}", IN_A_ROW, names)

    def draw(self, count: int, context: Context = None, *, temperature: float = 1.0, seed: int = 0) -> Tensor:
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
                drawn: Tensor = self.model.inverse(there, each_entry(lambda entry: entry.to(self.device), rows))
        return drawn.cpu()

    def log_prob(self, x: Tensor, context: Context = None) -> Tensor:
        """The log-density of each sample in nats, in eval mode and without gradients."""
        with evaluating(self.model, self.device), evaluation_draws(0):
            return self.model.log_prob(x.to(self.device), in_turn(context, len(x), self.device)).cpu()

    def rows_of_context(self, texts: Sequence[str]) -> Any:
        """The rows of a context in words, for samples; of the test samples, if there are no words but a context.

        A row is a class by its number or its name, if the context is one-hot of the classes, or else its numbers,
        separated by commas. Of a context with names, each entry is written as name=row, separated by semicolons.

        Args:
            texts: one per row.

        Raises:
            DataError: the model takes no context, or a row does not fit.
        """
        shape = self.model.context_shape
        if shape is None:
            if texts:
                raise DataError("--context expects a flow that takes a context, got one that takes none")
            return None
        if not texts:
            found = self.data.test.first(DRAWN_POINTS).context
            if found is None:
                raise DataError("the flow takes a context, and there are no data that have one: pass --context")
            return found
        if not isinstance(shape, Mapping):
            return torch.stack([self._row("--context", text, shape) for text in texts])
        rows: dict[str, list[Tensor]] = {name: [] for name in shape}
        for text in texts:
            pairs = [word.strip().partition("=")[::2] for word in text.split(";") if word.strip()]
            words = dict(pairs)
            if words.keys() != shape.keys() or len(pairs) > len(words):
                expected = "; ".join(f"{name}=..." for name in shape)
                raise DataError(f"--context expects '{expected}', got {text!r}")
            for name, word in words.items():
                rows[name].append(self._row(f"--context {name}=", word, shape[name]))
        return {name: torch.stack(several) for name, several in rows.items()}

    def _row(self, who: str, text: str, shape: TensorShape) -> Tensor:
        """A row of a context, or of an entry of it, in words."""
        names, of_classes = self.data.class_names, shape == (self.data.classes,)
        if of_classes and (text in names or (text.isdecimal() and int(text) < len(names))):
            place = names.index(text) if text in names else int(text)
            return torch.eye(len(names))[place]
        try:
            return torch.tensor([float(word) for word in text.split(",")]).reshape(shape)
        except (ValueError, RuntimeError):
            classes = f"a class ({', '.join(names[:MOST_NAMES])}) or " if of_classes else ""
            numbers = f"{classes}{flat_size(shape)} numbers with commas"
            raise DataError(f"{who} expects {numbers}, got {text!r}") from None

    def picture(self, drawn: Tensor, context: Context = None, *, by_class: bool = False) -> Figure:
        """Samples: images side by side, or points next to the data and the flow's density.

        Args:
            drawn: the samples.
            context: that the samples have, if it is not that of the test samples: the test samples that have it too,
                if there are some, are shown.
            by_class: whether to draw points of each class too; then the samples have the context of the test samples.
        """
        from ..diagnostics.pictures import gallery
        from ..diagnostics.plane import density

        if self.data.holds_images:
            return gallery(drawn, f"{len(drawn)} samples of the flow")
        if self.data.shape != (2,):
            raise DataError(f"a picture shows images or points of the plane, got samples of shape {self.data.shape}")
        some = self.data.test.first(DRAWN_POINTS)
        points_are = "test points"
        if not len(some.values):
            some, points_are = Batch(drawn), "samples"
        if context is not None and some.context is not None:
            pairs = zip(entries(some.context), entries(context), strict=True)
            alike = [(here[:, None] == there).flatten(2).all(2) for here, there in pairs]
            chosen = torch.stack(alike).all(0).any(1)
            some = some.rows(chosen) if bool(chosen.any()) else some
        with evaluating(self.model):
            given = some.context if context is None else context
            parts = self._by_class(some, drawn) if by_class else []
            return density(self.model, some.values, drawn, given, parts, points_are=points_are)

    def _by_class(self, some: Batch, drawn: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor]]:
        """The samples of the data and of the flow for each of the first classes, by its name, and its context."""
        assert some.context is not None
        classes = some.context.argmax(1)
        of_drawn = classes[torch.arange(len(drawn)) % len(classes)]
        rows = torch.eye(self.data.classes).to(some.context)
        names = enumerate(self.data.class_names[:DRAWN_CLASSES])
        return [(f"class {name}", some.values[classes == k], drawn[of_drawn == k], rows[[k]]) for k, name in names]


def bits_of(flow: Flow, data: DataSet, log_prob: Tensor) -> Tensor | None:
    """Bits per dimension of images, of which a discrete prior gives the probability, and any other the density."""
    if data.levels is None:
        return None
    return bits_per_dimension(log_prob, flat_size(data.shape), 1 if flow.prior.discrete else data.levels)


def in_turn(context: Context, count: int, device: torch.device = CPU) -> Any:
    """The rows of a context, one for each of ``count`` samples, from the first again after the last."""
    return each_entry(lambda entry: entry[torch.arange(count) % len(entry)].to(device), context)
