"""The training options of a spec: data, augmentation, optimiser, schedule."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from ..options import Options
from .shapes import ENTRY, MOST_ENTRIES

Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Momentum: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
Size: TypeAlias = PositiveInt | Annotated[float, Field(gt=0, lt=1)]
Names: TypeAlias = str | Annotated[tuple[str, ...], Field(min_length=1)]
Entries: TypeAlias = Annotated[
    dict[Annotated[str, Field(pattern=ENTRY)], Names], Field(min_length=1, max_length=MOST_ENTRIES)
]
Scale: TypeAlias = Annotated[float, Field(ge=0.01, le=100)]


def _in_order(scales: tuple[float, float]) -> tuple[float, float]:
    if scales[0] > scales[1]:
        raise ValueError("the smaller scale comes first")
    return scales


ScaleRange: TypeAlias = Annotated[tuple[Scale, Scale], AfterValidator(_in_order)]


class RandomAffine(Options):
    """Random rotation, shift, scale and shear of every training image."""

    degrees: NonNegativeFloat = Field(default=0.0, le=180, description="largest rotation either way, in degrees")
    translate: Fraction = Field(default=0.0, description="largest shift, as a fraction of height and width")
    scale: ScaleRange = Field(default=(1.0, 1.0), description="smallest and largest scale")
    shear: NonNegativeFloat = Field(default=0.0, lt=90, description="largest shear either way, in degrees")


class Elastic(Options):
    """Random smooth deformation of every training image."""

    alpha: NonNegativeFloat = Field(default=30.0, le=1e4, description="strength of the displacements")
    sigma: PositiveFloat = Field(default=5.0, le=100, description="smoothness of the displacements, in pixels")


class Stroke(Options):
    """Random thickness of the strokes: some images are blurred, then sharpened about a random grey."""

    probability: Fraction = Field(default=0.5, description="the fraction of the images that are changed")
    shift: Fraction = Field(default=0.3, le=0.5, description="largest distance of that grey from 1/2, either way")
    contrast: PositiveFloat = Field(default=2.0, le=1e3, description="steepness of the edges")


class Augmentation(Options):
    """Random changes of each training image, drawn anew each time it is used."""

    affine: RandomAffine | None = Field(default=None, description="random affine map")
    elastic: Elastic | None = Field(default=None, description="random smooth deformation")
    stroke: Stroke | None = Field(default=None, description="random thickness of the strokes")


class Data(Options):
    """The data set: where it comes from, and which parts of it are used for what.

    It also holds the fields of the source that its name stands for, such as the path of a file.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(default="digits", description="where the samples come from: digits ships with scikit-learn")
    train_size: Size | None = Field(default=None, description="the first n training samples, or a fraction; null: all")
    test_size: Size | None = Field(
        default=None, description="likewise of the test samples; if the data have none, these are drawn (null: 0.2)"
    )
    validation_size: Size | None = Field(
        default=None, description="drawn from the training samples, to choose the best weights; null: none"
    )
    split_seed: NonNegativeInt = Field(default=0, description="seed of the samples that are drawn")
    context: Names | Entries | None = Field(
        default=None,
        description='"labels", one-hot, or what else the data have, such as columns; or one of these for each entry',
    )
    augmentation: Augmentation | None = Field(default=None, description="random changes of the training images")

    @property
    def of_source(self) -> dict[str, Any]:
        """The fields that the source has of its own."""
        return {name: value for name, value in (self.model_extra or {}).items() if name != "note"}


class SGD(Options):
    """Stochastic gradient descent."""

    type: Literal["sgd"]
    lr: PositiveFloat = Field(description="learning rate; the peak one under a schedule")
    momentum: Momentum = Field(default=0.0, description="momentum")
    nesterov: bool = Field(default=False, description="Nesterov momentum")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="L2 penalty")


class Adam(Options):
    """Adam."""

    type: Literal["adam"]
    lr: PositiveFloat = Field(default=1e-3, description="learning rate; the peak one under a schedule")
    betas: tuple[Momentum, Momentum] = Field(default=(0.9, 0.999), description="decay of the running moments")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="L2 penalty")


class AdamW(Options):
    """Adam with decoupled weight decay."""

    type: Literal["adamw"]
    lr: PositiveFloat = Field(default=1e-3, description="learning rate; the peak one under a schedule")
    betas: tuple[Momentum, Momentum] = Field(default=(0.9, 0.999), description="decay of the running moments")
    weight_decay: NonNegativeFloat = Field(default=0.01, description="decoupled weight decay")


class Adamax(Options):
    """Adam with the largest of the recent gradients in place of the root of their mean square."""

    type: Literal["adamax"]
    lr: PositiveFloat = Field(default=2e-3, description="learning rate; the peak one under a schedule")
    betas: tuple[Momentum, Momentum] = Field(default=(0.9, 0.999), description="decay of the running moments")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="L2 penalty")


class RMSprop(Options):
    """Gradients divided by the root of their running mean square."""

    type: Literal["rmsprop"]
    lr: PositiveFloat = Field(default=1e-2, description="learning rate; the peak one under a schedule")
    alpha: Momentum = Field(default=0.99, description="decay of the running mean square")
    momentum: Momentum = Field(default=0.0, description="momentum")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="L2 penalty")


class OneCycle(Options):
    """The learning rate rises to its peak and falls again, step by step."""

    type: Literal["one_cycle"]
    warmup: Fraction = Field(default=0.3, gt=0, lt=1, description="the fraction of the steps in which it rises")
    start_factor: PositiveFloat = Field(default=25.0, ge=1, description="the peak divided by the first learning rate")
    final_factor: PositiveFloat = Field(default=1e4, ge=1, description="the first divided by the last learning rate")


class Cosine(Options):
    """The learning rate falls along half a cosine, step by step."""

    type: Literal["cosine"]
    final_lr: NonNegativeFloat = Field(default=0.0, description="the learning rate at the end")


def _increasing(milestones: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
        raise ValueError("milestones are expected in increasing order")
    return milestones


Milestones: TypeAlias = Annotated[tuple[PositiveInt, ...], Field(min_length=1), AfterValidator(_increasing)]


class MultiStep(Options):
    """The learning rate is multiplied by a factor at each of some milestones."""

    type: Literal["multi_step"]
    milestones: Milestones = Field(description="after how many epochs, or steps if the run is as long as these say")
    factor: PositiveFloat = Field(default=0.1, lt=1, description="the factor")


class Plateau(Options):
    """The learning rate is multiplied by a factor when the score of the validation samples improves no longer.

    Without a validation part, the training loss is watched; the test samples never are.
    """

    type: Literal["plateau"]
    factor: PositiveFloat = Field(default=0.1, lt=1, description="the factor")
    patience: NonNegativeInt = Field(default=10, description="evaluations in a row that may pass without improvement")
    threshold: NonNegativeFloat = Field(default=1e-4, description="the least improvement that counts")
    final_lr: NonNegativeFloat = Field(default=0.0, description="the smallest learning rate")


class Midpoints(Options):
    """What draws the point half-way between the features of samples of two classes, run backwards, towards these."""

    weight: PositiveFloat = Field(default=0.05, description="the weight in the loss")
    width: PositiveFloat = Field(default=0.3, description="the standard deviation of the kernel around each sample")
    pairs: PositiveInt = Field(default=32, description="the largest number of pairs in a step")
    start: Fraction = Field(default=0.15, lt=1, description="the fraction of the steps after which it begins")


class Average(Options):
    """Exponential moving averages of the weights, which change less from step to step than these do."""

    decay: Fraction = Field(default=0.999, gt=0, lt=1, description="the share of the average that a step keeps")


class EarlyStopping(Options):
    """The training ends when the score of the validation samples improves no longer.

    Without a validation part, the training loss is watched; the test samples never are.
    """

    patience: NonNegativeInt = Field(default=10, description="evaluations in a row that may pass without improvement")
    threshold: NonNegativeFloat = Field(default=0.0, description="the least improvement that counts")


class Hardware(Options):
    """Where a model is trained: a run that was interrupted may go on elsewhere."""

    accelerator: str = Field(default="auto", max_length=20, description="auto, cpu, cuda, cuda:1 or mps")
    devices: PositiveInt = Field(default=1, description="processes on each machine, each with a device of its own")
    nodes: PositiveInt = Field(default=1, description="machines, whose launcher starts the processes")
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="what several processes share: ddp, the work; fsdp, the weights too, sharded layer by layer",
    )


Optimizer: TypeAlias = Annotated[SGD | Adam | AdamW | Adamax | RMSprop, Field(discriminator="type")]
Schedule: TypeAlias = Annotated[OneCycle | Cosine | MultiStep | Plateau, Field(discriminator="type")]


EPOCHS = 40
"""Of a run whose length a spec does not say."""


class Training(Options):
    """How a model is trained."""

    data: Data = Field(default=Data(), description="the data set")
    batch_size: PositiveInt = Field(default=64, description="samples per step, of all devices together")
    steps: PositiveInt | None = Field(default=None, description="steps of the optimiser, in place of epochs")
    epochs: PositiveInt | None = Field(
        default_factory=lambda known: EPOCHS if known.get("steps") is None else None,
        json_schema_extra={"default": EPOCHS},
        description="passes over the training samples; null: steps count",
    )
    optimizer: Optimizer = Field(default=Adam(type="adam"), description="the optimiser")
    schedule: Schedule | None = Field(default=None, description="how the learning rate changes; null: it is constant")
    warmup: Size | None = Field(
        default=None,
        description="steps, or the fraction of the run, in which the learning rate rises linearly before its schedule",
    )
    clip_gradient: PositiveFloat | None = Field(default=None, description="largest norm of the gradients; null: any")
    average: Average | None = Field(
        default=None, description="evaluate and save moving averages of the weights; null: the weights themselves"
    )
    density_weight: PositiveFloat = Field(
        default=1.0,
        description="of a model with a head and a prior: the weight of its negative log-density per dimension, in nats",
    )
    midpoints: Midpoints | None = Field(
        default=None, description="draw points half-way between two classes towards their images; null: do not"
    )
    accumulate: PositiveInt = Field(
        default=1, description="parts in which a batch is taken, one after another, to make one step with less memory"
    )
    precision: Literal[32, 64, "bf16-mixed"] | None = Field(
        default=None,
        description="of weights and computation, or of products alone (bf16-mixed); null: that of the weights",
    )
    compile: bool = Field(default=False, description="compile the model: slow to begin, then faster")
    deterministic: bool = Field(
        default=False, description="use deterministic algorithms alone, also on CUDA, where they are slower"
    )
    early_stopping: EarlyStopping | None = Field(
        default=None, description="end when the score no longer improves; null: after all epochs or steps"
    )
    find_lr: bool = Field(default=False, description="choose the learning rate by a short trial before the training")
    profile: Literal["simple", "advanced", "pytorch"] | None = Field(
        default=None, description="measure where the time goes, and write it to the run's logs; null: do not"
    )
    hardware: Hardware = Field(default=Hardware(), description="where the model is trained")
    label_smoothing: Fraction = Field(default=0.0, lt=1, description="probability spread over the other classes")
    evaluate_every: PositiveInt = Field(default=1, description="epochs between two evaluations on the test samples")
    draw_every: PositiveInt | None = Field(
        default=None, description="epochs between two sets of pictures of the model, such as samples; null: none"
    )
    seed: int = Field(default=0, ge=0, description="seed of weights, order and all random draws")

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, epochs: int | None, info: ValidationInfo) -> int | None:
        if "steps" in info.data and (epochs is None) == (info.data["steps"] is None):
            raise ValueError("expected either epochs or steps")
        return epochs

    @field_validator("warmup")
    @classmethod
    def _one_warmup(cls, warmup: int | float | None, info: ValidationInfo) -> int | float | None:
        if warmup is not None and isinstance(info.data.get("schedule"), OneCycle):
            raise ValueError("one_cycle has a warm-up of its own, in the schedule: leave this one out")
        return warmup

    def warmup_steps(self, steps: int | None) -> int:
        """The number of steps in which the learning rate rises, in a run of so many; None: of a length not known."""
        if self.warmup is None or isinstance(self.warmup, int):
            return self.warmup or 0
        assert steps is not None  # `unfit` has asked
        return max(1, round(self.warmup * steps))

    def planned_steps(self, batches: int | None) -> int | None:
        """The number of steps of the run if an epoch has so many batches; None if nobody knows it."""
        if self.epochs is None or batches is None:
            return self.steps
        return self.epochs * batches

    def planned_epochs(self, batches: int | None) -> int:
        """The number of epochs of the run, the last of which may be cut short; if nobody knows it, at most."""
        if self.epochs is not None:
            return self.epochs
        assert self.steps is not None  # or there were epochs
        return math.ceil(self.steps / (batches or 1))

    def unfit(self, steps: int | None, batches: int | None = None) -> tuple[str, str] | None:
        """The entry that does not fit the length of the run, and what is wrong; None if all do.

        Args:
            steps: the number of steps; None if nobody knows it.
            batches: the number of steps of an epoch, likewise.
        """
        if isinstance(self.schedule, Plateau) and batches is not None and steps is not None and steps <= batches:
            why = f"a plateau acts after the end of an epoch, which has {batches} steps, and the run has only {steps}"
            return "schedule", why
        if steps is None:
            scheduled, fraction = isinstance(self.schedule, OneCycle | Cosine), isinstance(self.warmup, float)
            why = "the data do not say how many batches an epoch has; give the length of the run in steps, not epochs"
            return ("schedule" if scheduled else "warmup", why) if scheduled or fraction else None
        rising = self.warmup_steps(steps)
        if rising < steps:
            return None
        return "warmup", f"{rising} steps of warm-up in a run of {steps}; take fewer, or a fraction such as 0.1"
