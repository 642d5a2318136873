"""The monitor: it keeps some numbers of each state in forward, and compares the reconstruction in backward."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from .._torch import BatchOrInstanceNorm
from ..errors import ReconstructionError, ReconstructionWarning
from ..state import State, leaves
from ..wires import Step

Monitor: TypeAlias = Literal["off", "warn", "raise", "anchor"]
MONITORS = ("off", "warn", "raise", "anchor")

SAMPLES = 64
"""How many numbers of a channel are kept. A channel with four fifths of zeros, as in pictures of digits, looks constant
in a sample of this size once in a million."""
CHANNELS = 64
"""The most channels that numbers are kept of, evenly spaced: at most 16 KiB a tensor in float32."""
LEAST = 8
"""Fewer numbers in a channel, as in a small batch of vectors, tell nothing about its spread; the spread of the whole
tensor is used instead."""
GOLDEN, PLASTIC = 0.6180339887498949, 0.7548776662466927
"""Their multiples, modulo 1, are spread evenly, however many there are: no stride coincides with a row."""
DIGITS_TO_KEEP = 2 / 3
"""The part of a dtype's digits that a reconstruction must keep: 4.6 of float32's 7 (2.4e-5), 10.4 of float64's 16
(3.7e-11). A chain of a hundred well-conditioned couplings keeps more (2e-6 in float32); one that keeps less has
gradients with about the same error, which will grow."""


@functools.cache
def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error of a reconstruction in a dtype that the monitor accepts."""
    return float(torch.finfo(dtype).eps ** DIGITS_TO_KEEP)


class Reconstruction:
    """What a chain's monitor found, for a user or a log; only the anchors affect what training keeps.

    Attributes:
        errors: by layer, the relative error of its input as the last backward reconstructed it.
        anchors: the layers whose inputs are kept from now on. A user may add names and remove them.
        reported: the layers that there was a warning about.
    """

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.anchors: set[str] = set()
        self.reported: set[str] = set()

    def reset(self) -> None:
        """Forgets all of it, the anchors too."""
        self.__init__()  # type: ignore[misc]

    def __repr__(self) -> str:
        worst = max(self.errors.values(), default=0.0)
        return f"Reconstruction({len(self.errors)} layers, worst error {worst:.1e}, anchors {sorted(self.anchors)})"


Pair: TypeAlias = tuple[int, Tensor, Tensor]
"""The position of a step in its segment, numbers of a tensor that it was given, ``(channels, numbers)``, and the same
numbers of the reconstruction."""


class Fingerprint:
    """Some numbers of the states that the steps of a segment were given, to be compared with their reconstructions.

    A tensor that a step returns unchanged, as a coupling does with one half, is left to the next step.

    Args:
        record: where errors are noted.
        mode: what to do about an error that is too large.
    """

    def __init__(self, record: Reconstruction, mode: Monitor) -> None:
        self._record = record
        self._mode = mode
        self._kept: dict[int, list[tuple[int, Tensor]]] = {}

    def keep(self, position: int, before: list[Tensor], after: list[Tensor]) -> None:
        """In forward: some numbers of what went into a step and did not come out of it."""
        unchanged = {id(leaf) for leaf in after}
        kept = []
        for which, leaf in enumerate(before):
            # Tensor subclasses, such as fake tensors, may hold no numbers.
            plain = type(leaf) is Tensor and leaf.is_floating_point() and not leaf.is_meta
            if plain and id(leaf) not in unchanged and leaf.numel():
                kept.append((which, leaf.take(_places(leaf.shape, leaf.device))))
        self._kept[position] = kept

    def compare(self, position: int, state: State) -> list[Pair]:
        """In backward: the kept numbers of a step, the last tensor first, with those of the reconstruction."""
        pairs, tensors = [], list(leaves(state))
        for which, before in reversed(self._kept[position]):
            leaf = tensors[which]
            pairs.append((position, before, leaf.take(_places(leaf.shape, leaf.device))))
        return pairs

    def judge(self, steps: Sequence[Step], pairs: Sequence[Pair], output: State, autocast: torch.dtype | None) -> None:
        """Notes the errors of a segment, and reports the first one on the way back that is too large.

        Args:
            steps: those of the segment.
            pairs: all that was compared.
            output: of the segment.
            autocast: what autocast computed in; None if it was off.

        Raises:
            ReconstructionError: in mode "raise".
        """
        dtypes = {leaf.dtype for leaf in leaves(output)} | ({autocast} if autocast else set())
        allowed = max((tolerance(dtype) for dtype in dtypes if dtype.is_floating_point), default=0.0)
        errors = errors_of(pairs, steps, allowed)
        record = self._record
        record.errors.update({steps[position].name: error for position, error in errors.items()})
        lost = [position for position, error in errors.items() if not error <= allowed]
        if not lost:
            return
        infinite = any(errors[position] == torch.inf for position in lost)
        if infinite and not all(bool(leaf.isfinite().all()) for leaf in leaves(output)):
            return  # infinity cannot be inverted, and the loss shows it as well
        step, error = steps[max(lost)], errors[max(lost)]
        found = f"{step}: its input came back with a relative error of {error:.1e} ({allowed:.1e} is allowed)"
        if error == torch.inf:
            found = f"{step}: a channel of its input was constant in this batch and came back with noise"
        remedy = 'keep what is lost with monitor="anchor", or use backprop="checkpoint"'
        if self._mode == "raise":
            raise ReconstructionError(f"{found}, so the gradients below it are wrong; {remedy}")
        if self._mode == "anchor":
            record.anchors.add(step.name)
            remedy = "from now on this input is kept"
        if step.name not in record.reported:
            record.reported.add(step.name)
            # Python's own filter of repeated warnings compares texts, and this one has a number in it.
            message = f"{found}, so the gradients below it are wrong; {remedy}"
            warnings.warn(message, ReconstructionWarning, stacklevel=2)


@torch.no_grad()
def errors_of(pairs: Iterable[Pair], steps: Sequence[Step], allowed: float) -> dict[int, float]:
    """The error by position, as `error_of` measures it; tensors of one shape are compared at once."""
    alike: dict[tuple[torch.Size, torch.dtype], list[Pair]] = {}
    for pair in pairs:
        alike.setdefault((pair[1].shape, pair[1].dtype), []).append(pair)
    worst: dict[int, float] = {}
    for group in alike.values():
        before, after = torch.stack([pair[1] for pair in group]), torch.stack([pair[2] for pair in group])
        for (position, kept, found), error in zip(group, relative_errors(before, after).tolist(), strict=True):
            if not error <= allowed:
                error = error_of(steps[position], kept, found, allowed)  # noqa: PLW2901 -- the same error, judged
            worst[position] = max(worst.get(position, 0.0), error)
    return worst


def error_of(step: Step, before: Tensor, after: Tensor, allowed: float) -> float:
    """How far the input of a step is off, ``(channels, numbers)``.

    The error is in units of each channel's spread, as in `relative_errors`. If that is too large, but nothing in the
    layer divides by a spread or has a kink at the channel's only value, it is in units of max(1, the largest
    magnitude), like that of every round trip: a feature that is the same in all samples may come back with a rounding
    error, which spoils no gradient.
    """
    error = float(relative_errors(before, after))
    if error <= allowed or any(map(_divides_by_spread, step.layer.modules())) or _begins_with_a_kink(step.layer):
        return error
    return float(relative_errors(before, after, by_spread=False))


def _divides_by_spread(part: nn.Module) -> bool:
    """Whether a module normalises by statistics of its input."""
    if isinstance(part, BatchOrInstanceNorm):  # in eval mode by the running statistics, if there are any
        return part.training or part.running_mean is None
    return isinstance(part, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm | nn.LocalResponseNorm)


def _begins_with_a_kink(layer: nn.Module) -> bool:
    """Whether a layer begins with a ReLU or a similar function, whose slope at zero is decided by noise."""
    first = next(part for part in layer.modules() if next(part.children(), None) is None)
    return isinstance(first, nn.ReLU | nn.ReLU6 | nn.LeakyReLU | nn.PReLU | nn.RReLU)


def relative_errors(before: Tensor, after: Tensor, *, by_spread: bool = True) -> Tensor:
    """The relative error: the largest difference in a channel over the channel's spread; the worst channel's.

    It is taken by channel, because a batch norm divides by each channel's deviation and a ReLU has its kink in each: if
    a channel was constant, they see nothing but the noise that comes back, however small, and the error is infinite.
    Numbers that were infinite or NaN before are no error of the reconstruction.

    Args:
        before: ``(..., channels, numbers)``.
        after: the same, reconstructed.
        by_spread: in units of each channel's spread; else of max(1, the largest magnitude).

    Examples:
        >>> x = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
        >>> relative_errors(x, x + torch.tensor([[0.0, 0.75, 0.0], [0.0, 0.0, 0.0]])).item()  # 0.75 of 3
        0.25
    """
    if before.dtype in (torch.float16, torch.bfloat16):  # whose differences may have none
        before, after = before.float(), after.float()
    if by_spread:
        low, high = before.aminmax(dim=-1)
        error = ((after - before).abs_().amax(-1) / (high - low)).amax(-1)
        if math.isfinite(float(error.sum())):  # nearly always: nothing is constant, infinite or NaN
            return error
    difference, low, high = (after - before).abs_(), before, before
    if not math.isfinite(float(difference.sum())):
        known = before.isfinite()
        difference = difference.nan_to_num(nan=torch.inf).where(known, 0.0)
        low, high = before.where(known, torch.inf), before.where(known, -torch.inf)
    if not by_spread:
        largest = torch.maximum(high.amax((-2, -1)), -low.amin((-2, -1))).clamp(min=1.0)
        return (difference.amax((-2, -1)) / largest).nan_to_num(nan=0.0, posinf=torch.inf)
    spread = (high.amax(-1) - low.amin(-1)).clamp_(min=0.0)
    return (difference.amax(-1) / spread).nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)


def _channels(shape: torch.Size) -> tuple[int, int, int]:
    """The batch, channels and positions of a tensor; one channel if `LEAST` does not allow separate ones."""
    batch, channels, positions = shape[0], shape[1:2].numel(), shape[2:].numel()
    return (1, 1, shape.numel()) if batch * positions < LEAST else (batch, channels, positions)


def by_channel(leaf: Tensor) -> Tensor:
    """All numbers of a tensor as `relative_errors` expects them: ``(channels, numbers)``."""
    batch, channels, positions = _channels(leaf.shape)
    return leaf.reshape(batch, channels, positions).transpose(0, 1).flatten(1)


@functools.lru_cache(maxsize=256)
def _places(shape: torch.Size, device: torch.device) -> Tensor:
    """The places of the samples in a tensor of this shape: ``(channels, numbers)``, indices into the flat tensor."""
    batch, channels, inner = _channels(shape)
    count = batch * inner
    rows = []
    for row in range(min(channels, CHANNELS)):
        channel = row if channels <= CHANNELS else int(channels * ((row * GOLDEN) % 1.0))
        numbers = [int(count * ((place * GOLDEN + row * PLASTIC) % 1.0)) for place in range(min(SAMPLES, count))]
        rows.append([number // inner * channels * inner + channel * inner + number % inner for number in numbers])
    return torch.tensor(rows, device=device)
