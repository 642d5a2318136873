"""The monitor: it keeps some numbers of each state in forward, and compares the reconstruction in backward."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from .._torch import float32_precisions
from ..errors import ReconstructionError, ReconstructionWarning
from ..state import State, arranged, leaves
from ..steps import Step

Monitor: TypeAlias = Literal["off", "warn", "raise", "anchor", "repair"]
MONITORS = ("off", "warn", "raise", "anchor", "repair")

TF32_EPS = 2**-10
_CPU = torch.device("cpu")
NUMBERS = 4096
"""How many numbers of a tensor are kept at most, shared between its channels: 16 KiB in float32."""
SAMPLES = 64
"""How many numbers of a channel are kept at most, unless it is the only one. A channel with four fifths of zeros, as in
pictures of digits, looks constant in a sample of this size once in a million."""
NOISE = 8
"""How much further from its constant than all samples a number of a constant channel may come back."""
LOST = 16
"""A constant channel that comes back with noise of more than so many tolerances is a fault: what looks like noise may
be numbers of its own."""
LEAST = 8
"""Fewer numbers in a channel, as in a small batch of vectors, tell nothing about its spread; the spread of the whole
tensor is used instead."""
CHANNELS = NUMBERS // LEAST
"""The most channels that numbers are kept of, evenly spaced."""
GOLDEN, PLASTIC = 0.6180339887498949, 0.7548776662466927
"""Their multiples, modulo 1, are spread evenly, however many there are: no stride coincides with a row."""
DIGITS_TO_KEEP, OF_DOUBLES, OF_TF32 = 3 / 5, 2 / 3, 4 / 5
"""The part of a dtype's digits that a reconstruction must keep: 4.2 of float32's 7 (7e-5); float64 has digits to spare,
and must keep 10.4 of 16 (3.7e-11). A chain of a hundred well-conditioned couplings keeps more (2e-6 in float32); one
that keeps less has gradients with about the same error, which will grow. TF32 must keep 2.4 of 3 (3.9e-3): 64 couplings
come back with an error of 1e-3, which adds as much to the error of the gradients as TF32's own products do."""


def tolerance(dtype: torch.dtype, device: torch.device = _CPU) -> float:
    """The largest relative error of a reconstruction that the monitor accepts.

    Args:
        dtype: of the states.
        device: where they are; what it may compute products of float32 in, such as TF32, counts as their dtype.
    """
    if dtype == torch.float32:
        backend = "cuda" if device.type == "cuda" else "mkldnn"
        precisions = float32_precisions(backend)
        if "bf16" in precisions:
            dtype = torch.bfloat16
        elif "tf32" in precisions:
            return float(TF32_EPS**OF_TF32)
    return float(torch.finfo(dtype).eps ** (OF_DOUBLES if dtype == torch.float64 else DIGITS_TO_KEEP))


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
        worst = max((error for name, error in self.errors.items() if name not in self.anchors), default=0.0)
        return f"Reconstruction({len(self.errors)} layers, worst error {worst:.1e}, anchors {sorted(self.anchors)})"


Numbers: TypeAlias = tuple[int, Tensor]
"""The position of a step in its segment, and numbers of a tensor that it was given, ``(channels, numbers)``."""
Pair: TypeAlias = tuple[int, Tensor, Tensor]
"""The same, and the same numbers of the reconstruction."""
Either = TypeVar("Either", Numbers, Pair)


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
        self._kept: dict[int, list[tuple[int, Tensor, tuple[int, ...]]]] = {}
        self._constant: set[int] = set()
        self._allowed = 0.0

    @property
    def repairs(self) -> bool:
        """Whether backward computes again what it reconstructed wrongly."""
        return self._mode == "repair"

    def keep(self, position: int, before: list[Tensor], after: list[Tensor]) -> None:
        """In forward: some numbers of what went into a step and did not come out of it."""
        unchanged = {id(leaf) for leaf in after}
        kept = []
        for which, leaf in enumerate(before):
            # Tensor subclasses, such as fake tensors, may hold no numbers.
            plain = type(leaf) is Tensor and leaf.is_floating_point() and not leaf.is_meta
            if plain and id(leaf) not in unchanged and leaf.numel():
                kept.append((which, leaf.take(_places(leaf.shape, leaf.device)), leaf.stride()))
        self._kept[position] = kept

    @torch.no_grad()
    def begin(self, output: State, autocast: torch.dtype | None) -> None:
        """At the beginning of backward.

        Args:
            output: of the segment.
            autocast: what autocast computed in; None if it was off.
        """
        dtypes = {leaf.dtype for leaf in leaves(output)} | ({autocast} if autocast else set())
        device = next(leaves(output)).device
        self._allowed = max((tolerance(dtype, device) for dtype in dtypes if dtype.is_floating_point), default=0.0)
        kept = [(position, before) for position, tensors in self._kept.items() for _, before, _ in tensors]
        for group in _alike(kept):
            found = _constant(torch.stack([before for _, before in group])).any(-1)
            if bool(found.any()):
                self._constant.update(
                    position for (position, _), some in zip(group, found.tolist(), strict=True) if some
                )

    def compare(self, position: int, state: State) -> tuple[State, list[Pair]]:
        """In backward: the reconstruction of a step's input, with what is known of it set back.

        That is a tensor of which all numbers were kept, and a channel that was constant. Also the kept numbers, the
        last tensor first, with those of the reconstruction.
        """
        pairs, tensors, changed = [], list(leaves(state)), False
        for which, before, strides in reversed(self._kept[position]):
            leaf = tensors[which]
            after = leaf.detach().take(_places(leaf.shape, leaf.device))
            known = before.numel() == leaf.numel()
            if known or position in self._constant:
                leaf = _whole(leaf, before) if known else set_back(leaf, before, after, self._allowed)
                after = leaf.detach().take(_places(leaf.shape, leaf.device))
                tensors[which], changed = _laid_out(leaf, strides), True
            pairs.append((position, before, after))
        return (arranged(state, tensors) if changed else state), pairs

    def judge(
        self, steps: Sequence[Step], pairs: Sequence[Pair], output: State, agreed: Callable[[int], int] | None
    ) -> int | None:
        """Notes the errors of a segment, and sees to the first one on the way back that is too large.

        Args:
            steps: those of the segment.
            pairs: all that was compared.
            output: of the segment.
            agreed: makes one of the positions that the processes found; None if nothing can be repaired here.

        Returns:
            The position of the step from which on, on the way back, the gradients have to be repaired.

        Raises:
            ReconstructionError: in mode "raise".
        """
        errors, allowed, record = errors_of(pairs), self._allowed, self._record
        record.errors.update({steps[position].name: error for position, error in errors.items()})
        lost = {position: error for position, error in errors.items() if not error <= allowed}
        worst = max(lost.values(), default=0.0)
        if worst == torch.inf and not all(bool(leaf.isfinite().all()) for leaf in leaves(output)):
            lost = {}  # infinity cannot be inverted, and the loss shows it as well
        began = max(lost, default=-1)
        repair = agreed if self.repairs else None
        if repair is not None:
            began = repair(began)
        if began < 0:
            return None
        step = steps[began]
        if self._mode in ("anchor", "repair"):
            record.anchors.add(step.name)
        if repair is not None:
            return began
        error = lost[began]
        found = f"{step}: its input came back with a relative error of {error:.1e} ({allowed:.1e} is allowed)"
        if error == torch.inf:
            found = f"{step}: a channel of its input was constant in this batch and came back with noise"
        # A share of the ReLUs behind it as large as the error switches, and gradients add up as squares.
        off = f"by about {worst**0.5:.1e} of their norm" if worst < 1 else "by any amount"
        found += f"; here it began, and the gradients of this layer and those before it are wrong, perhaps {off}"
        remedy = 'repair them with monitor="repair", or use backprop="checkpoint"'
        if self._mode == "raise":
            raise ReconstructionError(f"{found}; {remedy}")
        if step.name in record.anchors:
            remedy = "from now on this input is kept"
        if step.name not in record.reported:
            record.reported.add(step.name)
            # Python's own filter of repeated warnings compares texts, and this one has a number in it.
            warnings.warn(f"{found}; {remedy}", ReconstructionWarning, stacklevel=2)
        return None


@torch.no_grad()
def errors_of(pairs: Iterable[Pair]) -> dict[int, float]:
    """The error by position, as `relative_errors` measures it; tensors of one shape are compared at once."""
    worst: dict[int, float] = {}
    for group in _alike(pairs):
        before, after = torch.stack([pair[1] for pair in group]), torch.stack([pair[2] for pair in group])
        for (position, *_), error in zip(group, relative_errors(before, after).tolist(), strict=True):
            worst[position] = max(worst.get(position, 0.0), error)
    return worst


def _alike(kept: Iterable[Either]) -> Iterable[list[Either]]:
    """Those of one shape and dtype together."""
    alike: dict[tuple[torch.Size, torch.dtype], list[Either]] = {}
    for one in kept:
        alike.setdefault((one[1].shape, one[1].dtype), []).append(one)
    return alike.values()


def _constant(numbers: Tensor) -> Tensor:
    """Which channels are constant, of ``(..., channels, numbers)``."""
    return (numbers == numbers[..., :1]).all(-1)


def set_back(leaf: Tensor, before: Tensor, after: Tensor, allowed: float) -> Tensor:
    """A reconstructed tensor, with each channel that was constant set back to its constant.

    The noise with which such a channel comes back is all that a batch norm or a ReLU behind it would see. Numbers that
    differ from the constant by much more than the noise stay as they are: the channel may be constant only in what was
    kept of it. The derivative is that of the identity.

    Args:
        leaf: the reconstruction.
        before: numbers of the original, ``(channels, numbers)``.
        after: the same numbers of the reconstruction.
        allowed: the tolerance, in units of max(1, the largest magnitude).
    """
    unit = allowed * before.abs().amax().clamp(min=1)
    noise = (after - before).abs().amax(-1)
    reach = (NOISE * noise).clamp(min=unit).where(_constant(before) & (noise <= LOST * unit), torch.nan)
    known = torch.stack([before[:, 0], reach])
    channels = _channels(leaf.shape)[1]
    if len(before) < channels:
        every = known.new_full((2, channels), torch.nan)
        every[:, _sampled(channels)] = known
        known = every
    values, reach = known.reshape(2, -1, *[1] * (leaf.dim() - 2)) if channels > 1 else known
    return torch.where((values - leaf.detach()).abs() <= reach, values + (leaf - leaf.detach()), leaf)


def _whole(leaf: Tensor, numbers: Tensor) -> Tensor:
    """The tensor of which all numbers were kept; the derivative is that of its reconstruction."""
    batch, channels, positions = _channels(leaf.shape)
    found = numbers.reshape(channels, batch, positions).transpose(0, 1).reshape(leaf.shape).clone()
    return found + (leaf - leaf.detach()) if leaf.requires_grad else found


def _laid_out(leaf: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same numbers with other strides, unless these put two numbers into one place.

    The mean of a constant channel is off by a rounding error that depends on the order of the sum, and so on the
    strides; its sign decides on which side of a ReLU behind a batch norm the whole channel lies.
    """
    reach = 0
    for stride, size in sorted(zip(strides, leaf.shape, strict=True)):
        if size > 1 and stride <= reach:
            return leaf
        reach += stride * (size - 1)
    return leaf if leaf.stride() == strides else leaf.new_empty_strided(leaf.shape, strides).copy_(leaf)


def relative_errors(before: Tensor, after: Tensor) -> Tensor:
    """The relative error: the largest difference in a channel over the channel's spread; the worst channel's.

    It is taken by channel, because a batch norm divides by each channel's deviation and a ReLU has its kink in each: if
    a channel was constant, they see nothing but the noise that comes back, however small, and the error is infinite.
    Numbers that were infinite or NaN before are no error of the reconstruction.

    Args:
        before: ``(..., channels, numbers)``.
        after: the same, reconstructed.

    Examples:
        >>> x = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 0.0]])
        >>> relative_errors(x, x + torch.tensor([[0.0, 0.75, 0.0], [0.0, 0.0, 0.0]])).item()  # 0.75 of 3
        0.25
    """
    if before.dtype in (torch.float16, torch.bfloat16):  # whose differences may have none
        before, after = before.float(), after.float()
    low, high = before.aminmax(dim=-1)
    difference = (after - before).abs_()
    error = (difference.amax(-1) / (high - low)).amax(-1)
    if math.isfinite(float(error.sum())):  # nearly always: nothing is constant, infinite or NaN
        return error
    known = before.isfinite()
    difference = difference.nan_to_num(nan=torch.inf).where(known, 0.0)
    spread = before.where(known, -torch.inf).amax(-1) - before.where(known, torch.inf).amin(-1)
    return (difference.amax(-1) / spread.clamp_(min=0.0)).nan_to_num(nan=0.0, posinf=torch.inf).amax(-1)


def _channels(shape: torch.Size) -> tuple[int, int, int]:
    """The batch, channels and positions of a tensor; one channel if `LEAST` does not allow separate ones."""
    batch, channels, positions = shape[0], shape[1:2].numel(), shape[2:].numel()
    return (1, 1, shape.numel()) if batch * positions < LEAST else (batch, channels, positions)


def by_channel(leaf: Tensor) -> Tensor:
    """All numbers of a tensor as `relative_errors` expects them: ``(channels, numbers)``."""
    batch, channels, positions = _channels(leaf.shape)
    return leaf.reshape(batch, channels, positions).transpose(0, 1).flatten(1)


def _sampled(channels: int) -> list[int]:
    """The channels that numbers are kept of."""
    if channels <= CHANNELS:
        return list(range(channels))
    return [int(channels * ((row * GOLDEN) % 1.0)) for row in range(CHANNELS)]


@functools.lru_cache(maxsize=256)
def _places(shape: torch.Size, device: torch.device) -> Tensor:
    """The places of the samples in a tensor of this shape: ``(channels, numbers)``, indices into the flat tensor."""
    batch, channels, inner = _channels(shape)
    count = batch * inner
    samples = min(SAMPLES if channels > 1 else NUMBERS, max(LEAST, NUMBERS // channels), count)
    rows = []
    for row, channel in enumerate(_sampled(channels)):
        numbers = [int(count * ((place * GOLDEN + row * PLASTIC) % 1.0)) for place in range(samples)]
        numbers = list(range(count)) if samples == count else numbers
        rows.append([number // inner * channels * inner + channel * inner + number % inner for number in numbers])
    return torch.tensor(rows, device=device)
