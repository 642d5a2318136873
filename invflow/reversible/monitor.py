"""Whether what backward reconstructs is what forward had: some numbers of each state, kept and compared."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import ReconstructionError, ReconstructionWarning
from ..state import State, leaves
from .step import Step

Monitor: TypeAlias = Literal["off", "warn", "raise", "anchor"]
MONITORS = ("off", "warn", "raise", "anchor")

SAMPLES = 64
"""Numbers kept of each tensor of a state: as cheap as one, and enough to meet every channel of usual networks."""
GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly however many there are: no stride falls in step with the channels."""
DIGITS_TO_KEEP = 2 / 3
"""The part of a dtype's digits that a reconstruction must keep: 4.6 of float32's 7 (2.4e-5), 10.4 of float64's 16
(3.7e-11). A chain of a hundred well-conditioned couplings keeps more; one that keeps less has gradients that are off by
about as much, and on the way to being off by everything."""


@functools.cache
def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error of a reconstruction in a dtype that the monitor is silent about."""
    return float(torch.finfo(dtype).eps ** DIGITS_TO_KEEP)


class Reconstruction:
    """What a chain's monitor found: data for a person or a log; only the anchors decide what training keeps.

    Attributes:
        errors: by layer, the relative error of its input as the last backward reconstructed it.
        anchors: the layers whose inputs are kept from now on. A user may add names and remove them.
        reported: the layers that were warned of, once each.
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


class Samples:
    """Some numbers of the states that the steps of a run were given, to be compared with their reconstructions.

    Of the tensors that a step hands on as they are, as a coupling does with one half, the next step knows.
    """

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._taken: list[tuple[int, int]] = []
        self._passes: list[bool] = []

    def keep(self, position: int, before: list[Tensor], after: list[Tensor]) -> None:
        """In forward: some numbers of what went into a step and did not come out of it."""
        passes, handed_on = False, {id(leaf) for leaf in after}
        for which, leaf in enumerate(before):
            if id(leaf) in handed_on:
                passes = True
            # Plain tensors alone have numbers.
            elif type(leaf) is Tensor and leaf.is_floating_point() and leaf.numel() and not leaf.is_meta:
                self._rows.append(leaf.take(_places(leaf.numel(), leaf.device)))
                self._taken.append((position, which))
        self._passes.append(passes)

    def like(self, kept: Samples, position: int, state: State) -> None:
        """In backward, from the last step to the first: the same numbers of what was reconstructed."""
        place = len(kept._taken) - 1 - len(self._taken)
        if place < 0 or kept._taken[place][0] != position:
            return
        tensors = list(leaves(state))
        while place >= 0 and kept._taken[place][0] == position:
            leaf = tensors[kept._taken[place][1]]
            self._rows.append(leaf.take(_places(leaf.numel(), leaf.device)))
            self._taken.append(kept._taken[place])
            place -= 1

    @torch.no_grad()
    def errors(self, reconstructed: Samples) -> dict[int, float]:
        """The relative error by position: the largest difference over the state's largest magnitude.

        What was infinite or no number before is no error of the reconstruction.
        """
        if not self._rows:
            return {}
        numbers = torch.stack([*self._rows, *reconstructed._rows[::-1]])
        if numbers.dtype in (torch.float16, torch.bfloat16):  # whose differences may have none
            numbers = numbers.float()
        before, difference = numbers = numbers.view(2, len(self._rows), -1)
        difference -= before
        magnitudes, differences = torch.linalg.vector_norm(numbers, torch.inf, dim=2).tolist()
        if not math.isfinite(sum(differences) + sum(magnitudes)):
            known, numbers = before.isfinite(), numbers.abs()
            numbers[1].nan_to_num_(nan=torch.inf)
            magnitudes, differences = numbers.where(known, 0.0).amax(2).tolist()
        error, scale = [0.0] * (len(self._passes) + 1), [0.0] * (len(self._passes) + 1)
        for (position, _), difference, magnitude in zip(self._taken, differences, magnitudes, strict=True):
            error[position] = max(error[position], difference)
            scale[position] = max(scale[position], magnitude)
        return {
            position: _relative(error[position], max(scale[position], scale[position + 1] if passes else 0.0))
            for position, passes in enumerate(self._passes)
        }


def judge(
    record: Reconstruction,
    mode: Monitor,
    steps: Sequence[Step],
    errors: dict[int, float],
    allowed: float,
    output: State,
) -> None:
    """Notes the errors of a run, and speaks of the first one on the way back that is too large.

    Raises:
        ReconstructionError: in mode "raise".
    """
    lost = []
    for position, error in errors.items():
        record.errors[steps[position].name] = error
        if not error <= allowed:
            lost.append(position)
    if not lost:
        return
    if any(errors[position] == torch.inf for position in lost) and not _is_finite(output):
        return  # nothing comes back from infinity: the loss shows that as well
    step = steps[max(lost)]
    found = f"{step}: its input came back with a relative error of {errors[max(lost)]:.1e} ({allowed:.1e} is allowed)"
    remedy = 'keep what is lost with monitor="anchor", or use backprop="checkpoint"'
    if mode == "raise":
        raise ReconstructionError(f"{found}, so the gradients below it are wrong; {remedy}")
    if mode == "anchor":
        record.anchors.add(step.name)
        remedy = "from now on this input is kept"
    if step.name not in record.reported:
        record.reported.add(step.name)
        # Python's own memory of what was warned of is by text, which holds a number.
        warnings.warn(f"{found}, so the gradients below it are wrong; {remedy}", ReconstructionWarning, stacklevel=2)


def _relative(error: float, magnitude: float) -> float:
    return error / magnitude if magnitude else (torch.inf if error else 0.0)


def _is_finite(state: State) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in leaves(state))


@functools.lru_cache(maxsize=256)
def _places(count: int, device: torch.device) -> Tensor:
    """Where in a tensor of so many numbers samples are taken."""
    return torch.tensor([int(count * ((place * GOLDEN) % 1.0)) for place in range(1, SAMPLES + 1)], device=device)
