"""Walks between the test images of a task, drawn and measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..diagnostics.interpolation import interpolate
from ..diagnostics.walks import Judge, Walks, measure, random_pairs
from ..errors import DataError, InvflowError
from ..state import flat_size
from .analysing import drawn
from .tasks import Task, evaluating

PAIRS = 200
SEED = 2026
"""Of the pairs, by which no recipe was chosen."""
MOST_LEARNED = 10_000
MOST_TESTED = 2000
MOST_NUMBERS = 2**21
"""In the images from which the judge learns, and in those that run through the model at once: of larger ones fewer."""


def require_walks(task: Task[Any]) -> None:
    """Raise an error if there are no walks between the test images of a task.

    Raises:
        InvflowError: the model is not invertible.
        DataError: the data set holds no images.
    """
    if task.model.caveat:
        raise InvflowError(f"interpolate expects an invertible model, got this: {task.model.caveat}")
    if not task.data.holds_images:
        raise DataError(f"interpolate expects images, the data set holds points of shape {task.data.shape}")


def walk(task: Task[Any], pairs: Tensor, steps: int) -> Tensor:
    """The images on straight lines in feature space, run backwards, rounded to the levels of the data.

    Args:
        task: whose model is invertible, and whose data are images.
        pairs: positions of test images, ``(n, 2)``.
        steps: the number of images of each walk, both ends included.

    Returns:
        ``(n, steps, channels, height, width)``, on the CPU.
    """
    frames = []
    with evaluating(task.model, task.device):
        for some in torch.split(pairs, max(1, MOST_NUMBERS // (steps * flat_size(task.data.shape)))):
            first, last = (task.data.test.take(some[:, end]).to(task.device) for end in (0, 1))
            contexts = (task.model.for_layers(one.context) for one in (first, last))
            x0, x1 = (task.centered(one.values) for one in (first, last))
            frames.append(task.rounded(interpolate(task.model.bijection, x0, x1, steps, *contexts).cpu()))
    return torch.cat(frames)


def measure_walks(task: Task[Any], count: int = PAIRS, seed: int = SEED) -> Walks:
    """What the images half-way between test images of different classes look like, to a judge of their own.

    The judge learns the training images of the task's data, at most 10,000 of them and fewer of large ones, and nothing
    of the model.

    Args:
        task: the model and its data.
        count: the number of pairs.
        seed: draws the pairs.

    Raises:
        InvflowError: the model is not invertible.
        DataError: the data are no images, or have no labels, or no two test images are of different classes.
    """
    require_walks(task)
    affordable = max(1, MOST_NUMBERS // flat_size(task.data.shape))
    learned, tested = (
        drawn(samples, min(most, affordable), seed=0).all()
        for samples, most in ((task.data.train, MOST_LEARNED), (task.data.test, MOST_TESTED))
    )
    labels = task.data.test.labels
    if labels is None or learned.labels is None or tested.labels is None or len(set(learned.labels.tolist())) < 2:
        raise DataError(f"walks are measured between classes, {task.data.name} names no two for training and test")
    pairs = random_pairs(labels, count, seed)
    ends = task.data.test.take(pairs[:, 0]).values, task.data.test.take(pairs[:, 1]).values
    judge = Judge(learned.values, learned.labels)
    return measure(judge, walk(task, pairs, 3)[:, 1], ends, labels[pairs], tested.values, tested.labels)
