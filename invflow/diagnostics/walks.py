"""Walks between images: whether the image half-way between two of them looks like one of the data."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

NETS = 5
HIDDEN = 128
PASSES = 1000
LEARNING: dict[str, Any] = {"alpha": 0.01, "learning_rate_init": 0.01}
"""Chosen by the judge's accuracy on digits, and by its time."""


@dataclass(frozen=True)
class Walks:
    """What the images half-way between pairs of images of different classes look like.

    All but ``pairs`` and ``distance`` are fractions from 0 to 1; `gap_closed` may leave that range.

    Attributes:
        pairs: the number of pairs.
        out_of_range: of the pixels outside [0, 1].
        distance: the mean of ``|image - cross-fade|`` over all pixels; the cross-fade is the mean of the ends.
        judge_accuracy: of the judge, on test images.
        named: of the images of which the judge names one of the two ends.
        gap_closed: how far the judge's mean largest probability is from that of the cross-fades, on the way to that of
            test images; NaN if the judge is as sure of the cross-fades as of test images.
    """

    pairs: int
    out_of_range: float
    distance: float
    judge_accuracy: float
    named: float
    gap_closed: float

    def lines(self) -> list[str]:
        """The figures in words, in at most 80 columns."""
        of_judge = 100 * self.judge_accuracy
        gap = "none to close" if math.isnan(self.gap_closed) else f"{100 * self.gap_closed:.0f} % closed"
        return [
            f"half-way between {self.pairs} pairs of test images of different classes:",
            f"  pixels outside [0, 1]: {100 * self.out_of_range:.1f} %",
            f"  mean distance from the pixel cross-fade: {self.distance:.3f}",
            f"  one of the two ends is named by the judge: {100 * self.named:.1f} %",
            f"  gap between cross-fades and test images in the judge's certainty: {gap}",
            f"  the judge, {NETS} networks on pixels, is right about {of_judge:.1f} % of the test images",
        ]


class Judge:
    """Some networks that learned images, and name others by the mean of their probabilities.

    Args:
        images: ``(n, channels, height, width)``.
        labels: ``(n,)``, of at least two classes.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPClassifier

        nets = [MLPClassifier((HIDDEN,), max_iter=PASSES, random_state=seed, **LEARNING) for seed in range(NETS)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # how good it is, its accuracy says
            self._nets = [net.fit(images.flatten(1).numpy(), labels.numpy()) for net in nets]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest class of each image, and its probability: both ``(n,)``."""
        found = [torch.from_numpy(net.predict_proba(images.flatten(1).numpy())) for net in self._nets]
        probability, place = torch.stack(found).mean(0).max(1)
        return torch.from_numpy(self._nets[0].classes_)[place], probability


def outside(images: Tensor) -> float:
    """The fraction of the numbers that lie outside [0, 1], NaN among them.

    Differences of less than half of the 256 grey levels of a picture do not count, because nobody can see them.

    Examples:
        >>> outside(torch.tensor([-0.5, -0.001, 0.5, 1.001, 1.5]))
        0.4
    """
    off = ((images - images.clamp(0, 1)).abs() > 0.5 / 255) | images.isnan()
    return float(off.double().mean()) if images.numel() else 0.0


def clipped_pixels(fraction: float) -> str:
    """What a reader of a picture is told about the pixels that it cannot show.

    Examples:
        >>> clipped_pixels(0.7215)
        '72 % of the pixels lie outside [0, 1] and are drawn clipped'
        >>> clipped_pixels(0.0001)
        'less than 0.1 % of the pixels lie outside [0, 1] and are drawn clipped'
    """
    percent = 100 * fraction
    share = "less than 0.1" if percent < 0.1 else f"{percent:.0f}" if percent >= 10 else f"{percent:.1f}"
    return f"{share} % of the pixels lie outside [0, 1] and are drawn clipped"


def random_pairs(labels: Tensor, count: int, seed: int) -> Tensor:
    """The positions of pairs of samples of different classes, ``(count, 2)``; none if all are of one class.

    The first of a pair is drawn from all samples, and the second from those of other classes.

    Examples:
        >>> random_pairs(torch.tensor([0, 0, 0, 1]), 2, seed=0)[:, 0].tolist()
        [0, 3]
        >>> random_pairs(torch.tensor([1, 1]), 2, seed=0).shape
        torch.Size([0, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for first in torch.randint(len(labels), (count,), generator=generator).tolist():
        others = (labels != labels[first]).nonzero()[:, 0]
        if len(others):
            pairs.append((first, int(others[torch.randint(len(others), (), generator=generator)])))
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)


def measure(
    judge: Judge, half_way: Tensor, ends: tuple[Tensor, Tensor], labels: Tensor, real: Tensor, of_real: Tensor
) -> Walks:
    """What images half-way between others look like.

    Args:
        judge: knows the classes.
        half_way: ``(pairs, channels, height, width)``.
        ends: two such batches, from 0 to 1.
        labels: the classes of the ends, ``(pairs, 2)``.
        real: test images, ``(n, channels, height, width)``.
        of_real: their classes, ``(n,)``.

    Raises:
        DataError: there are no pairs, or images half-way are not finite.
    """
    if not len(half_way):
        raise DataError("walks are measured between images of different classes, got no pair of such")
    broken = int((~half_way.flatten(1).isfinite().all(1)).sum())
    if broken:
        raise DataError(f"{broken} of {len(half_way)} images half-way are not finite: the inverse overflows there")
    fades = (ends[0] + ends[1]) / 2
    named, sure = judge(half_way.clamp(0, 1))
    known, sure_of_real = judge(real)
    of_fades = float(judge(fades)[1].mean())
    gap = float(sure_of_real.mean()) - of_fades
    return Walks(
        pairs=len(half_way),
        out_of_range=outside(half_way),
        distance=float((half_way - fades).abs().mean()),
        judge_accuracy=float((known == of_real).double().mean()),
        named=float((named[:, None] == labels).any(1).double().mean()),
        gap_closed=(float(sure.mean()) - of_fades) / gap if gap > 0 else math.nan,
    )
